"""Judge pruned models by labelled images: right answers, the dense model's answers, and the divergence from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Verdict:
    """What a model's answers are worth.

    Attributes:
        right: Whether the answer is right, for each image at each of its places.
        relative: Right answers over the dense model's.
        agreement: Share of the answers that are the dense model's class.
        divergence: Mean KL(dense || pruned).
    """

    right: Tensor
    relative: float
    agreement: float
    divergence: float


def places(pixels: Tensor, shift: int) -> Iterator[Tensor]:
    """Return images without their borders of `shift` pixels, and eight shifts by as much; the middle first.

    Args:
        pixels: Images with borders.
        shift: 0 gives the images themselves, once.
    """
    height, width = pixels.shape[-2] - 2 * shift, pixels.shape[-1] - 2 * shift
    corners = itertools.product(sorted({shift, 0, 2 * shift}), repeat=2)
    for top, left in sorted(corners, key=lambda corner: corner != (shift, shift)):
        yield pixels[..., top : top + height, left : left + width]


class Judge:
    """Labelled images, and what the dense model says of them."""

    def __init__(self, dense: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], *, shift: int = 0) -> None:
        """Run the dense model.

        Args:
            dense: On its device.
            batches: Images and labels; with borders where they are shifted.
            shift: See `places`.
        """
        self._batches, self._shift = batches, shift
        self.labels = torch.cat([labels for _, labels in batches])
        self._dense = self._logits(dense)
        self.right = self._right(self._dense)
        self.accuracy = float(self.right.double().mean())

    def __call__(self, model: nn.Module) -> Verdict:
        """Judge a model."""
        logits = self._logits(model)
        right = self._right(logits)
        divergence = F.kl_div(logits.log_softmax(-1), self._dense.log_softmax(-1), log_target=True, reduction="sum")
        return Verdict(
            right,
            float(right.double().mean()) / self.accuracy,
            float((logits.argmax(-1) == self._dense.argmax(-1)).double().mean()),
            float(divergence) / right.numel(),
        )

    def difference(self, ours: Verdict, theirs: Verdict) -> tuple[float, float]:
        """Return how far our relative top-1 is above theirs, and the standard error of that, paired by image.

        The places of one image are not independent, so the images are what is counted.
        """
        paired = (ours.right.double() - theirs.right.double()).mean(1) / self.accuracy
        return float(paired.mean()), float(paired.std()) / math.sqrt(len(paired))

    def _logits(self, model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        with torch.inference_mode():
            return torch.cat([
                torch.stack([model(one.to(device)).cpu() for one in places(pixels, self._shift)], dim=1)
                for pixels, _ in self._batches
            ])  # fmt: skip

    def _right(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1) == self.labels[:, None]
