"""What a channel saves of a budget's quantity, and plans of one cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from vbp import Budget, PruningPlan, Site, find_sites, make_plan
from vbp.cost.target import BudgetTarget
from vbp.cost.widths import LayerTimes, TimedUnit, TimingConditions
from vbp.pruning.make_plan import PlanRules

EXAMPLE = torch.zeros(1, 3, 16, 16)
RULES = PlanRules()


def network() -> tuple[nn.Module, tuple[Site, ...]]:
    """Return two sites of the same shape, the second one at a quarter of the positions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.AvgPool2d(2),
        nn.Conv2d(4, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    sites = find_sites(model, torch.randn(1, 3, 16, 16))
    assert [site.name for site in sites] == ["1", "5"]
    return model, sites


def target(budget: Budget, times: LayerTimes | None = None) -> BudgetTarget:
    return BudgetTarget.of(budget, *network(), EXAMPLE, RULES, times)


def test_savings_are_those_of_the_budgets_quantity() -> None:
    assert target(Budget.of(target_macs=0.5)).savings() == pytest.approx({"1": 1.6, "5": 0.4})
    assert target(Budget.of(target_params=0.8)).savings() == pytest.approx({"1": 1.0, "5": 1.0})


def test_savings_of_time_come_from_the_measured_layers() -> None:
    conditions = TimingConditions("a machine", 1, "float32", (8, 3, 16, 16), "2.15", "abc", 1, "wall")
    units = TimedUnit(("1",), "1"), TimedUnit(("5",), "5")
    curves = {"1": ((4, 1.0), (16, 7.0)), "5": ((4, 2.0), (16, 2.0))}
    times = LayerTimes(conditions, 10.0, units, curves)
    # The second saves nothing, and counts as a thousandth.
    assert target(Budget.of(target_speedup=1.2), times).savings() == pytest.approx(
        {"1": 2 / 1.001, "5": 0.002 / 1.001}
    )


def test_proposals_cost_the_same_whatever_the_scores() -> None:
    _, sites = network()
    aim = target(Budget.of(target_macs=0.6))

    def plans(first: float) -> Callable[[float], PruningPlan]:
        scores = {"1": torch.rand(16) * first, "5": torch.rand(16)}
        return lambda keep_ratio: make_plan(sites, scores, keep_ratio=keep_ratio)

    cheap, dear = (aim.proposal(plans(factor), compensated=True) for factor in (1e-3, 1e3))
    assert cheap.kept > dear.kept
    for plan in (cheap, dear):
        assert 0.55 * aim.costs.macs < aim.costs.macs_of(plan) <= 0.6 * aim.costs.macs
    same = aim.proposal(plans(1.0), compensated=True, like=dear)
    assert aim.costs.macs_of(same) <= aim.costs.macs_of(dear)
    assert target(Budget.of(keep_ratio=0.5)).proposal(plans(1.0), compensated=True).kept == 16
