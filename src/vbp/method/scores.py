"""Scores of a site's channels: published criteria, for groups of weights in the place of single weights.

A channel's group is a row of one or several matrices w, with the gradients g of the loss:

    magnitude   sum |w|^p, divided by its mean over the site
    LAMP        s_j / sum of all s_k >= s_j in the site, with s = sum w^2
    Taylor      |sum w g|, the change of the loss to first order if the channel vanishes
    SNIP        sum |w g|, the connection sensitivities

A group of several matrices has the sum of their scores.

Source: Li et al. (2017), for L1; Lee et al. (2021), Layer-Adaptive Magnitude-based Pruning; Molchanov et al. (2019),
Importance Estimation for Neural Network Pruning; Lee et al. (2019), SNIP.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def magnitude(weight: Float[Tensor, "hidden rest"], power: int) -> Float[Tensor, "hidden"]:
    """Return `sum |w|^power` of each row."""
    return weight.abs().pow(power).sum(1)


def taylor(weight: Float[Tensor, "hidden rest"], gradient: Float[Tensor, "hidden rest"]) -> Float[Tensor, "hidden"]:
    """Return `|sum w g|` of each row."""
    return (weight * gradient).sum(1).abs()


def snip(weight: Float[Tensor, "hidden rest"], gradient: Float[Tensor, "hidden rest"]) -> Float[Tensor, "hidden"]:
    """Return `sum |w g|` of each row."""
    return (weight * gradient).abs().sum(1)


def mean_normalised(scores: Float[Tensor, "hidden"]) -> Float[Tensor, "hidden"]:
    """Divide scores by their mean; those of a site whose scores are all 0 stay 0."""
    return scores / _one_if_zero(scores.mean())


def lamp(squares: Float[Tensor, "hidden"]) -> Float[Tensor, "hidden"]:
    """Divide each score by the sum of all that are not smaller; the largest becomes 1."""
    rising, order = squares.sort(stable=True)
    scores = torch.empty_like(squares)
    scores[order] = rising / _one_if_zero(rising.flip(0).cumsum(0).flip(0))
    return scores


def _one_if_zero(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.ones_like(values))
