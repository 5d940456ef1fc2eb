"""Prune a small model by the statistics of a few images, for the tests of what is saved and loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vbp import PruningPlan, collect_statistics, find_sites, make_plan, prune_, variance_scores
from vbp.runtime.forward import logits_of


def pruned_in_place(
    model: nn.Module, images: Tensor, keep_ratio: float = 0.6, *, attention: bool = False, **options: Any
) -> PruningPlan:
    """Prune a model and give the plan; `options` are those of `make_plan`."""
    sites = find_sites(model, images[:1], attention=attention)
    statistics = collect_statistics(model, sites, [images])
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=keep_ratio, **options)
    prune_(model, plan, statistics.means)
    return plan


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits in evaluation mode."""
    with torch.no_grad():
        return logits_of(model.eval()(images))
