"""Count n, mean m and scatter matrix S of a site's channels: exact to merge, in any order and grouping.

S = sum (x - m)(x - m)',    S_ab = S_a + S_b + n_a n_b / (n_a + n_b) (m_b - m_a)(m_b - m_a)'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vbp.errors import InputError

# Values handled at a time: bounds the copy that is centred, and the length of a sum in the values' own precision.
CPU_CHUNK = 2**22
GPU_CHUNK = 2**25

# Columns multiplied at a time, of at most so many blocks: a product of a matrix with itself is needed on one side of
# its diagonal alone. Smaller blocks waste less on the other side; many small ones lose that again.
LEAST_BLOCK, MOST_BLOCKS = 128, 12


@dataclass(frozen=True)
class ChannelCovariance:
    """Hold second moments of `count` samples of all channels together, float64.

    A sample is an image's token or position; `m2` is the sum of products of deviations from the mean, symmetric.
    """

    count: int
    mean: Float[Tensor, "hidden"]
    m2: Float[Tensor, "hidden hidden"]

    @property
    def covariance(self) -> Float[Tensor, "hidden hidden"]:
        """Return the unbiased covariance, `m2 / (count - 1)`.

        Raises:
            InputError: There are fewer than two samples.
        """
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 samples, got {self.count}; give more images or tokens")
        return self.m2 / (self.count - 1)

    def ridge(self, least: float, groups: int = 1) -> float:
        """Return the penalty of a regression on all channels of a group, as a share of each one's variance.

        It is channels over samples, where that is above `least`, and at most 1. With few samples for so many channels
        some combinations of channels hardly vary in them, by chance, and a regression on these follows the chance:
        with a true noise as large as the signal, spread evenly over the channels, the least error on new samples is
        that with this penalty.

        Source: Hoerl, Kennard, Baldwin (1975), the ridge constant, for a ratio of signal to noise of 1.
        """
        return max(least, min(1.0, len(self.mean) / (groups * self.count)))

    def merge(self, other: ChannelCovariance) -> ChannelCovariance:
        """Return the second moments of both sets of samples together.

        Source: Chan, Golub, LeVeque (1979), the parallel update, for vectors.
        """
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        # As an outer product it stays symmetric to the last bit.
        m2 = torch.outer(delta, delta).mul_(self.count * other.count / count).add_(self.m2).add_(other.m2)
        return ChannelCovariance(count, mean, m2)

    def to(self, device: torch.device | str) -> ChannelCovariance:
        """Move to another device."""
        return ChannelCovariance(self.count, self.mean.to(device), self.m2.to(device))

    def packed(self) -> Float[Tensor, "pairs"]:
        """Return the upper triangle of `m2`, row by row: half the size, nothing lost."""
        return torch.cat([row[index:] for index, row in enumerate(self.m2)])

    @staticmethod
    def unpacked(count: int, mean: Float[Tensor, "hidden"], packed: Float[Tensor, "pairs"]) -> ChannelCovariance:
        """Undo `packed`."""
        hidden = len(mean)
        m2 = packed.new_empty(hidden, hidden)
        start = 0
        for index in range(hidden):
            stop = start + hidden - index
            m2[index, index:] = m2[index:, index] = packed[start:stop]
            start = stop
        return ChannelCovariance(count, mean, m2)


class RunningCovariance:
    """Keep running second moments, updated in place and without synchronising with the device.

    Each piece of the values is centred and multiplied in its own precision (half precision in float32), and added
    in float64, on and above the diagonal. The step between the means of two pieces joins the product as one more row,
    so that a piece costs one product and one sum over little more than half of hidden x hidden values.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Float[Tensor, "hidden"] | None = None
        self.m2: Float[Tensor, "hidden hidden"] | None = None

    def add_(self, rows: Float[Tensor, "samples hidden"]) -> None:
        """Take in samples."""
        values = rows.detach()
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        chunk = max(2, (CPU_CHUNK if values.device.type == "cpu" else GPU_CHUNK) // values.shape[1])
        for start in range(0, len(values), chunk):
            self._add_piece_(values[start : start + chunk])

    def finish(self) -> ChannelCovariance | None:
        """Return the moments so far, None before the first sample, and begin anew."""
        count, mean, m2 = self.count, self.mean, self.m2
        self.count, self.mean, self.m2 = 0, None, None
        if mean is None or m2 is None:
            return None
        # Below the diagonal the running sum is not kept up.
        return ChannelCovariance(count, mean, m2.triu_().add_(m2.triu(1).T))

    def _add_piece_(self, piece: Float[Tensor, "samples hidden"]) -> None:
        seen = piece.shape[0]
        near = piece.mean(0)
        centred = piece.new_empty(seen + 1, piece.shape[1])
        deviation = torch.sub(piece, near, out=centred[:seen])
        # A second time: the first mean is off by its rounding, which is much where the mean is far from zero.
        offset = deviation.mean(0)
        deviation -= offset
        mean = near.double() + offset.double()
        if self.mean is None or self.m2 is None:
            self.mean, step = mean, torch.zeros_like(mean)
            self.m2 = mean.new_zeros(len(mean), len(mean))
        else:
            step = mean - self.mean
        centred[seen] = step * (self.count * seen / (self.count + seen)) ** 0.5
        with torch.autocast(piece.device.type, enabled=False):
            block = max(LEAST_BLOCK, -(-len(mean) // MOST_BLOCKS))
            for start in range(0, len(mean), block):
                stop = start + block
                self.m2[start:stop, start:] += centred[:, start:stop].T @ centred[:, start:]
        self.mean += step * (seen / (self.count + seen))
        self.count += seen


def covariance_bytes(widths: Sequence[int]) -> int:
    """Return the memory that the running sums of sites of these widths take, in bytes, on the device.

    During the pass one more product in the model's precision exists at a time; a file holds half of it.
    """
    return sum(8 * (width * width + width) for width in widths)
