"""Budgets are read in one place, and their results say what is missed, by how much and why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vbp import InputError, PruningPlan, Site, SitePlan
from vbp.cost.budget import Budget, BudgetResult, parse_amount

PLAN = PruningPlan((SitePlan(Site(("a",), "b", 10), tuple(range(7))),), 0.7, "global")


@pytest.mark.parametrize(
    ("text", "number"),
    [("0.75", 0.75), ("75%", 0.75), ("1.1G", 1.1e9), (" 4.3 M ", 4.3e6), ("940e6", 9.4e8), ("12k", 12e3), (7, 7.0)],
)
def test_amounts_are_read_as_people_write_them(text: float | str, number: float) -> None:
    assert parse_amount("target_macs", text) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize("value", ["", "much", "-1", "0", "1.1g", "1,1G", "nan", "inf", 0, -0.5, float("nan"), True])
def test_what_is_no_amount_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"target_macs must be a number above 0, got .*; write 0.75"):
        parse_amount("target_macs", value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "one budget.*got none"),
        ({"keep_ratio": 0.5, "target_macs": 0.5}, "one budget.*got keep_ratio and target_macs"),
        ({"keep_ratio": 1.5}, r"keep_ratio must be in \(0, 1\]"),
        ({"target_macs": "100%"}, r"target_macs must be a share in \(0, 1\) or a count, got 1.0"),
        ({"target_params": 1.2}, "target_params must be a share"),
        ({"target_speedup": 1.0}, "target_speedup must be above 1"),
        ({"target_latency_ms": 0.0}, "target_latency_ms must be a number above 0"),
    ],
)
def test_a_budget_is_one_sensible_number(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget.of(**given)


def test_shares_are_of_the_dense_model_and_counts_are_counts() -> None:
    assert Budget.of(target_macs="0.5").limit(1_000) == 500
    assert Budget.of(target_macs="0.3k").limit(1_000) == 300
    assert Budget.of(keep_ratio=1.0).limit(1_000) == 1_000
    assert [Budget.of(target_speedup=2).timed, Budget.of(target_params=0.5).timed] == [True, False]


def test_a_budget_of_no_channels_is_met_by_none() -> None:
    """A model whose attention alone is pruned has no hidden channels of MLPs."""
    result = BudgetResult(Budget.of(keep_ratio=0.5), PLAN, target=0, dense=0, reached=0, met=True)
    assert result.to_dict()["miss"] == 0


def test_a_keep_ratio_is_told_only_where_it_is_missed() -> None:
    assert not BudgetResult(Budget.of(keep_ratio=0.5), PLAN, 5, 10, 5, True).is_told
    assert BudgetResult(Budget.of(keep_ratio=0.5), PLAN, 5, 10, 7, False, "why").is_told


def test_a_miss_is_positive_on_the_wrong_side_of_the_target() -> None:
    slow = BudgetResult(Budget("speedup", 2.0), PLAN, 2.0, 1.0, 1.5, False, "why", 1.9, (1.4, 1.6))
    assert slow.miss == pytest.approx(0.25)
    assert slow.sentence() == (
        "budget target_speedup 2.000x (dense 1.000x): 1.500x measured (1.400x to 1.600x), 1.900x predicted; "
        "missed by 25.00%: why"
    )
    small = BudgetResult(Budget("macs", 0.5), PLAN, 1e9, 2e9, 0.9e9, True)
    assert small.miss == pytest.approx(-0.1)
    assert small.sentence() == "budget target_macs 1.00 G MACs (dense 2.00 G MACs): 900.00 M MACs; met"
    assert slow.is_told
    assert small.is_told
    plain = json.loads(json.dumps(slow.to_dict()))
    assert plain["budget"] == {"quantity": "speedup", "amount": 2.0}
    assert (plain["spread"], plain["kept"], plain["channels"], plain["met"]) == ([1.4, 1.6], 7, 10, False)
