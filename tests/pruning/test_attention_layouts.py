"""Attentions as libraries write them: which of their channels are found, in which order, and that cuts are exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attentions import Classifier, Interleaved, Separate, cosine, rotary
from families import randomise_
from torch import Tensor, nn

from vbp import (
    PruningPlan,
    Statistics,
    collect_statistics,
    count_macs,
    find_sites,
    load_pruned,
    make_plan,
    plan_cost,
    prune_,
    save_pruned,
    variance_scores,
)
from vbp.pruning.attention import rotate_
from vbp.pruning.plan import SitePlan, first_of_heads
from vbp.sites.site import Site

LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "thirds of each head": Interleaved,
    "sizes of their own": lambda: Interleaved(value_size=10, separate=True),
    "thirds, convolution": lambda: Interleaved(convolution=True),
    "sizes, convolution": lambda: Interleaved(value_size=5, separate=True, convolution=True),
    "separate layers": Separate,
    "rotary": lambda: Separate(rotary),
    "cosine": lambda: Separate(cosine),
}
SEPARATE = {"sizes of their own", "sizes, convolution", "separate layers", "rotary", "cosine"}
VALUES_ALONE = {"rotary", "cosine"}


def prepared(layout: str) -> tuple[nn.Module, Tensor, tuple[Site, ...], Statistics]:
    """Return a float64 classifier, images, its sites and their statistics."""
    torch.manual_seed(0)
    model = randomise_(Classifier(LAYOUTS[layout]())).double().eval()
    images = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    sites = find_sites(model, images[:1], attention=True)
    return model, images, sites, collect_statistics(model, sites, [images], covariance=True)


def principal(sites: tuple[Site, ...], value: int, query_key: int) -> PruningPlan:
    """Return a plan that keeps so many directions of each head."""
    count = {"value": value, "query_key": query_key}
    entries = (SitePlan(site, first_of_heads(site, count[site.kind]), "principal") for site in sites)
    return PruningPlan(tuple(entries), 1.0, "per_layer", attn_keep_ratio=0.5)


def silenced(model: nn.Module, plan: PruningPlan, statistics: Statistics) -> nn.Module:
    """Return the dense model in the principal basis, whose removed directions are read or made by nothing."""
    silent = copy.deepcopy(model)
    rotate_(silent, plan.sites, None, statistics.covariances)
    with torch.no_grad():
        for entry in plan.sites:
            if entry.site.consumer:
                silent.get_parameter(f"{entry.site.consumer}.weight")[:, list(entry.removed)] = 0
                continue
            for name, places in entry.site.places:
                rows = [places[channel] for channel in entry.removed]
                silent.get_parameter(f"{name}.weight")[rows] = 0
                silent.get_parameter(f"{name}.bias")[rows] = 0
    return silent


@pytest.mark.parametrize("layout", LAYOUTS)
def test_turning_changes_no_logit_and_cutting_is_exact(layout: str, tmp_path: Path) -> None:
    model, images, sites, statistics = prepared(layout)
    assert [site.kind for site in sites] == (["value"] if layout in VALUES_ALONE else ["value", "query_key"])
    assert all(site.rotatable for site in sites)
    assert all(site.separate is (layout in SEPARATE) for site in sites)
    expected = model(images)
    turned = copy.deepcopy(model)
    whole = [SitePlan(site, tuple(range(site.hidden)), "principal") for site in sites]
    rotate_(turned, whole, statistics.means, statistics.covariances)
    assert not torch.equal(turned.get_parameter("attn.proj.weight"), model.get_parameter("attn.proj.weight"))
    torch.testing.assert_close(turned(images), expected, rtol=0, atol=1e-10)
    for value, query_key in [(3, 3), (2, 4), (4, 6)] if layout in SEPARATE else [(3, 3)]:
        plan = principal(sites, value, query_key)
        assert PruningPlan.from_dict(plan.to_dict()) == plan
        pruned = copy.deepcopy(model)
        prune_(pruned, plan, covariances=statistics.covariances)
        torch.testing.assert_close(pruned(images), silenced(model, plan, statistics)(images), rtol=0, atol=1e-10)
        assert plan_cost(model, plan, images[:1]).macs[1] == count_macs(pruned, images[:1])
        compensated = copy.deepcopy(model)
        errors = prune_(compensated, plan, statistics.means, statistics.covariances)
        assert all(error.refit <= error.mean_shift * (1 + 1e-9) for error in errors)
        file = tmp_path / f"{value}{query_key}.pth"
        save_pruned(compensated, file, plans=plan)
        loaded = load_pruned(file, model=Classifier(LAYOUTS[layout]()).double())
        assert torch.equal(loaded(images), compensated(images))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_are_those_of_the_layers_rows(layout: str) -> None:
    """Means and scores of channels belong to the rows that surgery removes."""
    model, images, sites, statistics = prepared(layout)
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=1.0, attn_keep_ratio=0.5)
    pruned = copy.deepcopy(model)
    prune_(pruned, plan, statistics.means)
    silent = silenced(model, plan, statistics)
    with torch.no_grad():
        value = plan.sites[0]
        shift = model.get_parameter("attn.proj.weight").flatten(1).double()[:, list(value.removed)]
        silent.get_parameter("attn.proj.bias").add_(shift @ statistics.means[value.site.name][list(value.removed)])
    torch.testing.assert_close(pruned(images), silent(images), rtol=0, atol=1e-10)


def test_queries_come_first_whichever_layer_runs_first() -> None:
    _, _, (_, pair), _ = prepared("separate layers")
    assert pair.producers == ("attn.q", "attn.k")


@pytest.mark.parametrize("layout", ["rotary", "cosine"])
def test_queries_and_keys_that_stay_are_named(layout: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        prepared(layout)
    assert "queries and keys of the attention behind attn.v stay: something stands between" in caplog.text


def test_damaged_strides_of_a_plan_are_refused() -> None:
    _, _, sites, _ = prepared("thirds of each head")
    data = principal(sites, 3, 3).to_dict()
    data["sites"][0]["site"]["strides"] = [1, 2]
    with pytest.raises(Exception, match="names no producers, or not their rows"):
        PruningPlan.from_dict(data)
    data["sites"][0]["site"]["strides"] = [-1]
    with pytest.raises(Exception, match="must have at most"):
        PruningPlan.from_dict(data)


def test_rows_of_a_plan_that_meet_are_refused() -> None:
    model, _, sites, _ = prepared("thirds of each head")
    plan = principal(sites, 6, 6)
    entry = plan.sites[0]
    shifted = replace(entry, site=replace(entry.site, strides=(6,)))
    with pytest.raises(Exception, match=r"each of the rows 0 to 36 of attn\.qkv once"):
        prune_(model, replace(plan, sites=(shifted, *plan.sites[1:])))
