"""Refit the queries that stay so that they compensate removed query/key channels: tensor functions, in float64.

A logit is the sum over channels of q[j] k[j]. What goes of it, q_P . k_P, is replaced by the product of the two
predictions from what stays in the head (see `vbp.method.ridge`): with A for queries and B for keys,

    (mu_P + A (q_S - mu_S)) . B k_S,  so  q_S becomes  q_S + B' (mu_P + A (q_S - mu_S)).

Keys need no constant: what is added to all keys of an image adds the same to all logits of a query, and the softmax
does not see it. So keys are taken about the mean of their image, and the whole is linear in q_S: it goes into the
query layer's rows.

If queries and keys are drawn independently, in pairs, this is the least-squares fit of the lost part by all products
of a query and a key channel, but for the ridge. The pairs that meet in one image are not independent, so it is exact
for what the two covariances know. There it is never worse than nothing: with G and H the projections (shrunk by the
ridge, so symmetric with eigenvalues from 0 to 1) on queries and keys, the error is that of I - G x H, which has
eigenvalues from 0 to 1 too.

Source: CORP fits the logits by ridge regression over all products of channels; the separable form is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vbp.method.ridge import Reconstruction, block_diagonal, ridge_coefficients


@dataclass(frozen=True)
class LogitRefit:
    """Hold what becomes of the kept queries, `q <- q + turn q + shift`, and the errors of the logits.

    The errors are variances over the keys, mean over the queries, summed over heads, before the softmax's scale.
    """

    turn: Float[Tensor, "kept kept"]
    shift: Float[Tensor, "kept"]
    error: Reconstruction


def logit_refit(
    site: str,
    query: Float[Tensor, "hidden hidden"],
    mean: Float[Tensor, "hidden"],
    key: Float[Tensor, "hidden hidden"],
    keep: Int[Tensor, "kept"],
    removed: Int[Tensor, "removed"],
    *,
    heads: int,
    ridge: float,
) -> LogitRefit:
    """Fit the kept queries of each head; indices of channels are counted over all heads.

    For a query layer without bias, which can add no constant, `query` is the second moment about zero and `mean`
    zero.

    Raises:
        InputError: A covariance is unfit.
    """
    q, k = block_diagonal(query.double(), heads), block_diagonal(key.double(), heads)
    mu = mean.to(q)
    a, b = ridge_coefficients(q, keep, removed, ridge), ridge_coefficients(k, keep, removed, ridge)
    turn = b.T @ a
    # A head's constant meets the keys of that head alone: `b` is zero between heads.
    shift = b.T @ (mu[removed] - a @ mu[keep])

    constant = block_diagonal(torch.outer(mu, mu), heads)
    lost = _pairs(q + constant, k, removed)
    crossed = constant[removed][:, removed] + q[removed][:, keep] @ a.T
    square = constant[removed][:, removed] + a @ q[keep][:, keep] @ a.T
    refitted = (
        lost
        - 2 * float((crossed * (k[removed][:, keep] @ b.T)).sum())
        + float((square * (b @ k[keep][:, keep] @ b.T)).sum())
    )
    everything = torch.arange(len(mu), device=mu.device)
    return LogitRefit(
        turn, shift, Reconstruction(site, lost, max(0.0, refitted), _pairs(q + constant, k, everything))
    )


def _pairs(query: Tensor, key: Tensor, channels: Tensor) -> float:
    return float((query[channels][:, channels] * key[channels][:, channels]).sum())
