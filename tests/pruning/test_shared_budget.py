"""One budget for MLPs and attention: what a direction costs, how plans divide the budget, whose error it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from families import FAMILIES, randomise_
from torch import Tensor, nn

from vbp import InputError, PruningPlan, Statistics, collect_statistics, find_sites, prune_
from vbp.cost.budget import Budget
from vbp.cost.search import PlanSearch
from vbp.cost.target import BudgetTarget
from vbp.method.allocation import AllowedWidths, counts_by_saving
from vbp.method.principal import head_blocks, query_key_basis
from vbp.method.sampling import RandomProbes
from vbp.pruning.attention_costs import direction_costs
from vbp.pruning.auto import AutoSearch, refit_metrics
from vbp.pruning.competition import unit_savings
from vbp.pruning.divergence import DenseReference, cost_multipliers
from vbp.pruning.make_plan import PlanRules, shared_plan
from vbp.pruning.plan import PlanChoice, SitePlan, first_of_heads
from vbp.pruning.site_errors import erring_units, errors_added
from vbp.runtime.forward import logits_of
from vbp.sites.site import Site, units_of
from vbp.statistics.images import GivenImages
from vbp.statistics.statistics import KEY, QUERY

Setting = tuple[nn.Module, tuple[Site, ...], Statistics, Tensor]
WITH_ATTENTION = ["timm-vit", "timm-swin", "hf-vit", "hf-swin"]


def setting(name: str, images: int = 8) -> Setting:
    """Return a float64 model, all of its sites, all statistics, and images."""
    family = FAMILIES[name]
    model, pixels = randomise_(family.build()).double().eval(), family.example(images)
    sites = find_sites(model, pixels[:1], attention=True)
    statistics = collect_statistics(model, sites, pixels.split(4), covariance=True, sensitivity=RandomProbes())
    return model, sites, statistics, pixels


def attention_of(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Return the first attention's sites."""
    return next(unit for unit in units_of(sites) if unit[0].kind == "value")


def test_steps_are_taken_in_the_order_of_what_they_lose() -> None:
    scores = [np.array([1.0, 2.0, 6.0, 7.0]), np.array([3.0, 4.0])]
    bounds = [AllowedWidths.of(4, 1, 0.0), AllowedWidths.of(2, 1, 0.0)]
    found = [counts_by_saving(scores, bounds, [1.0, 5.0], share) for share in (1.0, 0.9, 0.8, 0.5, 0.1, 0.01)]
    # Of 14: at 0.8 the first channel of the second site, 5, is enough without those taken before.
    assert found == [[4, 2], [2, 2], [4, 1], [2, 1], [1, 1], [1, 1]]


def test_steps_of_several_channels_cost_their_mean() -> None:
    scores = [np.array([0.0, 9.0, 9.0, 9.0]), np.array([1.0, 2.0, 5.0, 6.0])]
    bounds = [AllowedWidths.of(4, 2, 0.0), AllowedWidths.of(4, 2, 0.0)]
    assert counts_by_saving(scores, bounds, [1.0, 1.0], 0.75) == [4, 2]
    assert counts_by_saving(scores, bounds, [1.0, 1.0], 0.5) == [2, 2]


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_directions_cost_what_the_second_order_says_by_hand(name: str) -> None:
    model, sites, statistics, _ = setting(name, images=4)
    value, pair = attention_of(sites)
    metrics = refit_metrics(sites, statistics)
    costs = direction_costs(model, (value, pair), statistics, metrics)
    size = value.hidden // value.heads
    assert costs.shape == (size,)
    assert bool((costs[:-1] >= costs[1:]).all())
    # All directions gone: values are held at their mean, all logits are equal.
    weight = model.get_submodule(value.consumer).weight.detach()
    plain, sensitivity = statistics.covariances[value.name], statistics.sensitivities[value.name]
    weighed = sensitivity.scaled_weight(weight, plain)
    values = float((weighed @ metrics[value.name].covariance @ weighed.T).trace())
    logits = 0.0
    told = statistics.logit_sensitivities[pair.name]
    query, key = metrics[pair.name + QUERY], metrics[pair.name + KEY]
    for head in range(pair.heads):
        q, k = (head_blocks(one.covariance, pair.heads)[head] for one in (query, key))
        # <E, T> with E = 1, for E[T'T] and E[TT'] in the place of what is measured together.
        trace = float(told.query[head].trace()) / told.images
        logits += 0.5 * float((trace * q / q.trace() @ (trace * k / k.trace())).trace()) / trace
    assert float(costs.sum()) == pytest.approx(values + logits, rel=1e-6)


