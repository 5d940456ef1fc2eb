"""The search finds what trying every keep ratio finds, and says what can be reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from vbp import InputError, PlanCost, PruningPlan, Site, find_sites, make_plan, plan_cost
from vbp.cost.budget import Budget
from vbp.cost.search import PlanSearch, check_reachable, meet_count
from vbp.cost.widths import WidthCosts
from vbp.runtime.choices import Scope


def swin(attention: bool = False) -> tuple[nn.Module, tuple[Site, ...], Tensor]:
    """Return a model whose channels differ in cost from site to site."""
    family = FAMILIES["timm-swin"]
    model, image = family.build().eval(), family.example(1, torch.float32)
    return model, find_sites(model, image, attention=attention), image


def planner(sites: tuple[Site, ...], scope: Scope = "global", **options: float) -> Callable[[float], PruningPlan]:
    generator = torch.Generator().manual_seed(0)
    scores = {site.name: torch.rand(site.hidden, generator=generator) for site in sites}
    return lambda ratio: make_plan(sites, scores, keep_ratio=ratio, scope=scope, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("round_to", [1, 8])
def test_the_search_finds_what_trying_all_ratios_finds(scope: Scope, round_to: int) -> None:
    model, sites, image = swin()
    costs, plan_for = WidthCosts.of(model, sites, image), planner(sites, scope, round_to=round_to)
    total = sum(site.hidden for site in sites)
    plans = [plan_for(count / total) for count in range(round(0.02 * total) + 1, total + 1)]
    for cost in (costs.macs_of, costs.params_of):
        known = [(plan.kept, cost(plan)) for plan in plans]
        lowest, highest = known[0][1], known[-1][1]
        for part in range(1, 8):
            limit = lowest + (highest - lowest) * part / 8
            found = PlanSearch(plan_for).largest(cost, limit)
            assert found is not None
            assert cost(found) <= limit
            assert found.kept == max(kept for kept, spent in known if spent <= limit)
            assert found.kept == found.requested  # the plan names the ratio that it has
        assert PlanSearch(plan_for).largest(cost, lowest - 1) is None


def test_few_plans_are_made_on_the_way() -> None:
    model, sites, image = swin()
    costs, plan_for, asked = WidthCosts.of(model, sites, image), planner(sites), list[float]()

    def counted(ratio: float) -> PruningPlan:
        asked.append(ratio)
        return plan_for(ratio)

    PlanSearch(counted).largest(costs.macs_of, 0.8 * costs.macs)
    assert len(asked) <= 2 + 9 + len(sites) + 1  # ends, bisection of 320 channels, look-ahead, the last
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize(("quantity", "share"), [("target_macs", 0.8), ("target_params", "70%")])
def test_the_result_is_counted_on_a_copy(quantity: str, share: float | str) -> None:
    model, sites, image = swin(attention=True)
    costs, plan_for = WidthCosts.of(model, sites, image), planner(sites, attn_keep_ratio=0.75)
    found = meet_count(Budget.of(**{quantity: share}), plan_for, costs, lambda plan: plan_cost(model, plan, image))
    counted = plan_cost(model, found.plan, image)
    spent = counted.macs if quantity == "target_macs" else counted.params
    assert found.met
    assert (found.dense, found.reached) == spent
    assert found.reached <= found.target
    one_more = plan_for((found.plan.kept + 1) / found.plan.total)
    more = plan_cost(model, one_more, image)
    assert (more.macs if quantity == "target_macs" else more.params)[1] > found.target
    heads = {len(entry.keep) / entry.site.hidden for entry in found.plan.sites if entry.site.kind != "mlp"}
    assert heads == {0.75}


def test_a_target_that_is_met_exactly_is_met() -> None:
    model, sites, image = swin()
    costs, plan_for = WidthCosts.of(model, sites, image), planner(sites)
    macs = costs.macs_of(plan_for(0.5))
    found = meet_count(Budget("macs", macs), plan_for, costs, lambda plan: plan_cost(model, plan, image))
    assert (found.reached, found.met, found.miss) == (macs, True, 0)
    below = meet_count(Budget("macs", macs - 1), plan_for, costs, lambda plan: plan_cost(model, plan, image))
    assert below.plan.kept == found.plan.kept - 1


def test_the_count_on_the_copy_decides_against_the_computed_one() -> None:
    model, sites, image = swin()
    costs, plan_for = WidthCosts.of(model, sites, image), planner(sites)

    def dearer(plan: PruningPlan) -> PlanCost:
        return PlanCost((costs.macs, costs.macs_of(plan) + 5_000), (costs.params, costs.params_of(plan)))

    budget = Budget("macs", 0.8)
    found, plain = (
        meet_count(budget, plan_for, costs, exact) for exact in (dearer, lambda plan: plan_cost(model, plan, image))
    )
    assert found.met
    assert found.plan.kept < plain.plan.kept
    # One that is wrong by more than any plan can make up for is reported, not hidden.
    hopeless = meet_count(budget, plan_for, costs, lambda _: PlanCost((costs.macs, costs.macs), (0, 0)))
    assert not hopeless.met
    assert hopeless.reason
    assert hopeless.miss == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            Budget("macs", 0.01),
            r"target_macs must be from .*0\.\d+ of it \(every site at its floor: min_keep_ratio 0.3",
        ),
        (Budget("macs", 1e12), r"to below .* \(the dense model\), got 1000.00 G; lower it"),
        (Budget("params", 2.0), r"target_params must be from .*raise it or lower min_keep_ratio"),
    ],
)
def test_what_cannot_be_reached_is_refused_with_the_range(budget: Budget, message: str) -> None:
    model, sites, image = swin()
    costs, plan_for = WidthCosts.of(model, sites, image), planner(sites, min_keep_ratio=0.3)
    with pytest.raises(InputError, match=message):
        check_reachable(budget, plan_for, costs)
    with pytest.raises(InputError, match=message):
        meet_count(budget, plan_for, costs, lambda plan: plan_cost(model, plan, image))
    check_reachable(Budget("speedup", 50.0), plan_for, costs)


def test_a_keep_ratio_between_two_steps_is_reported() -> None:
    model, sites, image = swin()
    costs = WidthCosts.of(model, sites, image)
    total = sum(site.hidden for site in sites)
    budget = Budget("keep_ratio", (total / 2 + 6) / total)
    found = meet_count(budget, planner(sites, round_to=8), costs, lambda plan: plan_cost(model, plan, image))
    assert (found.reached, found.target, found.met) == (total / 2 + 8, total / 2 + 6, False)
    assert "round_to 8" in found.reason
    under = replace(budget, amount=(total / 2 + 2) / total)
    assert meet_count(under, planner(sites, round_to=8), costs, lambda plan: plan_cost(model, plan, image)).met
