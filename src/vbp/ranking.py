"""Scores of hidden channels: the lower, the sooner a channel goes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

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


def _one_if_zero(value: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return torch.where(value > 0, value, torch.ones_like(value))
