"""Scores of hidden channels: the lower, the sooner a channel goes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vbp.statistics import Statistics


def variance_scores(statistics: Statistics, *, norm_per_layer: bool = False) -> dict[str, Float[Tensor, "hidden"]]:
    """Score each hidden channel by the variance of its activation.

    Args:
        statistics: From `collect_statistics`.
        norm_per_layer: Divide the scores of a site by their mean, so that sites of different scale compare.

    Source: VBP paper, section 3.2.
    """
    scores = statistics.variances
    if norm_per_layer:
        # A site whose channels are all constant has mean 0 and keeps its zeros.
        scores = {name: score / _one_if_zero(score.mean()) for name, score in scores.items()}
    return scores


def _one_if_zero(value: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return torch.where(value > 0, value, torch.ones_like(value))
