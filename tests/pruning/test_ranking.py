"""Scores of the output's variance and eliminations of whole models."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, randomise_
from oracles import as_of_many, hidden_values
from torch import nn

from vbp import InputError, collect_statistics, find_sites, make_plan, output_variance_scores, prune_, variance_scores
from vbp.method.ridge import RIDGE, ridge_penalty
from vbp.pruning.criteria import eliminations
from vbp.pruning.readers import few_samples


@pytest.mark.parametrize("name", ["timm-vit", "timm-convnext-conv"])
def test_output_variance_is_that_of_what_a_channel_adds(name: str) -> None:
    family = FAMILIES[name]
    model, images = randomise_(family.build()).double(), family.example(3)
    attention = "convnext" not in name
    sites = find_sites(model, images[:1], attention=attention)
    statistics = collect_statistics(model, sites, [images])
    scores = output_variance_scores(model, sites, statistics)
    for site in sites:
        if not site.consumer:
            assert torch.equal(scores[site.name], variance_scores(statistics)[site.name])
            continue
        hidden = hidden_values(model, site.consumer, images).flatten(0, 1)
        weight = model.get_submodule(site.consumer).weight.detach().flatten(1)
        for channel in (0, site.hidden - 1):
            added = hidden[:, channel, None] * weight[:, channel]
            assert float(scores[site.name][channel]) == pytest.approx(float(added.var(0).sum()), rel=1e-9)


def test_eliminations_plan_what_they_promise() -> None:
    family = FAMILIES["timm-vit"]
    model, images = randomise_(family.build()).double(), family.example(8)
    sites = find_sites(model, images[:1], attention=True)
    statistics = collect_statistics(model, sites, [images], covariance=True)
    found = eliminations(model, sites, statistics)
    assert set(found) == {site.name for site in sites if site.consumer}
    scores = variance_scores(statistics)
    by_variance = make_plan(sites, scores, keep_ratio=0.5, scope="per_layer")
    plan = make_plan(
        sites, scores | {name: one.scores for name, one in found.items()}, keep_ratio=0.5, scope="per_layer"
    )
    weights = {
        e.site.name: model.get_submodule(e.site.consumer).weight.detach().clone()
        for e in plan.sites
        if e.removed and e.site.consumer
    }
    other = copy.deepcopy(model)
    errors = {e.site: e for e in prune_(model, plan, statistics.means, statistics.covariances)}
    worse = {e.site: e for e in prune_(other, by_variance, statistics.means, statistics.covariances)}
    for entry in plan.sites:
        name = entry.site.name
        if name not in weights:
            continue
        removed = len(entry.removed)
        assert removed == entry.site.hidden // 2
        assert sorted(found[name].order[:removed].tolist()) == list(entry.removed)
        change = model.get_submodule(entry.site.consumer).weight.detach() - weights[name][:, entry.keep]
        measured = statistics.covariances[name]
        share = ridge_penalty(measured.covariance, measured.ridge(RIDGE))[list(entry.keep)]
        paid = float((change.square() * share).sum())
        assert errors[name].refit + paid == pytest.approx(float(found[name].cost[removed]), rel=1e-8)
        assert errors[name].refit < worse[name].refit


def test_elimination_needs_covariances() -> None:
    family = FAMILIES["timm-vit"]
    model, images = family.build().double(), family.example(1)
    sites = find_sites(model, images)
    with pytest.raises(InputError, match=r"needs the covariance of site blocks\.0\.mlp\.fc1, got none"):
        eliminations(model, sites, collect_statistics(model, sites, [images]))


def test_few_samples_do_not_make_channels_free() -> None:
    """With fewer samples than channels the refit does not follow their chance: new samples have a smaller error."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 6)).double().eval()
    randomise_(model)
    draw = lambda count: torch.randn(count, 24, generator=generator, dtype=torch.float64)  # noqa: E731
    seen, others = draw(40), draw(2000)
    sites = find_sites(model, seen[:1])
    statistics = collect_statistics(model, sites, [seen], covariance=True)
    sentence = few_samples(model, sites, statistics, RIDGE)
    assert sentence == (
        "the refits of 1 layers have a ridge above 0.01, up to 1 at 0, which has 64 channels and 40 samples; more "
        "images lower it"
    )
    many = replace(statistics, covariances={name: as_of_many(one) for name, one in statistics.covariances.items()})
    assert few_samples(model, sites, many, RIDGE) == ""
    errors, costs = [], []
    for known in (statistics, many):
        order = eliminations(model, sites, known)["0"]
        plan = make_plan(sites, {"0": order.scores}, keep_ratio=0.7)
        pruned = copy.deepcopy(model)
        prune_(pruned, plan, known.means, known.covariances)
        with torch.no_grad():
            errors.append(float((pruned(others) - model(others)).square().mean()))
        costs.append(float(order.cost[len(plan.sites[0].removed)]))
    assert errors[0] < 0.8 * errors[1]
    assert costs[0] > 5 * costs[1]
