"""The module that is exported: float32 images in, float32 logits out, whatever the precision between."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.evaluation import logits_of


class Portable(nn.Module):
    """A classifier whose file is used alike for every model and precision.

    Args:
        model: Copied, in evaluation mode on the CPU; left as it was.
        dtype: Of the weights and of all that is computed.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().to(dtype)
        self.dtype = dtype
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Give the logits of a batch."""
        return logits_of(self.model(images.to(self.dtype))).float()


def tracing_example(images: Tensor) -> Tensor:
    """Give a batch to trace with: a batch of one would be taken for a constant."""
    return images[:1].repeat(2, *(1 for _ in images.shape[1:]))
