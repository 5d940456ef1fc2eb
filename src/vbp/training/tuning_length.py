"""How long tuning without labels takes: epochs of short trials, and of the training that follows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vbp.errors import InputError

# Peak learning rates that are tried. Which of them is best depends on how the dense model was trained.
RATES: Final = (1e-5, 3e-5, 1e-4)

# One epoch of each trial for so many of the training that follows.
_TRIAL_SHARE: Final = 8

# `auto`: epochs, and the most images of one of them, where they take minutes on a CPU and on a GPU.
_AUTO_EPOCHS: Final = 8
_AUTO_IMAGES: Final[Mapping[str, int]] = {"cpu": 1000}
_AUTO_IMAGES_ELSEWHERE: Final = 10_000

# Share of a time limit that is planned for: the rest is for what is slower than the batches that were timed.
_PLANNED: Final = 0.9

# A forward pass without gradients, as a share of a training step, which also has the teacher's.
_FORWARD: Final = 1 / 4
_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)([smh])")
_SECONDS: Final[Mapping[str, int]] = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class TuningLength:
    """How long to tune: epochs over the calibration images, or seconds; with neither of both, by the device."""

    epochs: int | None = None
    seconds: float | None = None

    @staticmethod
    def of(value: int | str) -> TuningLength | None:
        """Read a setting as `auto`, `8` or `5m`; None for `off`.

        Raises:
            InputError: It is none of these.
        """
        text = str(value)
        if text in ("off", "auto"):
            return None if text == "off" else TuningLength()
        if text.isdecimal() and int(text) > 0:
            return TuningLength(epochs=int(text))
        match = _TIME.fullmatch(text)
        if match is None or float(match[1]) == 0:
            raise InputError(
                f"tune must be auto, off, a number of epochs above 0 as 8, or a time as 90s, 5m or 1h, got {text!r}"
            )
        return TuningLength(seconds=float(match[1]) * _SECONDS[match[2]])


@dataclass(frozen=True)
class Schedule:
    """Images that are trained on, and epochs over them: of each trial, and of the training that follows."""

    images: int
    epochs: int

    @staticmethod
    def by_device(images: int, device: str) -> Schedule:
        """Return what `auto` means for so many images on a kind of device."""
        return Schedule(min(images, _AUTO_IMAGES.get(device, _AUTO_IMAGES_ELSEWHERE)), _AUTO_EPOCHS)

    @staticmethod
    def within(seconds: float, an_image: float, images: int, held_out: int, least: int) -> Schedule:
        """Return the longest schedule that fits into a time; of fewer images where one epoch would not.

        Args:
            seconds: In all.
            an_image: Seconds that a training image takes.
            images: To train on, at most.
            held_out: Images on which three models are compared after each epoch.
            least: Images to train on, at least.
        """
        limit = _PLANNED * seconds / an_image  # in training images
        judging = 3 * _FORWARD * held_out
        epochs = 1
        while sum(Schedule(images, epochs + 1).phases) * (images + judging) <= limit:
            epochs += 1
        fitting = int(limit / sum(Schedule(images, epochs).phases) - judging)
        return Schedule(min(images, max(least, fitting)), epochs)

    @property
    def trial_epochs(self) -> int:
        """Return the epochs of each trial."""
        return max(1, round(self.epochs / _TRIAL_SHARE))

    @property
    def phases(self) -> list[int]:
        """Return the epochs of each trial and, unless these are as long, of the training that follows."""
        trials = [self.trial_epochs] * len(RATES)
        return trials if self.trial_epochs >= self.epochs else [*trials, self.epochs]
