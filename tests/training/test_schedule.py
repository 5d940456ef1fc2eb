"""The learning rate of each step, against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vbp import InputError
from vbp.training.optim import make_schedule


def rates(steps: int, warmup_steps: int, extra: int = 0) -> list[float]:
    """Return the rate of each step, and after the last."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5)
    schedule = make_schedule(optimizer, steps, warmup_steps)
    found = []
    for _ in range(steps + 1 + extra):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (7, 0), (7, 1), (7, 3), (7, 6)])
def test_a_line_up_and_a_cosine_down(steps: int, warmup_steps: int) -> None:
    up = [0.5 * (step + 1) / (warmup_steps + 1) for step in range(warmup_steps)]
    left = steps - warmup_steps
    down = [0.5 * (1 + math.cos(math.pi * step / left)) / 2 for step in range(left + 1)]
    assert rates(steps, warmup_steps) == pytest.approx(up + down, rel=1e-12, abs=1e-16)


def test_after_the_end_the_rate_stays_at_0() -> None:
    assert rates(4, 2, extra=3)[4:] == pytest.approx([0.0] * 4, abs=1e-16)


@pytest.mark.parametrize(("steps", "warmup_steps"), [(4, 4), (4, 5), (0, 1), (4, -1)])
def test_a_warm_up_without_end_is_named(steps: int, warmup_steps: int) -> None:
    with pytest.raises(InputError, match=f"got {warmup_steps} warm-up steps of {steps}; lower --warmup_epochs"):
        rates(steps, warmup_steps)
