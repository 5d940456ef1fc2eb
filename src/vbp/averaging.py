"""A moving average of a model's weights during training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vbp.errors import InputError


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """Set up an exponential moving average of weights and running statistics; it begins after the first step.

    Args:
        model: Copied.
        decay: What remains of the average at each step.

    Raises:
        InputError: The decay is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise InputError(f"ema_decay must be in [0, 1), got {decay}; 0.9998 is usual")
    mix = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(average: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        if average[0].is_floating_point():
            mix(average, current, count)
            return
        # A mean of whole numbers, rounded down, would shift the indices of a Swin by one.
        for mine, other in zip(average, current, strict=True):
            mine.copy_(other)

    averaged = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    averaged.requires_grad_(False)
    return averaged
