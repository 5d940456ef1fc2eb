"""Which images each batch of each process holds: plain numbers, decided before anything is read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import torch

from vbp.errors import InputError


@dataclass(eq=False)
class PlannedBatches:
    """The `(epoch, index)` keys of each batch of one process.

    In order, the batches are those of a single process, dealt out in turn. Shuffled, `world` processes share
    out each batch of `batch_size * world` images, so that all take the same number of steps.

    The `count` images are ordered by `seed` and `epoch`; the first `start` batches of an epoch are left out.
    """

    count: int
    batch_size: int
    _: KW_ONLY
    shuffle: bool
    seed: int
    rank: int = 0
    world: int = 1
    epoch: int = 0
    start: int = 0

    @property
    def steps(self) -> int:
        """Return how many batches the process with most has."""
        whole, rest = divmod(self.count, self.batch_size * self.world)
        # A process without an image would wait for the others in vain: a rest too small for all is left out.
        return whole + (rest >= self.world if self.shuffle else rest > 0)

    def __len__(self) -> int:
        return (
            self.steps if self.shuffle else len(range(self.rank, math.ceil(self.count / self.batch_size), self.world))
        )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch  # an epoch under way keeps its number
        batches = range(self.start, len(self))
        if not self.shuffle:
            for batch in batches:
                first = (batch * self.world + self.rank) * self.batch_size
                yield [(epoch, index) for index in range(first, min(first + self.batch_size, self.count))]
            return
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        order = torch.randperm(self.count, generator=generator)
        together = self.batch_size * self.world
        for batch in batches:
            share: Sequence[int] = order[batch * together : (batch + 1) * together][self.rank :: self.world].tolist()
            yield [(epoch, index) for index in share]

    def global_size(self, batch: int) -> int:
        """Return how many images batch number `batch`, counted from 0, has over all processes."""
        if not 0 <= batch < self.steps:
            raise InputError(f"batch must be a number from 0 to {self.steps - 1}, got {batch}")
        together = self.batch_size * self.world
        return min(together, self.count - batch * together)


def mixed_seed(*numbers: int) -> int:
    """Return one seed from several numbers: a sum would give one image in one epoch its neighbour's in the next."""
    text = ",".join(map(str, numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
