"""The learning rate over a run: up in a straight line, down by a cosine."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from vbp.errors import InputError


def make_schedule(optimizer: Optimizer, steps: int, warmup_steps: int = 0) -> LRScheduler:
    """Take the optimizer's rate as the peak: it is reached after the warm-up, and 0 after all steps.

    Step `k` of a warm-up of `w` steps, counted from 0, has `(k + 1) / (w + 1)` of the peak, so that the first step
    after it is the first with the whole.

    Raises:
        InputError: The warm-up takes all steps.

    Source: Loshchilov, Hutter (2017), section 3, without restarts.
    """
    if warmup_steps == 0:
        return CosineAnnealingLR(optimizer, T_max=max(1, steps))
    if not 0 < warmup_steps < steps:
        raise InputError(
            f"the warm-up must end before fine-tuning does, got {warmup_steps} warm-up steps of {steps}; lower "
            "--warmup_epochs"
        )

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / (steps - warmup_steps)))) / 2

    return LambdaLR(optimizer, share)
