"""How far the logits of an exported file lie from those of the model that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

_BATCH = 32


@dataclass(frozen=True)
class Parity:
    """What differs between a file and its model, over some images.

    Attributes:
        images: How many were compared.
        max_abs_error: Greatest difference of two logits.
        relative_error: The same as a share of the model's greatest logit (by amount).
        top1_agreement: Share of the images with the same class first, in [0, 1].
    """

    images: int
    max_abs_error: float
    relative_error: float
    top1_agreement: float


def measure_parity(
    model: nn.Module, exported: nn.Module, images: Float[Tensor, "images channels height width"]
) -> Parity:
    """Run both over the images: the first one alone, the others in batches, so that the batch is seen to be free."""
    with torch.inference_mode():
        expected = torch.cat([model(batch) for batch in _batches(images)])
        found = torch.cat([exported(batch) for batch in _batches(images)])
    return compare_logits(expected, found)


def compare_logits(expected: Float[Tensor, "images classes"], found: Float[Tensor, "images classes"]) -> Parity:
    """Compare what a file gives with what was expected; a value that is not finite makes both errors NaN."""
    error = float((expected.double() - found.double()).abs().max())
    scale = float(expected.double().abs().max())
    error = error if bool(found.isfinite().all()) else float("nan")
    agreement = float((expected.argmax(1) == found.argmax(1)).double().mean())
    # Logits that are all zero have no scale: any difference is then infinitely large.
    relative = error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))
    return Parity(len(expected), error, relative, agreement)


def _batches(images: Tensor) -> Iterator[Tensor]:
    yield images[:1]
    yield from torch.split(images[1:], _BATCH)
