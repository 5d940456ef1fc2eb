"""Two processes as threads of one, which wait for each other."""

from __future__ import annotations

from threading import Barrier
from typing import Any

from torch import Tensor

from vbp.runtime.processes import Processes


class Pair(Processes):
    """One of two processes.

    Args:
        rank: Which.
        barrier: Of two parties; both processes have the same.
        slots: Two places for what they tell each other; the same list.
    """

    def __init__(self, rank: int, barrier: Barrier, slots: list[Any]) -> None:
        super().__init__(rank=rank, world=2)
        object.__setattr__(self, "meet", (barrier, slots))

    def all_gather(self, value: Any) -> list[Any]:
        """Return both values to both."""
        barrier, slots = self.meet
        slots[self.rank] = value
        barrier.wait(60)
        found = list(slots)
        barrier.wait(60)
        return found

    def all_reduce_sum_(self, values: Tensor) -> Tensor:
        """Add up over both, in the order of ranks."""
        first, second = self.all_gather(values.clone())
        return values.copy_(first + second)
