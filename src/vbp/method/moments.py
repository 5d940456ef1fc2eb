"""Count n, mean m and squared deviation s of every channel: exact to merge, in any order and grouping.

s = sum (x - m)^2,    s_ab = s_a + s_b + n_a n_b / (n_a + n_b) (m_b - m_a)^2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vbp.errors import InputError

# Values handled at a time: small enough to stay in a CPU's caches, since the pass over the data
# reads each value three times; a GPU wants large pieces instead.
CPU_CHUNK = 2**18
GPU_CHUNK = 2**25


@dataclass(frozen=True)
class ChannelMoments:
    """Hold moments of `count` samples of each channel, float64; `m2` sums the squared deviations from the mean."""

    count: int
    mean: Float[Tensor, "hidden"]
    m2: Float[Tensor, "hidden"]

    @property
    def variance(self) -> Float[Tensor, "hidden"]:
        """Return the unbiased variance, `m2 / (count - 1)`; needs two samples.

        Source: VBP paper, section 3.1.
        """
        if self.count < 2:
            raise InputError(f"a variance needs at least 2 samples, got {self.count}; give more images")
        return self.m2 / (self.count - 1)

    @property
    def second_moment(self) -> Float[Tensor, "hidden"]:
        """Return the mean square of each channel."""
        return self.m2 / self.count + self.mean.square()

    def merge(self, other: ChannelMoments) -> ChannelMoments:
        """Return the moments of both sets of samples together.

        Source: Chan, Golub, LeVeque (1979), the parallel update.
        """
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        return ChannelMoments(count, mean, m2)

    def to(self, device: torch.device | str) -> ChannelMoments:
        """Move to another device."""
        return ChannelMoments(self.count, self.mean.to(device), self.m2.to(device))


class RunningMoments:
    """Keep the moments of all values seen so far; None before the first."""

    def __init__(self) -> None:
        self.moments: ChannelMoments | None = None

    def add_(self, values: Float[Tensor, "... hidden"]) -> None:
        """Take in values, channels last."""
        seen = self.moments
        batch = channel_moments(values, None if seen is None else seen.mean)
        self.moments = batch if seen is None else seen.merge(batch)


def channel_moments(
    values: Float[Tensor, "... hidden"], shift: Float[Tensor, "hidden"] | None = None
) -> ChannelMoments:
    """Compute the moments of one batch, without synchronising with the device.

    Half precision is summed in float32, float64 stays float64. The values are summed after subtraction of `shift`, by
    default the mean of their first piece, which costs no accuracy as long as it lies near the mean (within some
    standard deviations): `E[x^2] - E[x]^2` in float32 returns a variance of 0.0 where the mean is 100 and the true
    variance 1e-4.
    """
    rows = values.detach().reshape(-1, values.shape[-1])
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    hidden = rows.shape[1]
    chunk = max(1, (CPU_CHUNK if rows.device.type == "cpu" else GPU_CHUNK) // hidden)
    near = rows[:chunk].mean(0) if shift is None else shift.to(rows.dtype)
    total = torch.zeros(hidden, dtype=torch.float64, device=rows.device)
    squares = torch.zeros_like(total)
    buffer = torch.empty_like(rows[:chunk], memory_format=torch.contiguous_format)
    for start in range(0, rows.shape[0], chunk):
        piece = rows[start : start + chunk]
        # One buffer for all pieces: fresh memory for each would cost more than the arithmetic.
        deviation = torch.sub(piece, near, out=buffer[: piece.shape[0]])
        total += deviation.sum(0)
        squares += deviation.square_().sum(0)
    count = rows.shape[0]
    offset = total / count
    # Rounding can leave a constant channel slightly below zero.
    m2 = (squares - offset * total).clamp_min_(0)
    return ChannelMoments(count, near.double() + offset, m2)
