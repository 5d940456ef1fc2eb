"""The refit of the last layer on a job: whether it is wanted and possible, and the images it is made from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Final

from torch import Tensor, nn

from vbp.data import ImageLoader
from vbp.errors import InputError
from vbp.evidence import calibration_share
from vbp.head_refit import DenseAnswers, HeadRefit, check_images, last_linear, refit_head_
from vbp.job import Job
from vbp.measuring import bar
from vbp.memory import out_of_memory

_log = logging.getLogger(__name__)

# Calibration images from which the last layer is refitted.
HEAD_IMAGES: Final = 1000


def check_last_layer(job: Job) -> None:
    """Refuse `--refit_head on` where nothing can be refitted.

    Raises:
        InputError: The model has no such layer, or there are too few images.
    """
    if job.config.compensation == "refit" and job.config.refit_head == "on":
        _check_possible(job)


def wants_head_refit(job: Job) -> bool:
    """Say whether the last layer is to be refitted, and in the log why not if it cannot be."""
    if job.config.compensation != "refit" or job.config.refit_head == "off":
        return False
    try:
        _check_possible(job)
    except InputError as error:
        _log.info("the last layer stays as it is: %s", error)
        return False
    return True


def _check_possible(job: Job) -> None:
    last_linear(job.model, job.example)
    check_images(len(job.calibration))


class LastLayer:
    """Lets the last layer of pruned models answer like that of the job's dense model.

    All processes make it while the job's model is dense, and call it alike.
    """

    def __init__(self, job: Job) -> None:
        """Let the dense model answer.

        Raises:
            InputError: There are too few images.
        """
        self._job = job
        loader = calibration_share(job, HEAD_IMAGES)
        with out_of_memory("calibration"):
            self._answers = DenseAnswers(
                job.model, _Pixels(job, loader), precision=job.precision, processes=job.processes
            )

    def refit_(self, pruned: nn.Module) -> HeadRefit:
        """Refit a pruned model's last layer, in place.

        Raises:
            InputError: An answer is not finite.
        """
        with out_of_memory("calibration"):
            found = refit_head_(pruned, self._answers)
        _log.info("%s", found.sentence())
        return found


class _Pixels:
    """The images of a loader, without labels; read again each time, for a thousand take much memory."""

    def __init__(self, job: Job, loader: ImageLoader | None) -> None:
        self._job, self._loader = job, loader

    def __iter__(self) -> Iterator[Tensor]:
        if self._loader is not None:
            for pixels, _ in bar(self._job, self._loader, "last layer"):
                yield pixels
