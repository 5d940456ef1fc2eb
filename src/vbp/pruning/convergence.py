"""Statistics in stages over more and more images: exact across processes, and whether the plan has converged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from vbp.errors import InputError
from vbp.pruning.plan import PruningPlan
from vbp.runtime.processes import Processes
from vbp.runtime.tables import text_table
from vbp.statistics.statistics import Statistics

_log = logging.getLogger(__name__)

# Converged: twice the images change at most one channel in a hundred. Measured on DeiT-Tiny (ImageNet,
# one image a class, 35 % of the channels removed globally; medians of 20 orders): 62 -> 125 -> 250 -> 500 -> 1,000
# images change 2.0, 1.6, 1.2 and 0.9 %, each doubling about 0.75 times as many as the one before. These channels lie
# at the threshold and matter little: from 124 images on, accuracy right after pruning is 68.6 to 70.9 % (two orders
# each; 70.3 with all; standard error 1.8), so the limit errs on the side of more images.
CONVERGED_SHARE = 0.01

# Stages are halves of all images, halves of these and so on, none smaller than this.
_SMALLEST_STAGE = 256


@dataclass(frozen=True)
class Stage:
    """Hold the plan's change after so many images.

    `changed` is the share of all channels that the plan of the stage before, with half the images, kept, and this one
    does not; None in the first stage.
    """

    images: int
    changed: float | None


@dataclass(frozen=True)
class Convergence:
    """Tell how the plan changed while the images doubled, stage by stage."""

    stages: tuple[Stage, ...]

    @property
    def converged(self) -> int | None:
        """Return the images of the first stage from which on no doubling changed more than `CONVERGED_SHARE`.

        None if the last doubling still did, or there was none.
        """
        converged = None
        for stage in reversed(self.stages):
            if stage.changed is None or stage.changed > CONVERGED_SHARE:
                break
            converged = stage.images
        return converged

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"stages": [asdict(stage) for stage in self.stages], "converged": self.converged}

    def table(self) -> str:
        """Return the stages as lines of text, the last of which says whether the plan has converged."""
        stages = [(f"{stage.images:,}", _percent(stage.changed)) for stage in self.stages]
        rows = [text_table([("images", "channels that changed"), *stages], "rl", (10,))]
        if len(self.stages) < 2:
            few = f"too few images to say whether the plan has converged; {2 * _SMALLEST_STAGE} or more would tell"
            return "\n".join([*rows, few])
        before, last = self.stages[-2:]
        doubling = (
            f"last doubling, {before.images:,} -> {last.images:,} images: {_percent(last.changed)} of the channels "
            "would change"
        )
        if self.converged is None:
            outcome = f"not converged (at most {_percent(CONVERGED_SHARE)}): give more images"
        else:
            outcome = f"converged at {self.converged:,} images"
        return "\n".join([*rows, f"{doubling}; {outcome}"])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def merge_across(statistics: Statistics | None, processes: Processes) -> Statistics:
    """Merge what each process has seen, in the order of ranks, on every process; all of them must call this.

    Statistics are on the CPU, None from a process that had no image.

    Raises:
        InputError: No process had an image, or they observed different models.
    """
    shares = [share for share in processes.all_gather(statistics) if share is not None]
    if not shares:
        raise InputError("calibration needs at least one image, got none on any process; check the training images")
    return reduce(Statistics.merge, shares)


def changed_share(before: PruningPlan, now: PruningPlan) -> float:
    """Return the share of all channels that one plan keeps and the next removes."""
    gone = sum(len(set(old.keep).difference(new.keep)) for old, new in zip(before.sites, now.sites, strict=True))
    return gone / sum(entry.site.hidden for entry in now.sites)


def stage_ends(total: int) -> tuple[int, ...]:
    """Return how many images have been seen at the end of each stage: each time twice as many, at last all of them.

    Counted from the end, so that the last step is a doubling too: a few images more would change nothing, and say
    nothing.
    """
    ends = [total]
    while (half := (ends[-1] + 1) // 2) >= _SMALLEST_STAGE:
        ends.append(half)
    return tuple(reversed(ends))


def calibrate(
    collect: Callable[[range], Statistics | None],
    total: int,
    plan_of: Callable[[Statistics], PruningPlan],
    processes: Processes,
    *,
    auto: bool = False,
    first: int = 0,
) -> tuple[Statistics, Convergence]:
    """Collect statistics in stages until the images run out or, with `auto`, until the plan has converged.

    All processes must call this, and all get the same. They meet at the ends of stages alone. `collect` returns the
    statistics of this process's share of the images at these places, in an order of which every beginning represents
    the whole, None if its share is empty; `plan_of` makes the plan whose changes are measured. Images before the
    place `first` are left out.

    Returns:
        Statistics of all images seen, as one pass over them would have, and how the plan changed on the way.

    Raises:
        InputError: There is no image.
    """
    if total <= first:
        raise InputError(f"calibration needs at least one image, got {total}; check the training images")
    statistics: Statistics | None = None
    plan: PruningPlan | None = None
    stages: list[Stage] = []
    start = 0
    total -= first
    for end in stage_ends(total):
        new = merge_across(collect(range(first + start, first + end)), processes)
        statistics = new if statistics is None else statistics.merge(new)
        before, plan, start = plan, plan_of(statistics), end
        # The value of the first process, so that all stop together even if their last bits differ.
        changed = processes.all_gather(None if before is None else changed_share(before, plan))[0]
        stages.append(Stage(statistics.images, changed))
        told = "first plan" if changed is None else f"{_percent(changed)} of the channels changed since half of them"
        _log.info("calibration: %s of %s images; %s", f"{end:,}", f"{total:,}", told)
        if auto and changed is not None and changed <= CONVERGED_SHARE:
            _log.info("calibration: converged, %s images are left out", f"{total - end:,}")
            break
    else:
        if auto:
            _log.warning("calibration: the images ran out before the plan converged; all %s are used", f"{total:,}")
    assert statistics is not None
    return statistics, Convergence(tuple(stages))
