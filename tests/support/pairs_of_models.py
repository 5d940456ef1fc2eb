"""A dense model and its pruned copy, with what refits read."""

from __future__ import annotations

import copy

from families import Family, randomise_
from torch import Tensor, nn

from vbp import collect_statistics, find_sites, make_plan, prune_, variance_scores
from vbp.sites.site import Site


def pruned_pair(
    family: Family, keep_ratio: float = 0.5, images: int = 32
) -> tuple[nn.Module, nn.Module, tuple[Site, ...], Tensor]:
    """Return a dense model, the same pruned with mean shift, its sites, and images."""
    model, pixels = randomise_(family.build()).double().eval(), family.example(images)
    sites = find_sites(model, pixels[:1])
    statistics = collect_statistics(model, sites, [pixels])
    pruned = copy.deepcopy(model)
    prune_(pruned, make_plan(sites, variance_scores(statistics), keep_ratio=keep_ratio), statistics.means)
    return model, pruned, sites, pixels
