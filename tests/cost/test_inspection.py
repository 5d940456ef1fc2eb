"""What a site is said to cost is what goes when its channels go."""

from __future__ import annotations

import copy
import json
from collections import defaultdict

import pytest
import torch
from families import FAMILIES, Family
from pruned_models import pruned_in_place
from torch import nn

from vbp import (
    InputError,
    PruningPlan,
    Site,
    SitePlan,
    count_macs,
    count_parameters,
    find_sites,
    inspect_model,
    prune_,
)
from vbp.cost.inspection import SiteDescription

WITHOUT_ATTENTION = ("convnext", "torchvision")


def half(site: Site) -> SitePlan:
    """Keep half of each head."""
    size = site.hidden // site.heads
    return SitePlan(site, tuple(head * size + index for head in range(site.heads) for index in range(size // 2)))


@pytest.mark.parametrize("name", FAMILIES)
def test_costs_are_what_pruning_saves(name: str) -> None:
    family: Family = FAMILIES[name]
    model, image = family.build().eval(), family.example(1, torch.float32)
    attention = not any(part in name for part in WITHOUT_ATTENTION)
    macs, params = count_macs(model, image), count_parameters(model)
    described = inspect_model(model, image, attention=attention).sites
    sites = find_sites(model, image, attention=attention)
    # What one layer makes goes together: queries, keys and values of one attention.
    blocks: dict[str, list[tuple[SiteDescription, Site]]] = defaultdict(list)
    for row, site in zip(described, sites, strict=True):
        assert (row.name, row.kind, row.hidden, row.consumer) == (site.name, site.kind, site.hidden, site.consumer)
        blocks[site.producers[0].rpartition(".")[0]].append((row, site))
    for block in blocks.values():
        pruned = copy.deepcopy(model)
        prune_(pruned, PruningPlan(tuple(half(site) for _, site in block), 0.5, "per_layer"))
        assert sum(row.macs for row, _ in block) == 2 * (macs - count_macs(pruned, image))
        assert sum(row.params for row, _ in block) == 2 * (params - count_parameters(pruned))


def test_a_report_for_people_and_for_programs(vit: nn.Module) -> None:
    image = FAMILIES["timm-vit"].example(1)
    plan = pruned_in_place(vit, FAMILIES["timm-vit"].example(2))
    found = inspect_model(vit, image, plans=plan)
    assert (found.macs, found.params) == (count_macs(vit, image), count_parameters(vit))
    mlps = [site for site in found.sites if site.kind == "mlp"]
    assert {site.name: (site.hidden, site.dense) for site in mlps} == plan.widths
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["model"] == "VisionTransformer"
    kept = plan.widths["blocks.0.mlp.fc1"][0]
    assert plain["sites"][0]["shapes"] == {"blocks.0.mlp.fc1": [kept, 32], "blocks.0.mlp.fc2": [32, kept]}
    lines = found.table().splitlines()
    assert len(lines) == 11  # the model, the head, two sites, four of attention, and three sums
    assert lines[0].startswith("VisionTransformer: ")
    assert lines[2].split()[:4] == ["blocks.0.mlp.fc1", "mlp", str(kept), "128"]
    assert lines[2].endswith(f"{kept}x32 32x{kept}")
    assert lines[4].split()[:3] == ["blocks.0.attn.proj", "value,", "directions"]
    assert lines[8].split()[:4] == ["all", "MLPs", str(plan.kept), "256"]
    assert lines[9].split()[:4] == ["all", "attention", "128", "128"]
    assert lines[10].split()[:4] == ["all", "sites", str(plan.kept + 128), str(256 + 128)]


def test_inner_layers_and_bare_parameters_count() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 2, 1)
    ).eval()
    (row,) = inspect_model(model, torch.randn(1, 3, 4, 4)).sites
    assert row.params == 8 * 3 + 8 + 8 + 8 + 8 * 9 + 8 + 2 * 8
    assert row.macs == count_macs(model, torch.randn(1, 3, 4, 4))


def test_a_model_without_sites_is_refused() -> None:
    with pytest.raises(InputError, match="no prunable site"):
        inspect_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.randn(1, 3, 2, 2))
