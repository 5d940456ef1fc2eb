"""Predict removed channels from kept ones, and let the consumer do it: pure tensor functions, in float64.

With S the kept and P the removed channels, C their covariance and a diagonal penalty L > 0,

    A = C[P,S] (C[S,S] + L[S])^-1        predicts  h_P = mu_P + A (h_S - mu_S)

and the consumer of h takes the prediction in place of what is gone: `W' = W[:,S] + W[:,P] A` and
`b' = b + W[:,P] (mu_P - A mu_S)`. With A = 0 this is the mean shift.

It is never worse than the mean shift on the samples of C. The error of the prediction has the covariance
R(A) = C[P,P] - A C[S,P] - C[P,S] A' + A C[S,S] A'. Put M = C[S,S] + L and A = C[P,S] M^-1:

    R(0) - R(A) = C[P,S] M^-1 (2 M - C[S,S]) M^-1 C[S,P] = C[P,S] M^-1 (C[S,S] + 2 L) M^-1 C[S,P],

which is positive semidefinite. So the error of every linear reader falls, whatever its weight: tr(W_P R(A) W_P')
<= tr(W_P R(0) W_P'), for any penalty. That holds of a reader of single positions. A kernel over several adds up
errors of neighbouring positions, whose correlation C does not know.

Source: known as OB2C, and as the affine fold of CORP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vbp.errors import InputError
from vbp.method.defaults import RIDGE as RIDGE

# Share of the typical variance that joins each channel's own in its penalty: a channel that varies by rounding alone
# must predict nothing.
_FLOOR = 1e-6


@dataclass(frozen=True)
class Reconstruction:
    """Tell how well a site's consumer does without the removed channels: variances, summed over its outputs.

    `mean_shift` and `refit` are those of the output's error after each, the second never larger but for rounding;
    `energy` is that of the output itself, from all channels. A consumer with a kernel counts each offset by itself.
    """

    site: str
    mean_shift: float
    refit: float
    energy: float


def check_ridge(ridge: float) -> None:
    """Raise InputError if the penalty is out of range."""
    if not 0 < ridge <= 1:
        raise InputError(f"ridge must be in (0, 1], got {ridge}; {RIDGE} is the default")


def ridge_penalty(covariance: Float[Tensor, "hidden hidden"], ridge: float) -> Float[Tensor, "hidden"]:
    """Return the diagonal L that is added to the covariance: a share of each channel's own variance.

    A channel of very large variance so does not regularise the others, as it would if all had the mean variance as
    their penalty. After scaling to unit diagonal, which changes nothing for Cholesky's error, C + L has a condition
    number of at most hidden / ridge + 1, whatever the range of the variances and the rank of C.

    Raises:
        InputError: The ridge is out of range.
    """
    check_ridge(ridge)
    variance = covariance.diagonal().double()
    # The median of those that vary at all: neither very large nor dead channels move it.
    typical = torch.where(variance > 0, variance, torch.nan).nanmedian()
    # If all channels are dead there is nothing to predict, and any penalty will do.
    return ridge * (variance + _FLOOR * torch.where(typical > 0, typical, torch.ones_like(typical)))


def ridge_coefficients(
    covariance: Float[Tensor, "hidden hidden"],
    keep: Int[Tensor, "kept"],
    removed: Int[Tensor, "removed"],
    ridge: float,
) -> Float[Tensor, "removed kept"]:
    """Return the coefficients A that predict the deviation of the removed channels from that of the kept ones.

    A consumer in groups, each of which reads its own channels, takes `block_diagonal` of the covariance.

    Raises:
        InputError: The covariance is not finite or no covariance, or the ridge is too small for its precision.
    """
    cov = covariance.double()
    gram = cov[keep][:, keep]
    gram.diagonal().add_(ridge_penalty(cov, ridge)[keep])
    factor = cholesky(gram, ridge)
    solution: Tensor = torch.cholesky_solve(cov[keep][:, removed], factor)
    return solution.T


def cholesky(matrix: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, "n n"]:
    """Return the lower factor of a penalised covariance.

    Raises:
        InputError: It is not positive definite.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    finite = bool(matrix.isfinite().all())  # the factorisation reads one triangle alone
    if int(info) or not finite:
        what = "is not positive definite" if finite else "has values that are not finite"
        raise InputError(
            f"the covariance must be one of finite samples, got one that {what} with ridge {ridge}; collect the "
            f"statistics again, or raise the ridge ({RIDGE} is the default)"
        )
    return factor


def block_diagonal(covariance: Float[Tensor, "hidden hidden"], groups: int) -> Float[Tensor, "hidden hidden"]:
    """Forget the covariance between channels of different groups, so that none is predicted from another group.

    For a depthwise consumer only the variances are left, nothing is predicted, and the refit is the mean shift:
    its kernel for one channel reads no other channel that could stand in.
    """
    group = torch.arange(len(covariance), device=covariance.device) // (len(covariance) // groups)
    return torch.where(group[:, None] == group, covariance, 0)


def fold_into_weight(
    weight: Float[Tensor, "out hidden *kernel"],
    coefficients: Float[Tensor, "removed kept"],
    keep: Int[Tensor, "kept"],
    removed: Int[Tensor, "removed"],
) -> Float[Tensor, "out kept *kernel"]:
    """Return the consumer's columns of the kept channels, those of the removed ones folded into them, in float64.

    A convolution takes the same coefficients at every offset of its kernel: they tell the channel, not the place.
    """
    columns = weight.detach().double()
    moved = torch.einsum("op...,ps->os...", columns[:, removed], coefficients)
    return columns[:, keep] + moved


def as_matrix(weight: Float[Tensor, "out hidden *kernel"]) -> Float[Tensor, "rows hidden"]:
    """Return a consumer's weight with one row for each output and kernel offset, in float64."""
    return weight.detach().double().movedim(1, -1).flatten(0, -2)


def reconstruction(
    site: str,
    covariance: Float[Tensor, "hidden hidden"],
    weight: Float[Tensor, "out hidden *kernel"],
    coefficients: Float[Tensor, "removed kept"],
    keep: Int[Tensor, "kept"],
    removed: Int[Tensor, "removed"],
) -> Reconstruction:
    """Compute what the consumer's output loses, exactly from the covariance; `weight` is that of all channels."""
    cov, matrix = covariance.double(), as_matrix(weight)
    gone = matrix[:, removed]
    error = torch.zeros_like(matrix)
    error[:, removed] = gone
    error[:, keep] = -gone @ coefficients

    def variance(rows: Tensor, columns: Tensor) -> float:
        # Rounding can leave a perfect prediction slightly below zero.
        return max(0.0, float(((rows @ columns) * rows).sum()))

    return Reconstruction(site, variance(gone, cov[removed][:, removed]), variance(error, cov), variance(matrix, cov))
