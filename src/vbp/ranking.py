"""Scores of hidden channels: the lower, the sooner a channel goes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.elimination import Elimination, eliminate
from vbp.errors import InputError
from vbp.refit import RIDGE, as_matrix
from vbp.sites import Site
from vbp.statistics import KEY, QUERY, Statistics


def variance_scores(statistics: Statistics, *, norm_per_layer: bool = False) -> dict[str, Float[Tensor, "hidden"]]:
    """Score each hidden channel by the variance of its activation.

    A query/key channel adds `q[j] * k[j]` to a logit; it is scored by the product of their mean squares.

    Args:
        statistics: From `collect_statistics`.
        norm_per_layer: Divide the scores of a site by their mean, so that sites of different scale compare.

    Returns:
        Site name -> score of each channel.

    Source: VBP paper, section 3.2.
    """
    moments = statistics.moments
    scores = {}
    for name, found in moments.items():
        if name.endswith(QUERY):
            name = name.removesuffix(QUERY)
            scores[name] = found.second_moment * moments[name + KEY].second_moment
        elif not name.endswith(KEY):
            scores[name] = found.variance
    if norm_per_layer:
        # A site whose channels are all constant has mean 0 and keeps its zeros.
        scores = {name: score / _one_if_zero(score.mean()) for name, score in scores.items()}
    return scores


def output_variance_scores(
    model: nn.Module, sites: Sequence[Site], statistics: Statistics
) -> dict[str, Float[Tensor, "hidden"]]:
    """Score each channel by the variance that it adds to the consumer's output if taken alone: `var[j] |W[:, j]|^2`.

    A kernel counts at each of its offsets. Query/key channels, which no layer reads, are scored as `variance_scores`
    does.

    Args:
        model: The dense model.
        sites: From `find_sites`.
        statistics: Of this model.
    """
    scores = variance_scores(statistics)
    for site in sites:
        if site.consumer:
            norms = as_matrix(_weight(model, site)).square().sum(0)
            scores[site.name] = scores[site.name] * norms.to(scores[site.name].device)
    return scores


def eliminations(
    model: nn.Module, sites: Sequence[Site], statistics: Statistics, *, ridge: float = RIDGE
) -> dict[str, Elimination]:
    """Order the channels of each site as `eliminate` does, on the model's device; query/key sites are left out.

    Args:
        model: The dense model.
        sites: From `find_sites`.
        statistics: Of this model, with covariances.
        ridge: As in the refit that will follow.

    Raises:
        InputError: A covariance is missing or unfit.
    """
    found = {}
    for site in sites:
        if not site.consumer:
            continue
        if site.name not in statistics.covariances:
            raise InputError(
                f"elimination needs the covariance of site {site.name}, got none; collect statistics with "
                "covariance=True"
            )
        weight = _weight(model, site)
        covariance = statistics.covariances[site.name].to(weight.device).covariance
        try:
            found[site.name] = eliminate(covariance, weight, ridge=ridge, heads=site.heads).to("cpu")
        except InputError as error:
            raise InputError(f"site {site.name}: {error}") from error
    return found


def _weight(model: nn.Module, site: Site) -> Tensor:
    weight = model.get_submodule(site.consumer).weight
    assert isinstance(weight, Tensor)
    return weight


def _one_if_zero(value: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return torch.where(value > 0, value, torch.ones_like(value))
