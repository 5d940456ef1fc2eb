"""Share a number of channels to remove among layers: exact, with floors and steps. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


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

    def chunk_sizes(self) -> list[int]:
        """Give the numbers of units that go together, in order: first what is over a multiple of the step."""
        units = len(self.scores)
        odd, most = units % self.step, min(self.removable, units - self.step)
        sizes, gone = [], 0
        for size in ([odd] if odd else []) + [self.step] * (units // self.step):
            if gone + size > most:
                break
            sizes.append(size)
            gone += size
        return sizes


def allocate(stacks: Sequence[Stack], budget: int) -> tuple[list[Int[Tensor, "gone"]], int]:
    """Choose the units to remove: the lowest scores over all stacks, `budget` channels in total.

    Equal scores go in the order of the stacks, then of the units. Where steps, widths or floors make the number
    unreachable, the nearest number that the order reaches is taken, the smaller of two that are as near.

    Returns:
        Indices of the units that go, ascending, for each stack; and the number of channels they hold.
    """
    orders = [torch.argsort(stack.scores, stable=True) for stack in stacks]
    sizes = [stack.chunk_sizes() for stack in stacks]
    scores = [
        score
        for stack, order, parts in zip(stacks, orders, sizes, strict=True)
        for score in _means(stack, order, parts)
    ]
    owners = [index for index, parts in enumerate(sizes) for _ in parts]
    taken, remaining = [0] * len(stacks), budget
    closed: dict[int, int] = {}  # stack -> channels of its next chunk, which no longer fits
    for chunk in torch.argsort(torch.tensor(scores, dtype=torch.float64), stable=True).tolist():
        owner = owners[chunk]
        if remaining <= 0:
            break
        if owner in closed:
            continue
        channels = sizes[owner][taken[owner]] * stacks[owner].width
        if channels <= remaining:
            taken[owner] += 1
            remaining -= channels
        else:
            closed[owner] = channels
    if remaining > 0 and closed:
        nearest = min(closed, key=lambda owner: closed[owner])
        if closed[nearest] < 2 * remaining:
            taken[nearest] += 1
            remaining -= closed[nearest]
    counts = [sum(parts[:number]) for parts, number in zip(sizes, taken, strict=True)]
    chosen = [order[:count].sort().values for order, count in zip(orders, counts, strict=True)]
    return chosen, sum(count * stack.width for count, stack in zip(counts, stacks, strict=True))


def _means(stack: Stack, order: Tensor, sizes: Sequence[int]) -> list[float]:
    """Give the mean score of each chunk."""
    ranked = stack.scores.double()[order]
    if all(size == 1 for size in sizes):
        return ranked[: len(sizes)].tolist()
    return [float(part.mean()) for part in torch.split(ranked[: sum(sizes)], list(sizes))] if sizes else []
