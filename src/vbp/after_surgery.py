"""What a job refits after surgery: the residual stream, then the last layer; whether, and to which images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from vbp.data import ImageLoader
from vbp.errors import InputError
from vbp.evidence import HELD_BACK_IMAGES, calibration_share, held_back
from vbp.head_refit import DenseAnswers, HeadRefit, check_images, last_linear, refit_head_
from vbp.job import Job
from vbp.measuring import bar
from vbp.memory import out_of_memory
from vbp.stream_refit import StreamRefit, check_stream, refit_stream_

_log = logging.getLogger(__name__)

# Calibration images from which each of the two is refitted.
REFIT_IMAGES: Final = 1000
# One image in this many, and no more than the plans of `auto` are compared by, judges the refit of the stream.
_ONE_IN = 4


@dataclass(frozen=True)
class Refitted:
    """What the refits did; None for one that is not wanted or not possible."""

    stream: StreamRefit | None = None
    head: HeadRefit | None = None


def check_refits(job: Job) -> None:
    """Refuse `on` where nothing can be refitted.

    Raises:
        InputError: The model has no residual stream or no last linear layer, or there are too few images.
    """
    if job.config.compensation == "refit":
        for wish, check in ((job.config.refit_stream, _check_stream), (job.config.refit_head, _check_head)):
            if wish == "on":
                check(job)


class AfterSurgery:
    """Refits pruned models of a job to its dense model; all processes make it, and call it alike."""

    def __init__(self, job: Job, dense: nn.Module) -> None:
        """Let the dense model answer, where that is needed, and say in the log what cannot be refitted.

        Args:
            job: Whose images these are.
            dense: The model as it was before it was pruned.

        Raises:
            InputError: No image can be read.
        """
        self._job, self._dense = job, dense
        stream = _wanted(job, job.config.refit_stream, _check_stream, "the residual stream")
        head = _wanted(job, job.config.refit_head, _check_head, "the last layer")
        self._judge = held_back(job, dense, _judging(job)) if stream else None
        with out_of_memory("calibration"):
            self._answers = (
                DenseAnswers(
                    dense, _Pixels(job, range(REFIT_IMAGES), "last layer"),
                    precision=job.precision, processes=job.processes,
                ) if head else None
            )  # fmt: skip

    def refit_(self, pruned: nn.Module) -> Refitted:
        """Refit a pruned model, in place.

        Raises:
            InputError: An answer is not finite.
        """
        job, stream, head = self._job, None, None
        with out_of_memory("calibration"):
            if self._judge is not None:
                places = range(_judging(job), _judging(job) + REFIT_IMAGES)
                stream = refit_stream_(
                    pruned, self._dense, job.sites, _Pixels(job, places, "residual stream"), self._judge,
                    precision=job.precision, processes=job.processes,
                )  # fmt: skip
                _log.info("%s", stream.sentence())
            if self._answers is not None:
                head = refit_head_(pruned, self._answers)
                _log.info("%s", head.sentence())
        return Refitted(stream, head)


def _wanted(job: Job, wish: str, check: Callable[[Job], None], what: str) -> bool:
    """Say whether something is to be refitted, and in the log why not if it cannot be."""
    if wish == "off":
        return False
    try:
        check(job)
    except InputError as error:
        _log.info("%s stays as it is: %s", what, error)
        return False
    return True


def _check_stream(job: Job) -> None:
    if len(job.calibration) < _ONE_IN:
        raise InputError(
            f"the refit of the residual stream needs at least {_ONE_IN} images, got {len(job.calibration)}; give more"
        )
    check_stream(job.model, job.example, job.sites)


def _check_head(job: Job) -> None:
    last_linear(job.model, job.example)
    check_images(len(job.calibration))


def _judging(job: Job) -> int:
    return min(HELD_BACK_IMAGES, len(job.calibration) // _ONE_IN)


class _Pixels:
    """Some calibration images, without labels; read again each time, for a thousand take much memory."""

    def __init__(self, job: Job, places: range, name: str) -> None:
        self._job, self._name = job, name
        self._loader: ImageLoader | None = calibration_share(job, places)

    def __iter__(self) -> Iterator[Tensor]:
        if self._loader is not None:
            for pixels, _ in bar(self._job, self._loader, self._name):
                yield pixels
