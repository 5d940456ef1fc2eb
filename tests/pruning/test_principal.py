"""Attention in its principal basis: turning changes nothing, cutting equals what the formulas predict."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, randomise_
from oracles import as_of_many, hidden_values
from torch import Tensor, nn

from vbp import (
    InputError,
    PruningPlan,
    Statistics,
    collect_statistics,
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
from vbp.runtime.forward import logits_of
from vbp.sites.site import Site

WITH_ATTENTION = ["timm-vit", "timm-deit", "timm-swin", "hf-vit", "hf-deit", "hf-swin"]


def prepared(name: str, *, images: int = 4) -> tuple[nn.Module, Tensor, tuple[Site, ...], Statistics]:
    """Return a float64 model, images, the sites of its attention, and their statistics."""
    family = FAMILIES[name]
    model, pixels = randomise_(family.build()).double().eval(), family.example(images)
    sites = tuple(site for site in find_sites(model, pixels[:1], attention=True) if site.kind != "mlp")
    return model, pixels, sites, collect_statistics(model, sites, [pixels], covariance=True)


def plan_of(sites: tuple[Site, ...], statistics: Statistics, keep: float) -> PruningPlan:
    """Return a plan in the principal basis."""
    return make_plan(sites, variance_scores(statistics), keep_ratio=1.0, attn_keep_ratio=keep, attn_basis="principal")


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits without gradients."""
    with torch.no_grad():
        return logits_of(model(images))


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_the_change_of_basis_alone_changes_no_logit(name: str, images: int) -> None:
    """Also with fewer tokens than channels, where the moments have no full rank."""
    model, pixels, sites, statistics = prepared(name, images=images)
    other = FAMILIES[name].example(9)[4:]
    expected = logits(model, other)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    entries = [SitePlan(site, tuple(range(site.hidden)), "principal") for site in sites]
    means, covariances = rotate_(model, entries, statistics.means, statistics.covariances)
    assert any(not torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(logits(model, other), expected, rtol=0, atol=1e-10)
    # What is known of the channels is what they would be measured to be.
    assert means is not None
    if images > 1:
        again = collect_statistics(model, sites, [pixels], covariance=True)
        for key, found in covariances.items():
            torch.testing.assert_close(found.covariance, again.covariances[key].covariance, rtol=1e-7, atol=1e-9)
        for site in sites:
            if site.kind == "value":
                torch.testing.assert_close(means[site.name], again.means[site.name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["timm-swin", "hf-vit"])
def test_a_dead_head_is_no_obstacle(name: str) -> None:
    model, pixels, sites, _ = prepared(name)
    with torch.no_grad():
        for site in sites:
            size = site.hidden // site.heads
            for layer, first in site.rows:
                model.get_submodule(layer).weight[first : first + size] = 0
    statistics = collect_statistics(model, sites, [pixels], covariance=True)
    expected = logits(model, pixels)
    for keep in (1.0, 0.5):
        pruned = copy.deepcopy(model)
        plan = plan_of(sites, statistics, keep)
        rotate_(pruned, plan.sites, statistics.means, statistics.covariances)
        torch.testing.assert_close(logits(pruned, pixels), expected, rtol=0, atol=1e-10)
        cut = copy.deepcopy(model)
        prune_(cut, plan, statistics.means, statistics.covariances)
        assert logits(cut, pixels).isfinite().all()


@pytest.mark.parametrize("name", ["timm-swin", "hf-vit"])
def test_directions_without_variance_cost_nothing(name: str) -> None:
    """With queries, keys and values of half the rank, half of the directions are all that there is."""
    model, pixels, sites, _ = prepared(name)
    with torch.no_grad():
        for site in sites:
            size = site.hidden // site.heads
            for place, (layer, first) in enumerate(site.rows):
                generator = torch.Generator().manual_seed(place)
                thin = torch.randn(size, size // 2, generator=generator, dtype=torch.float64) / size**0.5
                for parameter in (model.get_submodule(layer).weight, model.get_submodule(layer).bias):
                    rows = parameter[first : first + site.hidden].reshape(site.heads, size, -1)
                    mixed = thin @ (thin.T @ rows)
                    parameter[first : first + site.hidden] = mixed.reshape(
                        parameter[first : first + site.hidden].shape
                    )
    statistics = collect_statistics(model, sites, [pixels], covariance=True)
    expected = logits(model, pixels)
    errors = prune_(model, plan_of(sites, statistics, 0.5), statistics.means, statistics.covariances)
    torch.testing.assert_close(logits(model, pixels), expected, rtol=0, atol=1e-6)
    for error in errors:
        assert error.mean_shift <= 1e-9 * error.energy


@pytest.mark.parametrize("name", ["timm-vit", "hf-swin"])
def test_it_leaves_less_error_than_channels_do(name: str) -> None:
    model, pixels, sites, statistics = prepared(name)
    errors = {}
    for basis in ("channels", "principal"):
        plan = make_plan(sites, variance_scores(statistics), keep_ratio=1.0, attn_keep_ratio=0.5, attn_basis=basis)  # type: ignore[arg-type]
        pruned = copy.deepcopy(model)
        found = prune_(pruned, plan, statistics.means, statistics.covariances)
        errors[basis] = {error.site: error for error in found}
        assert logits(pruned, pixels).isfinite().all()
    for site, error in errors["principal"].items():
        assert error.mean_shift < errors["channels"][site].mean_shift
        assert error.refit <= error.mean_shift * (1 + 1e-9)
        assert error.refit < errors["channels"][site].refit
        assert error.energy == pytest.approx(errors["channels"][site].energy)


def test_values_are_compensated_by_their_mean_and_refitted_over_all_heads() -> None:
    """The output of the projection is the regression of the dense one on the directions that stay."""
    model, pixels, sites, statistics = prepared("timm-vit")
    values = tuple(site for site in sites if site.kind == "value")[:1]
    pairs = tuple(site for site in sites if site.kind == "query_key")[:1]
    plan = plan_of((*values, *pairs), statistics, 0.5)
    plan = replace(plan, sites=(plan.sites[0], SitePlan(pairs[0], tuple(range(32)), "principal")))
    name = values[0].consumer
    dense = hidden_values(model, name, pixels)
    wanted = model.get_submodule(name)(dense).detach().flatten(0, 1)
    # Fused rows cannot differ in number: the directions are read off a model that was turned, not cut.
    turned = copy.deepcopy(model)
    rotate_(turned, plan.sites[:1], statistics.means, statistics.covariances)
    kept = hidden_values(turned, name, pixels).flatten(0, 1)[:, list(plan.sites[0].keep)]
    pruned = copy.deepcopy(model)
    covariances = {name: as_of_many(covariance) for name, covariance in statistics.covariances.items()}
    (error,) = prune_(pruned, replace(plan, sites=plan.sites), statistics.means, covariances, ridge=1e-9)
    layer = pruned.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    features = torch.cat([kept, torch.ones(len(kept), 1, dtype=torch.float64)], 1)
    best = features @ torch.linalg.lstsq(features, wanted).solution
    torch.testing.assert_close(layer(kept).detach(), best, rtol=1e-5, atol=1e-6)
    assert error.refit * (len(kept) - 1) == pytest.approx(float((wanted - best).square().sum()), rel=1e-5)


@pytest.mark.parametrize("name", ["timm-swin", "hf-vit"])
def test_an_artefact_comes_back_by_its_shapes_and_is_pruned_again(name: str, tmp_path: Path) -> None:
    model, pixels, sites, statistics = prepared(name)
    plan = plan_of(sites, statistics, 0.5)
    cost = plan_cost(model, plan, pixels[:1])
    assert cost.macs[1] < cost.macs[0]
    prune_(model, plan, statistics.means, statistics.covariances)
    save_pruned(model, tmp_path / "m.pth", plans=plan)
    loaded = load_pruned(tmp_path / "m.pth", model=FAMILIES[name].build().double())
    assert torch.equal(logits(loaded, pixels), logits(model, pixels))
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    again = find_sites(loaded, pixels[:1], attention=True)
    again = tuple(site for site in again if site.kind != "mlp")
    seen = collect_statistics(loaded, again, [pixels], covariance=True)
    second = plan_of(again, seen, 0.5)
    prune_(loaded, second, seen.means, seen.covariances)
    save_pruned(loaded, tmp_path / "twice.pth", plans=[plan, second])
    twice = load_pruned(tmp_path / "twice.pth", model=FAMILIES[name].build().double())
    assert torch.equal(logits(twice, pixels), logits(loaded, pixels))


@pytest.mark.parametrize("fused", [True, False])
def test_the_softmax_keeps_the_dense_models_scale(fused: bool) -> None:
    """The logits of the pruned attention are those of the dense one, but for what the formulas say is lost."""
    model, pixels, sites, statistics = prepared("timm-vit")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    sites = tuple(site for site in find_sites(model, pixels[:1], attention=True) if site.kind != "mlp")
    # Directions without variance: nothing may change, unless the scale does.
    with torch.no_grad():
        for site in sites:
            layer, first = site.rows[0]
            for parameter in (model.get_submodule(layer).weight, model.get_submodule(layer).bias):
                parameter[[first + 16 * head + index for head in range(2) for index in range(8)]] = 0
    statistics = collect_statistics(model, sites, [pixels], covariance=True)
    expected = logits(model, pixels)
    prune_(model, plan_of(sites, statistics, 0.5), statistics.means, statistics.covariances)
    torch.testing.assert_close(logits(model, pixels), expected, rtol=0, atol=1e-6)


def test_without_covariances_it_is_refused_before_anything_is_touched() -> None:
    model, _, sites, statistics = prepared("timm-vit")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_of(sites, statistics, 0.5)
    assert set(plan.principal) == {site.name for site in sites}
    with pytest.raises(InputError, match=r"principal basis .*collect statistics with covariance=True"):
        prune_(model, plan, statistics.means)
    spoilt = dict(statistics.covariances)
    name = sites[-1].name + "#key"
    spoilt[name] = replace(spoilt[name], m2=spoilt[name].m2 * torch.nan)
    with pytest.raises(InputError, match="finite"):
        prune_(model, plan, statistics.means, spoilt)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_without_means_the_directions_are_cut_and_nothing_is_compensated() -> None:
    model, pixels, sites, statistics = prepared("timm-vit")
    plan = plan_of(sites, statistics, 0.5)
    bare, shifted = copy.deepcopy(model), copy.deepcopy(model)
    assert prune_(bare, plan, covariances=statistics.covariances) == ()
    assert len(prune_(shifted, plan, statistics.means, statistics.covariances)) == len(sites)
    for site in sites:
        if site.kind == "value":
            biases = [one.get_submodule(site.consumer).bias for one in (model, bare, shifted)]
            assert torch.equal(biases[0], biases[1])
            assert not torch.equal(biases[0], biases[2])
    assert logits(bare, pixels).isfinite().all()


def test_a_plan_must_keep_the_first_directions() -> None:
    _, _, sites, statistics = prepared("timm-vit")
    plan = plan_of(sites, statistics, 0.5)
    entry = plan.sites[0]
    assert entry.keep == first_of_heads(entry.site, 8) == (*range(8), *range(16, 24))
    for changed in (
        replace(entry, keep=(*range(1, 9), *range(17, 25))),
        replace(entry, site=replace(entry.site, rotatable=False)),
    ):
        data = replace(plan, sites=(changed, *plan.sites[1:])).to_dict()
        with pytest.raises(InputError, match="must keep the first directions of each head"):
            PruningPlan.from_dict(data)


def test_plans_of_before_are_read() -> None:
    _, _, sites, statistics = prepared("timm-vit")
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=1.0, attn_keep_ratio=0.5)
    data = plan.to_dict() | {"format": "vbp-plan/1"}
    for entry in data["sites"]:
        del entry["basis"], entry["site"]["rotatable"]
    old = PruningPlan.from_dict(data)
    assert [entry.keep for entry in old.sites] == [entry.keep for entry in plan.sites]
    assert old.principal == ()
