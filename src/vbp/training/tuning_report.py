"""What tuning without labels did: its epochs, and what became of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vbp.runtime.decode import to_json

# Weights that are compared after an epoch.
Weights = Literal["trained", "averaged", "half way"]


@dataclass(frozen=True)
class TunedEpoch:
    """An epoch of a trial or of the training: mean training loss, and divergences on the held-out images in nats.

    Attributes:
        learning_rate: Peak of the trial or training.
        epoch: Counted from 1.
        epochs: That the trial or training has.
        loss: Mean divergence on the training images.
        divergences: Of the model as trained, of the moving average of its weights, and of weights half way from the
            pruned model to that average.
    """

    learning_rate: float
    epoch: int
    epochs: int
    loss: float
    divergences: Mapping[Weights, float]

    @property
    def nearest(self) -> Weights:
        """Return which weights have the smallest divergence."""
        return min(self.divergences, key=self.divergences.__getitem__)

    @property
    def best(self) -> float:
        """Return the smallest divergence."""
        return self.divergences[self.nearest]


@dataclass(frozen=True)
class TuningReport:
    """What tuning did.

    Attributes:
        images: That were trained on.
        held_out: Images that judged.
        before: Mean KL(teacher || model) on the held-out images before, in nats.
        after: Of the model that was kept.
        learning_rate: Its peak learning rate; None if the model stayed as it was.
        epoch: Its epoch; 0 likewise.
        weights: Which of that epoch's weights it has.
        precision: Of the training passes: off, bf16 or fp16.
        rows: All epochs, in their order: those of the trials first.
        peak_before: Most memory in bytes that the process had held before.
        peak: The same when tuning had ended.
    """

    images: int
    held_out: int
    before: float
    after: float
    learning_rate: float | None = None
    epoch: int = 0
    weights: Weights = "trained"
    precision: str = "off"
    rows: tuple[TunedEpoch, ...] = ()
    peak_before: int = 0
    peak: int = 0

    def sentence(self) -> str:
        """Return one line for log and report."""
        judged = f"on {self.held_out} held-out images"
        if self.learning_rate is None:
            nearest = min((row.best for row in self.rows), default=math.inf)
            return (
                f"tuning without labels: no epoch was better than none {judged} (KL {self.before:.4f}, at best "
                f"{nearest:.4f} after training): the pruned model stays as it was"
            )
        weights = {"trained": "", "averaged": ", averaged weights", "half way": ", half way to the averaged weights"}
        return (
            f"tuning without labels: KL {self.before:.4f} -> {self.after:.4f} {judged} (epoch {self.epoch} at peak "
            f"learning rate {self.learning_rate:g}{weights[self.weights]})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, with the sentence."""
        plain: dict[str, Any] = to_json(self)
        return plain | {"sentence": self.sentence()}
