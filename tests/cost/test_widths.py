"""What is computed from widths is what is counted on a pruned copy."""

from __future__ import annotations

import random

import pytest
import torch
from architectures import ARCHITECTURES
from families import FAMILIES
from torch import Tensor, nn

from vbp import PruningPlan, Site, SitePlan, find_sites, plan_cost, prune_
from vbp.cost.macs import count_parameters
from vbp.cost.widths import WidthCosts

WITHOUT_ATTENTION = ("convnext", "torchvision")


def uneven_plan(sites: tuple[Site, ...], seed: int = 1) -> PruningPlan:
    """Keep another share of each MLP, and a third of every head."""
    draw = random.Random(seed)
    entries = []
    for site in sites:
        size = site.hidden // site.heads
        count = draw.randint(1, size) if site.kind == "mlp" else size // 3
        entries.append(SitePlan(site, tuple(h * size + i for h in range(site.heads) for i in range(count))))
    return PruningPlan(tuple(entries), 0.5, "per_layer")


def check(model: nn.Module, sites: tuple[Site, ...], image: Tensor) -> None:
    costs, plan = WidthCosts.of(model, sites, image), uneven_plan(sites)
    counted = plan_cost(model, plan, image)
    assert (costs.macs, costs.params) == (counted.macs[0], counted.params[0])
    assert (costs.macs_of(plan), costs.params_of(plan)) == (counted.macs[1], counted.params[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_computed_costs_are_counted_costs(name: str) -> None:
    model, image = FAMILIES[name].build().eval(), FAMILIES[name].example(1, torch.float32)
    attention = not any(part in name for part in WITHOUT_ATTENTION)
    check(model, find_sites(model, image, attention=attention), image)


@pytest.mark.parametrize(
    "label", ["timm DINOv2 giant, packed SwiGLU", "timm PVTv2, depthwise convolution in the MLP"]
)
def test_gates_and_what_lies_between_the_layers_count(label: str) -> None:
    (architecture,) = [one for one in ARCHITECTURES if one.label == label]
    model, image = architecture.build(), architecture.images(1, torch.float32)
    check(model, architecture.find(model, image), image)


def test_a_layer_between_two_sites_costs_the_product_of_both() -> None:
    (architecture,) = [one for one in ARCHITECTURES if one.convolutions]
    model, image = architecture.build(), architecture.images(1, torch.float32)
    sites = architecture.find(model, image)
    assert {site.consumer for site in sites} & {name for site in sites for name in site.producers}
    check(model, sites, image)


def test_a_bias_gained_by_compensation_counts_where_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1, bias=False)).eval()
    image = torch.randn(1, 3, 4, 4)
    sites = find_sites(model, image)
    costs, plan = WidthCosts.of(model, sites, image), PruningPlan((SitePlan(sites[0], (1, 4)),), 0.25, "global")
    whole = PruningPlan((SitePlan(sites[0], tuple(range(8))),), 1.0, "global")
    assert costs.params_of(whole, compensated=True) == count_parameters(model)
    prune_(model, plan, {sites[0].name: torch.ones(8)})
    assert costs.params_of(plan, compensated=True) == count_parameters(model) == costs.params_of(plan) + 5