def test_the_first_directions_cost_what_the_last_ones_leave() -> None:
    """The cost of queries and keys beyond a rank is the loss of the cut logits, formed by hand."""
    _, sites, statistics, _ = setting("timm-vit", images=4)
    _, pair = attention_of(sites)
    metrics = refit_metrics(sites, statistics)
    q, k = (head_blocks(metrics[pair.name + one].covariance, pair.heads) for one in (QUERY, KEY))
    basis = query_key_basis(q, k)
    rank = q.shape[-1] // 2
    change = basis.query[:, rank:].mT @ basis.key[:, rank:]
    by_hand = (change.mT @ q @ change @ k).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(basis.cost[:, rank:].sum(-1), by_hand, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_the_error_of_an_attention_is_that_of_the_pruned_model(name: str) -> None:
    model, sites, statistics, images = setting(name, images=4)
    unit = attention_of(sites)
    entries = tuple(
        SitePlan(site, first_of_heads(site, site.hidden // site.heads // 2), "principal")
        if site in unit
        else SitePlan(site, tuple(range(site.hidden)))
        for site in sites
    )
    plan = PruningPlan(entries, 1.0, "global", attn_keep_ratio=0.5)
    pruned = copy.deepcopy(model)
    prune_(pruned, plan, statistics.means, statistics.covariances)
    names = [one[0].site.name for one in erring_units(plan)]
    assert unit[0].name in names
    assert len(names) == 1 + sum(site.kind == "mlp" for site in sites)
    amplitudes = torch.ones(len(names), dtype=torch.float64)
    with torch.no_grad():
        dense, small = (logits_of(one(images)) for one in (model, pruned))
        assert float((dense - small).abs().max()) > 1e-6
        with errors_added(model, pruned, plan, amplitudes):
            torch.testing.assert_close(logits_of(model(images)), small, rtol=0, atol=1e-9)
        with errors_added(model, pruned, plan, 0 * amplitudes):
            torch.testing.assert_close(logits_of(model(images)), dense, rtol=0, atol=1e-9)
        torch.testing.assert_close(logits_of(model(images)), dense, rtol=0, atol=0)


def scores_for(sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """Return falling scores by the names of units."""
    generator = torch.Generator().manual_seed(0)
    scores = {}
    for unit in units_of(sites):
        size = unit[0].hidden // unit[0].heads
        random = torch.rand(size, generator=generator, dtype=torch.float64)
        scores[unit[0].name] = random if unit[0].kind == "mlp" else random.sort(descending=True).values
    return scores


@pytest.mark.parametrize(("share", "round_to"), list(product([1.0, 0.7, 0.3, 0.05], [1, 4])))
def test_a_shared_plan_leaves_the_share_as_nearly_as_steps_allow(share: float, round_to: int) -> None:
    _, sites, _, _ = setting("timm-vit", images=4)
    savings = unit_savings(sites, {site.name: 1.0 + len(site.name) % 3 for site in sites})
    plan = shared_plan(sites, scores_for(sites), savings, share=share, round_to=round_to, min_keep_ratio=0.05)
    total = sum(savings[unit[0].name] * unit[0].hidden / unit[0].heads for unit in units_of(sites))
    widths = plan.widths
    left = sum(savings[unit[0].name] * widths[unit[0].name][0] / unit[0].heads for unit in units_of(sites))
    floors = sum(
        savings[unit[0].name] * AllowedWidths.of(unit[0].hidden // unit[0].heads, round_to, 0.05).counts[-1]
        for unit in units_of(sites)
    )
    largest = round_to * max(savings.values())
    assert max(floors, share * total - largest) - 1e-9 <= left <= max(floors, share * total) + 1e-9
    for value, pair in (unit for unit in units_of(sites) if len(unit) == 2):
        assert widths[value.name] == widths[pair.name]
    for entry in plan.sites:
        assert (len(entry.keep) // entry.site.heads) % round_to == 0
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    assert plan.requested == plan.kept


def test_an_attention_that_does_not_allow_any_basis_stays_whole() -> None:
    _, sites, _, _ = setting("timm-vit", images=4)
    fixed = tuple(replace(site, rotatable=False) for site in sites)
    savings = unit_savings(sites, {site.name: 1.0 for site in sites})
    plan = shared_plan(fixed, scores_for(sites), savings, share=0.5)
    assert plan.attention_share == 1.0
    assert plan.kept < plan.total


@pytest.mark.parametrize("scope", ["global", "equal"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-swin", "hf-vit"])
def test_the_search_divides_the_budget_and_is_never_worse_than_mlps_alone(name: str, scope: str) -> None:
    model, sites, statistics, images = setting(name)
    rules = PlanRules("equal" if scope == "equal" else "global", attn_shared=True)
    target = BudgetTarget.of(Budget.of(target_macs=0.8), model, sites, images[:1], rules)

    def size(plan_for: Callable[[float], PruningPlan]) -> PruningPlan:
        return target.proposal(plan_for, compensated=True)

    search = AutoSearch(model, sites, statistics, GivenImages([images]), rules, savings=target.savings())
    choice = search.plan_of_size(size, "80 % of the MACs")
    assert target.costs.macs_of(choice.plan) <= 0.8 * target.costs.macs
    judged = {one.name: one.divergence for one in choice.tried}
    alone = [divergence for label, divergence in judged.items() if "MLPs alone" in label]
    assert alone
    assert min(judged.values()) <= min(alone)
    value = attention_of(sites)[0]
    assert any(one.widths[value.name] < value.hidden for one in choice.tried)
    check_is_judged_by_what_it_is(model, images, choice)
    if scope == "equal":
        by_shape: dict[tuple[str, int], set[int]] = {}
        for entry in choice.plan.sites:
            by_shape.setdefault((entry.site.kind, entry.site.hidden), set()).add(len(entry.keep))
        assert all(len(counts) == 1 for counts in by_shape.values())
    assert PlanSearch(choice.plan_for).whole.kept == choice.plan.total if choice.plan_for else False


def check_is_judged_by_what_it_is(model: nn.Module, images: Tensor, choice: PlanChoice) -> None:
    """Prune by the choice, and compare the divergence with that of the best candidate."""
    pruned = copy.deepcopy(model)
    prune_(pruned, choice.plan, choice.means, choice.covariances)
    with torch.no_grad():
        p, q = (logits_of(one(images)).log_softmax(-1) for one in (model, pruned))
    best = min(one.divergence for one in choice.tried)
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(best, rel=1e-6)


def test_what_each_attention_adds_to_the_divergence_is_measured() -> None:
    model, sites, statistics, images = setting("timm-vit")
    savings = unit_savings(sites, {site.name: 1.0 for site in sites})
    plan = shared_plan(sites, scores_for(sites), savings, share=0.5)
    pruned = copy.deepcopy(model)
    prune_(pruned, plan, statistics.means, statistics.covariances)
    reference = DenseReference(model, [images])
    shares = reference.site_contributions(pruned, plan)
    assert {unit[0].site.name for unit in erring_units(plan)} == shares.keys()
    assert sum(name.endswith("attn.proj") for name in shares) == 2
    # Shares are half of the slope with the amplitude: of one attention alone, by a difference.
    name = next(name for name in shares if name.endswith("attn.proj"))
    place = list(shares).index(name)

    def divergence(amplitude: float) -> float:
        amplitudes = torch.ones(len(shares), dtype=torch.float64)
        amplitudes[place] = amplitude
        with torch.no_grad():
            p = logits_of(model(images)).log_softmax(-1)
            with errors_added(model, pruned, plan, amplitudes):
                q = logits_of(model(images)).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    slope = (divergence(1 + 1e-4) - divergence(1 - 1e-4)) / 2e-4
    assert shares[name] == pytest.approx(slope / 2, rel=1e-4)


def test_an_attention_whose_module_is_never_called_keeps_its_costs(caplog: pytest.LogCaptureFixture) -> None:
    model, sites, statistics, images = setting("timm-vit")
    plan = shared_plan(sites, scores_for(sites), unit_savings(sites, {site.name: 1.0 for site in sites}), share=0.5)
    pruned = copy.deepcopy(model)
    prune_(pruned, plan, statistics.means, statistics.covariances)
    name, block = "blocks.0.attn.proj", model.get_submodule("blocks.0")
    attention, forward = type(block.get_submodule("attn")), type(block).forward

    def past_the_module(x: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "__call__", lambda self, *args, **more: self.forward(*args, **more))
            out: Tensor = forward(block, x)
        return out

    block.forward = past_the_module  # type: ignore[method-assign]
    with caplog.at_level("INFO"):
        shares = DenseReference(model, [images]).site_contributions(pruned, plan)
    assert name not in shares
    assert f"what {name} add to the divergence is not known" in caplog.text
    asked = cost_multipliers(dict.fromkeys([*shares, name], 1.0), shares)
    assert asked[name] == 1.0


def test_plans_that_cost_too_much_are_no_candidates() -> None:
    model, sites, statistics, images = setting("timm-vit")
    rules = PlanRules(attn_shared=True)
    target = BudgetTarget.of(Budget.of(target_macs=0.45), model, sites, images[:1], rules)
    search = AutoSearch(model, sites, statistics, GivenImages([images]), rules, savings=target.savings())
    choice = search.plan_of_size(
        lambda plan_for: target.proposal(plan_for, compensated=True),
        "45 % of the MACs",
        affordable=lambda plan: target.affords(plan, compensated=True),
    )
    names = [one.name for one in choice.tried]
    assert "sensitivity" in names
    assert not any("MLPs alone" in name for name in names)
    assert target.costs.macs_of(choice.plan) <= 0.45 * target.costs.macs


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"keep_ratio must be in \(0, 1\], got 1.5"):
        shared_plan((), {}, {}, share=1.5)
