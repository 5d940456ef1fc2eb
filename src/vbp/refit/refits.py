"""What a job refits after surgery: producers, residual stream, last layer; whether, and to which images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torch import Tensor, nn

from vbp.data.loader import ImageLoader
from vbp.errors import InputError
from vbp.pruning.divergence import HELD_BACK_IMAGES, held_back
from vbp.refit.head import DenseAnswers, HeadRefit, check_images, last_linear, refit_head_
from vbp.refit.producers import ProducerRefit, refit_producers_
from vbp.refit.stream import StreamRefit, check_stream, refit_stream_
from vbp.runtime.memory import out_of_memory
from vbp.runtime.session import bar
from vbp.sites.mlp import check_mlps
from vbp.statistics.evidence import hidden_samples
from vbp.statistics.images import calibration_share, draws_of, views_of

if TYPE_CHECKING:
    from vbp.recipes.setup import Job


_log = logging.getLogger(__name__)


# Calibration images from which each of them is refitted.
REFIT_IMAGES: Final = 1000


# One image in this many, and no more than the plans of `auto` are compared by, judges the refit of the stream.
_ONE_IN = 4


@dataclass(frozen=True)
class Refitted:
    """What the refits did; None for one that is not wanted or not possible."""

    producers: ProducerRefit | None = None
    stream: StreamRefit | None = None
    head: HeadRefit | None = None


def check_refits(job: Job) -> None:
    """Refuse `on` where nothing can be refitted.

    Raises:
        InputError: The model has no such MLP, stream or last layer, or there are too few images.
    """
    if job.config.compensation == "refit":
        for flag, (check, _) in _CHECKS.items():
            if getattr(job.config, flag) == "on":
                check(job, job.model)


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
        wanted = producers, stream, head = [_wanted(job, dense, flag) for flag in _CHECKS]
        if any(wanted):
            views = views_of(job)
            _log.info("the refits after surgery read %d view%s of each image", views, "" if views == 1 else "s")
        self._judge = held_back(job, dense, _judging(job)) if stream else None
        # The images that judge the stream must be new to the producers too.
        self._samples = hidden_samples(job, dense, _fitted(job)) if producers else None
        with out_of_memory("calibration"):
            self._answers = (
                DenseAnswers(
                    dense, _Pixels(job, range(REFIT_IMAGES), "last layer"),
                    views=views_of(job), precision=job.precision, processes=job.processes,
                ) if head else None
            )  # fmt: skip

    def refit_(self, pruned: nn.Module) -> Refitted:
        """Refit a pruned model, in place.

        Raises:
            InputError: An answer is not finite.
        """
        job, producers, stream, head = self._job, None, None, None
        with out_of_memory("calibration"):
            if self._samples is not None:
                producers = refit_producers_(pruned, self._samples)
                _log.info("%s", producers.sentence())
            if self._judge is not None:
                others = _Pixels(job, _fitted(job), "residual stream")
                stream = refit_stream_(
                    pruned, self._dense, job.sites, others, self._judge,
                    draws=others.draws, precision=job.precision, processes=job.processes,
                )  # fmt: skip
                _log.info("%s", stream.sentence())
            if self._answers is not None:
                head = refit_head_(pruned, self._answers)
                _log.info("%s", head.sentence())
        return Refitted(producers, stream, head)


def _wanted(job: Job, dense: nn.Module, flag: str) -> bool:
    """Return whether something is to be refitted, and in the log why not if it cannot be."""
    check, what = _CHECKS[flag]
    if getattr(job.config, flag) == "off":
        return False
    try:
        check(job, dense)
    except InputError as error:
        _log.info("%s: %s", what, error)
        return False
    return True


def _check_producers(job: Job, dense: nn.Module) -> None:
    _check_judged(job, "producers")
    check_mlps(dense, job.example, job.sites)


def _check_stream(job: Job, dense: nn.Module) -> None:
    _check_judged(job, "residual stream")
    check_stream(dense, job.example, job.sites)


def _check_judged(job: Job, what: str) -> None:
    if len(job.calibration) < _ONE_IN:
        raise InputError(
            f"the refit of the {what} needs at least {_ONE_IN} images, got {len(job.calibration)}; give more"
        )


def _check_head(job: Job, dense: nn.Module) -> None:
    last_linear(dense, job.example)
    check_images(len(job.calibration))


# By flag: what must hold, and what is said of it.
_CHECKS: Final[Mapping[str, tuple[Callable[[Job, nn.Module], None], str]]] = {
    "refit_producers": (_check_producers, "the producers stay as they are"),
    "refit_stream": (_check_stream, "the residual stream stays as it is"),
    "refit_head": (_check_head, "the last layer stays as it is"),
}


def _judging(job: Job) -> int:
    return min(HELD_BACK_IMAGES, len(job.calibration) // _ONE_IN)


def _fitted(job: Job) -> range:
    return range(_judging(job), _judging(job) + REFIT_IMAGES)


class _Pixels:
    """Some calibration images, without labels; read again each time, for a thousand take much memory."""

    def __init__(self, job: Job, places: range, name: str) -> None:
        self._job, self._name = job, name
        self._loader: ImageLoader | None = calibration_share(job, places, views_of(job))
        self.draws = draws_of(job, self._loader)

    def __iter__(self) -> Iterator[Tensor]:
        if self._loader is not None:
            for pixels, _ in bar(self._job, self._loader, self._name):
                yield pixels
