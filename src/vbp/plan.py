"""Decide which channels stay: exact counts, floors, rounding. Plain data, and readable before it is applied."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from vbp.errors import InputError
from vbp.files import write_json
from vbp.sites import Site

_FORMAT = "vbp-plan/1"
Scope = Literal["global", "per_layer"]


@dataclass(frozen=True)
class SitePlan:
    """What stays of one site: the indices of the kept channels, ascending."""

    site: Site
    keep: tuple[int, ...]

    @property
    def removed(self) -> tuple[int, ...]:
        """Give the indices of the channels that go, ascending."""
        kept = set(self.keep)
        return tuple(index for index in range(self.site.hidden) if index not in kept)


@dataclass(frozen=True)
class PruningPlan:
    """Which hidden channels of a model stay.

    Attributes:
        sites: One entry a site, in the order in which the sites run.
        keep_ratio: The share that was asked for.
        scope: Whether channels compete across sites (`global`) or each site keeps the same share (`per_layer`).
        round_to: Channels of a site come in multiples of this.
        min_keep_ratio: No site keeps a smaller share than this.
    """

    sites: tuple[SitePlan, ...]
    keep_ratio: float
    scope: Scope
    round_to: int = 1
    min_keep_ratio: float = 0.0

    @property
    def total(self) -> int:
        """Give the number of hidden channels of the dense model."""
        return sum(entry.site.hidden for entry in self.sites)

    @property
    def kept(self) -> int:
        """Give the number of hidden channels that stay."""
        return sum(len(entry.keep) for entry in self.sites)

    @property
    def requested(self) -> int:
        """Give the number of hidden channels that `keep_ratio` asks for."""
        return round(self.total * self.keep_ratio)

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Give (kept, total) channels by site name."""
        return {entry.site.name: (len(entry.keep), entry.site.hidden) for entry in self.sites}

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON data."""
        return {"format": _FORMAT, **json.loads(json.dumps(asdict(self)))}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> PruningPlan:
        """Read what `to_dict` gave.

        Raises:
            InputError: The data is no plan, or of another format.
        """
        if value.get("format") != _FORMAT:
            raise InputError(f"a plan must have format {_FORMAT}, got {value.get('format')!r}; make it again")
        try:
            sites = tuple(_site_plan(entry) for entry in value["sites"])
            return PruningPlan(sites, value["keep_ratio"], value["scope"], value["round_to"], value["min_keep_ratio"])
        except (KeyError, TypeError) as error:
            raise InputError(f"the plan is damaged: {error!r}; make it again") from error

    def save(self, path: Path) -> None:
        """Write JSON that `load` reads, whole or not at all."""
        write_json(path, self.to_dict())

    @staticmethod
    def load(path: Path) -> PruningPlan:
        """Read a file that `save` wrote.

        Raises:
            InputError: The file is missing, damaged or something else.
        """
        try:
            return PruningPlan.from_dict(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no readable plan ({error}); make the plan again") from error


def _site_plan(entry: Mapping[str, Any]) -> SitePlan:
    site = Site(tuple(entry["site"]["producers"]), entry["site"]["consumer"], entry["site"]["hidden"])
    keep = tuple(entry["keep"])
    if not keep or list(keep) != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= site.hidden:
        raise InputError(
            f"plan of site {site.name} must keep ascending channels of 0..{site.hidden - 1}, at least one; "
            f"got {len(keep)} entries; make the plan again"
        )
    return SitePlan(site, keep)


def check_ratios(keep_ratio: float, min_keep_ratio: float, round_to: int) -> None:
    """Check the numbers that a plan is made from.

    Raises:
        InputError: One is out of range.
    """
    if not 0 < keep_ratio <= 1:
        raise InputError(f"keep_ratio must be in (0, 1], got {keep_ratio}; 0.65 keeps 65 % of the channels")
    if not 0 <= min_keep_ratio <= 1:
        raise InputError(f"min_keep_ratio must be in [0, 1], got {min_keep_ratio}; 0.02 is the default")
    if min_keep_ratio > keep_ratio:
        raise InputError(
            f"min_keep_ratio must not exceed keep_ratio, got {min_keep_ratio} > {keep_ratio}; lower min_keep_ratio"
        )
    if round_to < 1:
        raise InputError(f"round_to must be at least 1, got {round_to}; 1 rounds nothing, 8 suits most hardware")


def make_plan(
    sites: Sequence[Site],
    scores: Mapping[str, Tensor],
    *,
    keep_ratio: float,
    scope: Scope = "global",
    round_to: int = 1,
    min_keep_ratio: float = 0.02,
) -> PruningPlan:
    """Keep the best `round(total * keep_ratio)` channels, or the nearest count that rounding and floors allow.

    Channels of equal score go in the order of site, then index. With `round_to` above 1 a site that loses channels
    keeps a multiple of it, and a site narrower than `round_to` stays whole. `per_layer` gives each site the same
    share, to within one step, so that the total is exact too.

    Args:
        sites: From `find_sites`.
        scores: Site name -> score of each hidden channel; the lowest go first.
        keep_ratio: Share of all hidden channels to keep, in (0, 1].
        scope: `global` or `per_layer`.
        round_to: Step of the channel counts.
        min_keep_ratio: Floor of each site, as a share of its channels; at least one channel stays in any case.

    Raises:
        InputError: A number is out of range, or scores are missing, of the wrong length, or not finite.

    Source: VBP paper, section 3.2.
    """
    check_ratios(keep_ratio, min_keep_ratio, round_to)
    ranked = [_removal_order(site, scores) for site in sites]
    total = sum(site.hidden for site in sites)
    target = round(total * keep_ratio)
    steps = [_Steps.of(site.hidden, round_to, min_keep_ratio) for site in sites]
    most = sum(step.most for step in steps)
    if target == total or total - target < target - most:
        counts = [site.hidden for site in sites]
    elif scope == "global":
        counts = _global_counts(ranked, steps, target)
    else:
        counts = _per_layer_counts([site.hidden * keep_ratio for site in sites], steps, target)
    entries = tuple(
        SitePlan(site, tuple(sorted(order.channels[site.hidden - count :].tolist())))
        for site, order, count in zip(sites, ranked, counts, strict=True)
    )
    return PruningPlan(entries, keep_ratio, scope, round_to, min_keep_ratio)


@dataclass(frozen=True)
class _Ranked:
    """Channels of one site in the order in which they go, and their scores in that order."""

    channels: np.ndarray[Any, np.dtype[np.int64]]
    scores: np.ndarray[Any, np.dtype[np.float64]]


def _removal_order(site: Site, scores: Mapping[str, Tensor]) -> _Ranked:
    if site.name not in scores:
        raise InputError(f"scores must hold every site, got none for {site.name}; collect its statistics")
    score = scores[site.name].detach().double().cpu().numpy()
    if score.shape != (site.hidden,) or not np.isfinite(score).all():
        raise InputError(
            f"scores of {site.name} must be {site.hidden} finite numbers, got shape {score.shape}, "
            f"{int((~np.isfinite(score)).sum())} not finite; collect the statistics again"
        )
    order = np.argsort(score, kind="stable")
    return _Ranked(order, score[order])


@dataclass(frozen=True)
class _Steps:
    """The channel counts that a site may have besides all: least, least + step, ..., most."""

    least: int
    most: int
    step: int

    @staticmethod
    def of(hidden: int, step: int, min_keep_ratio: float) -> _Steps:
        most = hidden // step * step
        if most == 0:
            return _Steps(hidden, hidden, step)
        # The tolerance undoes binary fractions: 0.07 * 100 is 7.000000000000001 and must ask for 7 channels.
        floor = max(1, math.ceil(hidden * min_keep_ratio - 1e-9))
        return _Steps(min(math.ceil(floor / step) * step, most), most, step)


def _global_counts(ranked: Sequence[_Ranked], steps: Sequence[_Steps], target: int) -> list[int]:
    """Remove whole steps in the order of their mean score, over all sites together."""
    means: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    for order, step in zip(ranked, steps, strict=True):
        odd = len(order.scores) - step.most
        removable = order.scores[odd : odd + step.most - step.least]
        means.append(removable.reshape(-1, step.step).mean(1) if len(removable) else removable)
    site_of = np.repeat(np.arange(len(means)), [len(mean) for mean in means])
    surplus = sum(step.most for step in steps) - target
    gone = min(len(site_of), max(0, math.ceil(surplus / steps[0].step - 0.5)))
    # A stable sort breaks ties by site order and, inside a site, by the order of removal.
    removed = site_of[np.argsort(np.concatenate(means), kind="stable")[:gone]]
    lost = np.bincount(removed, minlength=len(steps))
    return [step.most - int(number) * step.step for step, number in zip(steps, lost, strict=True)]


def _per_layer_counts(quotas: Sequence[float], steps: Sequence[_Steps], target: int) -> list[int]:
    """Give each site the count nearest to its quota such that the total comes out (largest remainders)."""
    counts = [
        min(max(int(quota // step.step) * step.step, step.least), step.most)
        for quota, step in zip(quotas, steps, strict=True)
    ]
    while True:
        missing = target - sum(counts)
        step = steps[0].step
        sign = 1 if missing > 0 else -1
        movable = [
            index
            for index, (count, bounds) in enumerate(zip(counts, steps, strict=True))
            if bounds.least <= count + sign * step <= bounds.most
        ]
        # Half a step too many is as near as half a step too few: then nothing moves.
        if not movable or 2 * abs(missing) <= step:
            return counts
        counts[max(movable, key=lambda index: (sign * (quotas[index] - counts[index]), -index))] += sign * step
