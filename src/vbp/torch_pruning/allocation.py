"""Share a number of channels to remove among layers, in units of one or several channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vbp.allocation import Bounds, global_counts


@dataclass(frozen=True, eq=False)
class Stack:
    """Units of one layer that may go.

    Attributes:
        scores: One a unit; the lowest go first.
        width: Channels in each unit.
        removable: Units that may go at most.
        step: A layer that loses units keeps a multiple of this many.
    """

    scores: Float[Tensor, "units"]
    width: int = 1
    removable: int = 0
    step: int = 1

    def bounds(self) -> Bounds:
        """Give the channel counts that the layer may have: all, then multiples of the step down to its floor."""
        units = len(self.scores)
        least = max(units - self.removable, self.step)
        multiples = range(units // self.step * self.step, least - 1, -self.step)
        return Bounds(tuple(count * self.width for count in (units, *(m for m in multiples if m != units))))


def allocate(stacks: Sequence[Stack], budget: int) -> tuple[list[Int[Tensor, "gone"]], int]:
    """Choose the units to remove: the lowest scores over all stacks, `budget` channels in total.

    Equal scores go in the order of the stacks, then of the units. Where steps, widths or floors make the number
    unreachable, the nearest one is taken, the smaller of two that are as near.

    Returns:
        Indices of the units that go, ascending, for each stack; and the number of channels they hold.
    """
    orders = [torch.argsort(stack.scores, stable=True) for stack in stacks]
    scores = [
        stack.scores.double()[order].repeat_interleave(stack.width).numpy()
        for stack, order in zip(stacks, orders, strict=True)
    ]
    total = sum(len(channels) for channels in scores)
    kept = global_counts(scores, [stack.bounds() for stack in stacks], total - max(budget, 0))
    chosen = [
        order[: len(stack.scores) - count // stack.width].sort().values
        for stack, order, count in zip(stacks, orders, kept, strict=True)
    ]
    return chosen, total - sum(kept)
