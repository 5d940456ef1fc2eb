"""Refit a convolution to what it should return, from second moments of the patches that it reads.

The refit of a site (`vbp.method.ridge`) predicts channel from channel, the same at each offset of a kernel. A kernel
reads a patch: of each kept channel the values at all its offsets, and these tell more of what a removed channel has
there. With x such a patch, 1 as its last value, and r = y - W x what the layer lacks of the wanted output y,

    minimise  sum_t |r_t - D x_t|^2  over D,   regularised:   D = B (G + n L)^-1,   G = sum x x', B = sum r x'

after centring, so that the bias is free. L is the diagonal `ridge_penalty`. n patches say little of d coefficients an
output: where there are few, L is larger, at least d / n of the variances (as `ChannelCovariance.ridge`). Images that
are held out say whether D helps, from their moments alone:

    sum |r - D x|^2 = sum |r|^2 - 2 tr(D B') + tr(D G D')

Memory: d^2 values of 8 bytes for each of both moments, d = channels times kernel size: 170 MB for 512 channels and
3x3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vbp.method.ridge import cholesky, ridge_penalty

# Shares of the variances by which a fit is regularised, in multiples of the least; held-out images choose.
_PENALTIES = (1.0, 10.0)


@dataclass(frozen=True)
class PatchMoments:
    """Hold sums over `count` patches, float64: of x x', of r x', of |r|^2, and of the outputs and their squares.

    x has a 1 as its last value.
    """

    count: Float[Tensor, ""]
    patches: Float[Tensor, "patch_and_one patch_and_one"]
    residuals: Float[Tensor, "out patch_and_one"]
    squares: Float[Tensor, ""]
    outputs: Float[Tensor, "out"]
    energy: Float[Tensor, ""]

    @classmethod
    def zero(cls, weight: Float[Tensor, "out patch_and_one"]) -> PatchMoments:
        """Return the sums over no patch, for a layer of this weight."""
        out, size = weight.shape
        shapes: tuple[tuple[int, ...], ...] = ((), (size, size), (out, size), (), (out,), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=weight.device) for shape in shapes))

    @classmethod
    def of(
        cls,
        patches: Float[Tensor, "count patch"],
        outputs: Float[Tensor, "count out"],
        weight: Float[Tensor, "out patch_and_one"],
    ) -> PatchMoments:
        """Take the sums over some patches, and over what the layer should return there."""
        read = F.pad(patches, (0, 1), value=1.0)
        residuals = outputs - read @ weight.T.to(read.dtype)
        sums = read.T @ read, residuals.T @ read, residuals.square().sum(), outputs.sum(0), outputs.square().sum()
        count = torch.tensor(len(patches), dtype=torch.float64, device=patches.device)
        return cls(count, *(one.double() for one in sums))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return all sums."""
        return self.count, self.patches, self.residuals, self.squares, self.outputs, self.energy

    def add_(self, other: PatchMoments) -> None:
        """Add the sums over other patches, in place."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.add_(theirs)

    def error(self, change: Float[Tensor, "out patch_and_one"] | None = None) -> float:
        """Return the squared error with a change of the layer, as a share of the output's variance."""
        left = self.squares
        if change is not None:
            left = left - 2 * (change * self.residuals).sum() + ((change @ self.patches) * change).sum()
        variance = self.energy - self.outputs.square().sum() / self.count.clamp_min(1)
        return max(0.0, float(left)) / max(float(variance), torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class PatchFit:
    """Hold what is to be added to a layer's weights, its bias as the last column, and the held-out error with it.

    None if no change lowers the error; `after` is then `before`.
    """

    change: Float[Tensor, "out patch_and_one"] | None
    before: float
    after: float

    def to(self, device: torch.device | str) -> PatchFit:
        """Move to another device."""
        return PatchFit(None if self.change is None else self.change.to(device), self.before, self.after)


def fit_patches(fitted: PatchMoments, held_out: PatchMoments) -> PatchFit:
    """Return the change of the layer that lowers the error on held-out patches most.

    Raises:
        InputError: The moments are not finite.
    """
    before = held_out.error()
    best = PatchFit(None, before, before)
    size, count = len(fitted.patches) - 1, float(fitted.count)
    if not count or before <= torch.finfo(torch.float32).eps:
        return best
    mean, level = fitted.patches[-1, :-1] / count, fitted.residuals[:, -1] / count
    covariance = fitted.patches[:-1, :-1] / count - torch.outer(mean, mean)
    cross = fitted.residuals[:, :-1] / count - torch.outer(level, mean)
    for times in _PENALTIES:
        ridge = times * size / count
        penalised = covariance.clone()
        penalised.diagonal().add_(ridge * ridge_penalty(covariance, 1.0))
        slope = torch.cholesky_solve(cross.T, cholesky(penalised, ridge)).T
        change = torch.cat([slope, (level - slope @ mean)[:, None]], 1)
        if (error := held_out.error(change)) < best.after:
            best = PatchFit(change, before, error)
    return best
