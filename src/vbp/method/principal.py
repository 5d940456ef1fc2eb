"""Bases of an attention's heads in which variance tells what a direction is worth: tensor functions, in float64.

In a head nothing elementwise stands between the layers of queries, keys and values and the softmax, and none between
the values and the projection that reads them. With q, k, v of one head and W its columns of the projection,

    q -> A q,  k -> B k  with  A'B = I    changes no logit q'k, and
    v -> C v,  W -> D    with  D C = W    changes no output W v:

rotate first, then remove the directions of least variance.

Queries and keys. What is added to all keys of an image the softmax does not see. So with Sq = E[q q'] and
Sk = E[(k - kbar)(k - kbar)'], kbar the mean of the image's keys, and the eigenvectors V of Sk^1/2 Sq Sk^1/2,

    A = V' Sk^1/2,    B = V' Sk^-1/2,    in which E[q q'] = diag(s^2) and E[(k - kbar)(k - kbar)'] = I.

Over independent pairs of a query and a key, the squared error of the logits without direction i is s_i^2, and no
other r directions leave less than the first r (Eckart-Young, for Sq^1/2 Sk^1/2 has the singular values s).

Values. With W = Q R (Q orthonormal) and the eigenvectors E of R Cov[o] R', o what the projection reads,

    C = E'R,    D = Q E:    the principal components of what the head adds to the output.

Scales of the directions are free: they are chosen so that both sides are about as large as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Share of the mean variance of keys that joins it in every direction: so the inverse root exists in any case, and
# loses five digits of sixteen at most.
_FLOOR = 1e-10


@dataclass(frozen=True)
class QueryKeyBasis:
    """Hold for each head the changes of queries and keys, and the lost logits' squares by direction, descending."""

    query: Float[Tensor, "heads size size"]
    key: Float[Tensor, "heads size size"]
    cost: Float[Tensor, "heads size"]


@dataclass(frozen=True)
class ValueBasis:
    """Hold for each head the change of values, the columns that read them, and the lost variance, descending."""

    value: Float[Tensor, "heads size size"]
    columns: Float[Tensor, "heads out size"]
    cost: Float[Tensor, "heads size"]


def query_key_basis(query: Float[Tensor, "heads size size"], key: Float[Tensor, "heads size size"]) -> QueryKeyBasis:
    """Return the basis in which the first directions keep most of the logits.

    Args:
        query: Second moments of the queries, about zero.
        key: Second moments of the keys, about the mean of their image.

    Returns:
        Changes of basis whose product is the identity, also where the moments have no full rank.
    """
    moment, keys = query.double(), key.double()
    size = keys.shape[-1]
    typical = keys.diagonal(dim1=-2, dim2=-1).mean(-1)
    floor = _FLOOR * torch.where(typical > 0, typical, torch.ones_like(typical))
    values, vectors = torch.linalg.eigh(keys + floor[:, None, None] * torch.eye(size).to(keys))
    # Rounding leaves the variance of a direction without any somewhat above or below zero.
    deviations = values.clamp_min(floor[:, None]).sqrt()
    root = (vectors * deviations[:, None]) @ vectors.mT
    inverse = (vectors / deviations[:, None]) @ vectors.mT
    cost, directions = _descending(root @ moment @ root)
    left, right = directions.mT @ root, directions.mT @ inverse
    balance = (right.norm(dim=-1, keepdim=True) / left.norm(dim=-1, keepdim=True)).sqrt()
    return QueryKeyBasis(left * balance, right / balance, cost)


def value_basis(
    covariance: Float[Tensor, "heads size size"],
    weight: Float[Tensor, "heads out size"],
) -> ValueBasis:
    """Return the basis in which the first directions keep most of what each head adds to the output.

    Args:
        covariance: Of the mixed values, where the projection reads them.
        weight: The projection's columns of each head.

    Returns:
        A change and columns whose product is `weight`, whatever its rank.
    """
    columns, spread = weight.double(), covariance.double()
    orthonormal, triangle = torch.linalg.qr(columns)
    cost, directions = _descending(triangle @ spread @ triangle.mT)
    change, read = directions.mT @ triangle, orthonormal @ directions
    norm = change.norm(dim=-1)
    scale = torch.where(norm > 0, norm, torch.ones_like(norm))
    change, read = change / scale[..., None], read * scale[..., None, :]
    missing = covariance.shape[-1] - change.shape[-2]  # a projection with fewer outputs than a head has values
    if missing > 0:
        change = torch.cat([change, change.new_zeros(len(change), missing, change.shape[-1])], -2)
        read = torch.cat([read, read.new_zeros(*read.shape[:2], missing)], -1)
        cost = torch.cat([cost, cost.new_zeros(len(cost), missing)], -1)
    return ValueBasis(change, read, cost)


def head_blocks(matrix: Float[Tensor, "hidden hidden"], heads: int) -> Float[Tensor, "heads size size"]:
    """Return the blocks on the diagonal, one a head."""
    size = len(matrix) // heads
    return matrix.reshape(heads, size, heads, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _descending(matrix: Float[Tensor, "heads n n"]) -> tuple[Float[Tensor, "heads n"], Float[Tensor, "heads n n"]]:
    """Return the eigenvalues of symmetric matrices, the largest first and none below zero, and their vectors."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)
