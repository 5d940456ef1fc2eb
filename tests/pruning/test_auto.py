"""The criterion auto: never worse than its candidates, exact counts, the same again and in many processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch
from families import FAMILIES, randomise_
from pairs import Pair
from torch import Tensor, nn

from vbp import InputError, Statistics, collect_statistics, find_sites, make_plan, prune_, variance_scores
from vbp.cost.search import PlanSearch
from vbp.cost.widths import WidthCosts
from vbp.method.sampling import RandomProbes
from vbp.pruning.auto import AutoSearch, auto_plan, sensitivity_eliminations
from vbp.pruning.competition import mixed_with_uniform, per_saving, scaled
from vbp.pruning.divergence import DenseReference
from vbp.pruning.make_plan import PlanRules
from vbp.pruning.plan import PlanChoice, PruningPlan, SitePlan
from vbp.runtime.forward import logits_of
from vbp.runtime.session import Session
from vbp.sites.site import Site
from vbp.statistics.images import GivenImages

Setting = tuple[nn.Module, tuple[Site, ...], Statistics, Tensor]


def setting(name: str, *, attention: bool = False, images: int = 8) -> Setting:
    """Return a model, its sites, all statistics, and images."""
    family = FAMILIES[name]
    model, pixels = randomise_(family.build()).double().eval(), family.example(images)
    sites = find_sites(model, pixels[:1], attention=attention)
    statistics = collect_statistics(model, sites, pixels.split(4), covariance=True, sensitivity=RandomProbes())
    return model, sites, statistics, pixels


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin", "timm-convnext-conv"])
def test_the_best_candidate_wins_and_keeps_the_count(name: str) -> None:
    model, sites, statistics, images = setting(name, images=32)
    held_out = DenseReference(model, [images])
    found = auto_plan(model, sites, statistics, held_out, keep_ratio=0.5)
    names = [one.name for one in found.tried]
    assert {"equal shares", "variance", "sensitivity", "priced, round 1"} <= set(names)
    assert found.plan.kept == found.plan.requested
    pruned = copy.deepcopy(model)
    prune_(pruned, found.plan, found.means, found.covariances)
    with torch.no_grad():
        p, q = (logits_of(one(images)).log_softmax(-1) for one in (model, pruned))
    best = min(one.divergence for one in found.tried)
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(best, rel=1e-6)
    assert all(str(one.name) in found.table() for one in found.tried)
    assert found.plan_for(0.5) == found.plan
    assert found.plan_for(0.25).kept < found.plan.kept
    # The paper's choice is one of the candidates.
    paper = make_plan(sites, variance_scores(statistics), keep_ratio=0.5)
    tried = next(one for one in found.tried if one.name == "variance")
    assert tried.widths == {entry.site.name: len(entry.keep) for entry in paper.sites}


def test_a_cost_is_the_divergence_that_second_order_predicts() -> None:
    model, sites, statistics, _ = setting("timm-vit", images=4)
    site = sites[0]
    plain, sensitivity = statistics.covariances[site.name], statistics.sensitivities[site.name]
    cost = sensitivity_eliminations(model, sites, statistics)[site.name].cost
    weight = model.get_submodule(site.consumer).weight.detach()
    # All channels gone, each replaced by its mean in the metric: what is left is 1/2 tr(D W M W'), by hand.
    metric = sensitivity.blended_covariance(plain)
    trace = sensitivity.recentred(plain.mean).inputs.diagonal()[:-1].sum() / sensitivity.images
    middle = metric.covariance * (trace / plain.covariance.trace())
    expected = 0.5 * ((sensitivity.outputs / sensitivity.outputs.trace()) @ weight @ middle @ weight.T).trace()
    assert float(cost[-1]) == pytest.approx(float(expected), rel=1e-9)


def test_half_of_the_metric_is_the_plain_covariance() -> None:
    _, sites, statistics, _ = setting("timm-vit", images=4)
    name = sites[0].name
    plain, sensitivity = statistics.covariances[name], statistics.sensitivities[name]
    assert sensitivity.blended_covariance(plain, share=0.0) is plain
    metric = sensitivity.blended_covariance(plain)
    # With the squared step of the mean, it cannot lie below the plain covariance's share.
    assert float(torch.linalg.eigvalsh(metric.covariance - 0.5 * plain.covariance).min()) > -1e-9 * float(
        plain.covariance.trace()
    )
    assert metric.count == plain.count


def test_round_to_attention_and_floor() -> None:
    model, sites, statistics, images = setting("timm-vit", attention=True)
    found = auto_plan(
        model, sites, statistics, DenseReference(model, [images]), keep_ratio=0.5, round_to=8, min_keep_ratio=0.25,
        attn_keep_ratio=0.5,
    )  # fmt: skip
    for entry in found.plan.sites:
        assert len(entry.keep) % 8 == 0
        assert len(entry.keep) >= 0.25 * entry.site.hidden
    assert found.plan.kept == found.plan.requested
    assert found.plan.attn_keep_ratio == 0.5
    values = variance_scores(statistics)
    for entry in found.plan.sites:
        if entry.site.kind == "value":
            kept = values[entry.site.name][list(entry.keep)]
            assert float(kept.max()) == float(values[entry.site.name].max())


def test_it_is_deterministic_and_leaves_the_model_alone() -> None:
    model, sites, statistics, images = setting("timm-vit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told: list[str] = []
    first, second = (
        auto_plan(model, sites, statistics, DenseReference(model, [images]), keep_ratio=0.4, progress=told.append)
        for _ in range(2)
    )
    assert first.plan == second.plan
    assert first.tried == second.tried
    assert told == [one.name for one in first.tried] * 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_processes_choose_what_one_does() -> None:
    model, sites, statistics, images = setting("timm-vit")
    alone = auto_plan(model, sites, statistics, DenseReference(model, [images]), keep_ratio=0.5)
    barrier, slots = Barrier(2), [torch.empty(0)] * 2

    def work(rank: int) -> PlanChoice:
        mine = copy.deepcopy(model)
        share = [images[rank::2]] if rank == 0 else [images[rank::2][:1], images[rank::2][1:]]
        held_out = DenseReference(mine, share, session=Session(Pair(rank, barrier, slots)))
        assert held_out.images == len(images)
        return auto_plan(mine, sites, statistics, held_out, keep_ratio=0.5)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    assert first.plan == second.plan == alone.plan
    assert first.tried == second.tried
    for one, other in zip(first.tried, alone.tried, strict=True):
        assert one.divergence == pytest.approx(other.divergence, rel=1e-6)


def test_blends_keep_the_order_inside_a_site() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {
        "a": torch.rand(16, generator=generator).double(),
        "b": 10 + torch.rand(8, generator=generator).double(),
    }
    for share in (0.0, 0.3, 1.0):
        for name, blend in mixed_with_uniform(scores, share).items():
            assert torch.equal(blend.argsort(), scores[name].argsort())
    sites = (Site(("a",), "x", 16), Site(("b",), "y", 8))

    def widths(share: float) -> list[int]:
        plan = make_plan(sites, mixed_with_uniform(scores, share), keep_ratio=0.5)
        return [len(entry.keep) for entry in plan.sites]

    assert widths(0.0) == [4, 8]
    assert widths(1.0) == [8, 4]
    assert widths(0.5) == [6, 6]


def test_prices_keep_the_order_of_the_closest_scores() -> None:
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    # Just below a power of two: above it floats are twice as far apart.
    rising = torch.tensor(1.9, dtype=torch.float64).view(torch.int64) + torch.arange(200)
    scores = {"a": rising.view(torch.float64)[shuffled]}
    assert len((scores["a"] * 1.3).unique()) < 200
    found = scaled(scores, {"a": 1.3})["a"]
    assert torch.equal(found.argsort(), scores["a"].argsort())
    torch.testing.assert_close(found, scores["a"] * 1.3)


def test_scores_are_compared_by_what_is_saved() -> None:
    scores = {"a": torch.tensor([4.0, 2.0]), "b": torch.tensor([3.0, 0.0])}
    assert per_saving(scores, {}) is scores
    found = per_saving(scores, {"a": 4.0, "b": 1.0})
    torch.testing.assert_close(found["a"], torch.tensor([1.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(found["b"], torch.tensor([3.0, 0.0], dtype=torch.float64))


def test_plans_of_one_cost_compete_where_channels_save_differently() -> None:
    model, sites, statistics, images = setting("timm-convnext-conv")
    costs = WidthCosts.of(model, sites, images[:1])
    limit = 0.7 * costs.macs

    def size(plan_for: Callable[[float], PruningPlan]) -> PruningPlan:
        plan = PlanSearch(plan_for).largest(costs.macs_of, limit)
        assert plan is not None
        return plan

    mean = sum(costs.of_site(site)[0] for site in sites) / sum(site.hidden for site in sites)
    savings = {site.name: costs.of_site(site)[0] / site.hidden / mean for site in sites}
    assert max(savings.values()) > 1.5 * min(savings.values())
    found = {}
    for weights in ({}, savings):
        search = AutoSearch(model, sites, statistics, GivenImages([images]), PlanRules(), savings=weights)
        choice = search.plan_of_size(size, "70 % of the MACs")
        assert limit * 0.97 < costs.macs_of(choice.plan) <= limit
        for one in choice.tried:
            keep = {site.name: one.widths[site.name] for site in sites}
            entries = tuple(SitePlan(site, tuple(range(keep[site.name]))) for site in sites)
            assert limit * 0.97 < costs.macs_of(PruningPlan(entries, 0.5, "global")) <= limit
        found[bool(weights)] = {one.name: one.widths for one in choice.tried}
    assert found[False]["equal shares"] == found[True]["equal shares"]
    assert found[False]["sensitivity"] != found[True]["sensitivity"]


def test_missing_sensitivities_are_an_error() -> None:
    model, sites, statistics, images = setting("timm-vit", images=4)
    with pytest.raises(InputError, match="needs covariance and sensitivity of site"):
        auto_plan(
            model, sites, replace(statistics, sensitivities={}), DenseReference(model, [images]), keep_ratio=0.5
        )


def test_equal_widths_leave_one_plan() -> None:
    model, sites, statistics, images = setting("timm-vit")
    found = auto_plan(model, sites, statistics, DenseReference(model, [images]), keep_ratio=0.4, equal_widths=True)
    assert [one.name for one in found.tried] == ["equal widths"]
    assert len({len(entry.keep) for entry in found.plan.sites}) == 1
    assert found.plan.scope == "equal"
