"""Loss, accuracy and gradient norm of an epoch: sums that stay on the device, added up over all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbp.errors import InputError
from vbp.runtime.processes import Processes

_LOSS, _CORRECT, _IMAGES, _NORM, _NORMS = range(5)


@dataclass(frozen=True)
class EpochResult:
    """Loss, accuracy and speed of one epoch of training, on all processes together.

    Attributes:
        learning_rate: At the epoch's first step.
        seconds: Of training, on this process.
        gradient_norm: Mean over the steps, before clipping; None unless it was asked for.
        skipped_steps: Steps since the first epoch that changed nothing, as fp16 could not hold their gradients.
    """

    epoch: int
    loss: float
    top1: float
    learning_rate: float
    images: int
    seconds: float
    gradient_norm: float | None = None
    skipped_steps: int = 0

    @property
    def images_per_second(self) -> float:
        """Return the speed of all processes together."""
        return self.images / self.seconds


def steps_per_epoch(batches: int, accumulate: int = 1) -> int:
    """Return the steps of the optimizer; the last one may have fewer batches."""
    return math.ceil(batches / accumulate)


class DivergedError(InputError):
    """Training went wrong: its loss is no finite number any more."""


class EpochMeter:
    """Sums over the images and steps of this process; reading them in the loop would make a GPU wait."""

    def __init__(self, device: torch.device) -> None:
        self.learning_rate = 0.0
        self.seconds = 0.0
        self._values = torch.zeros(5, dtype=torch.float64, device=device)

    def begin(self, learning_rate: float) -> None:
        """Start an epoch."""
        self.learning_rate, self.seconds = learning_rate, 0.0
        self._values.zero_()

    def add(self, loss: Tensor, logits: Tensor | None, labels: Tensor) -> None:
        """Count a batch; of mixed images the class with the largest share counts as right; without logits none."""
        right = labels.argmax(1) if labels.is_floating_point() else labels
        count = len(labels)
        self._values[_LOSS] += loss.detach().double() * count
        if logits is not None:
            self._values[_CORRECT] += (logits.detach().argmax(1) == right).sum()
        self._values[_IMAGES] += count

    def add_norm(self, norm: Tensor) -> None:
        """Count the gradient of a step; one that fp16 could not hold is left out, as its step is."""
        finite = norm.isfinite()
        self._values[_NORM] += norm.where(finite, torch.zeros_like(norm))
        self._values[_NORMS] += finite

    def result(self, epoch: int, processes: Processes, skipped_steps: int) -> EpochResult:
        """Add up the sums of all processes, which leaves them as they are."""
        loss, correct, images, norm, norms = processes.all_reduce_sum_(self._values.clone()).tolist()
        if images == 0:
            raise InputError("fine-tuning needs at least one image, got none; check the training images")
        if not math.isfinite(loss):
            raise DivergedError(
                f"fine-tuning diverged: the loss of epoch {epoch} is {loss} at a learning rate of "
                f"{self.learning_rate:.3g}; lower --lr_ft; the checkpoints written so far are whole"
            )
        return EpochResult(
            epoch,
            loss / images,
            100 * correct / images,
            self.learning_rate,
            int(images),
            self.seconds,
            norm / norms if norms else None,
            skipped_steps,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` reads."""
        return {"sums": self._values.cpu().clone(), "seconds": self.seconds, "learning_rate": self.learning_rate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where the state was taken."""
        self._values.copy_(state["sums"])
        self.seconds, self.learning_rate = state["seconds"], state["learning_rate"]
