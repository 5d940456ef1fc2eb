"""A budget and a model together: whether it can be reached, before there are scores, and the plan that meets it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vbp.cost.budget import Budget, BudgetResult, PlanFor, PlanSearch
from vbp.cost.latency_search import allowed_share, check_faster, meet_latency
from vbp.cost.macs import PlanCost, format_count, plan_cost
from vbp.cost.timing import LatencyComparison
from vbp.cost.widths import LayerTimes, WidthCosts
from vbp.errors import InputError
from vbp.pruning.make_plan import make_plan
from vbp.pruning.plan import PruningPlan
from vbp.sites.site import Site

# A count on a copy may differ from the computed one by what `WidthCosts` says; once is enough for that.
_CORRECTIONS = 4


@dataclass(frozen=True)
class BudgetTarget:
    """A budget of one model.

    Attributes:
        budget: As it was asked for.
        costs: Of the dense model.
        times: Of the dense model here, if the budget is one of time.
        keep_ratio: Share of the channels that meets the budget where all sites keep the same share, as far as can
            be computed; 1 for a budget of time without times.
    """

    budget: Budget
    costs: WidthCosts
    times: LayerTimes | None
    keep_ratio: float

    @staticmethod
    def of(
        budget: Budget,
        model: nn.Module,
        sites: Sequence[Site],
        example: Tensor,
        times: LayerTimes | None = None,
        **rules: Any,
    ) -> BudgetTarget:
        """See whether a budget can be reached, and about where.

        Args:
            budget: What the pruned model may cost.
            model: The dense model.
            sites: From `find_sites`.
            example: One image or more on the model's device.
            times: Of this model, for a budget of time that is still to be met.
            rules: Of the plans: `round_to`, `min_keep_ratio` and `attn_keep_ratio` of `make_plan`.

        Raises:
            InputError: No plan meets it, or the dense model does.
        """

        def equal_shares(keep_ratio: float) -> PruningPlan:
            return neutral_plan(sites, keep_ratio=keep_ratio, **rules)

        costs = WidthCosts.of(model, sites, example)
        if budget.quantity == "keep_ratio":
            return BudgetTarget(budget, costs, times, budget.amount)
        if budget.timed and times is None:
            return BudgetTarget(budget, costs, None, 1.0)
        search = PlanSearch(equal_shares)
        if times is not None:
            check_faster(budget, times)
            plan = search.largest(times.share, allowed_share(budget, times.dense_ms))
        else:
            check_reachable(budget, equal_shares, costs)
            cost, dense = _counted(budget, costs, compensated=False)
            plan = search.largest(cost, budget.limit(dense))
        return BudgetTarget(budget, costs, times, share_of(plan or search.floor))

    def meet(
        self,
        plan_for: PlanFor,
        model: nn.Module,
        example: Tensor,
        compare: Callable[[PruningPlan], LatencyComparison],
        *,
        compensated: bool,
    ) -> BudgetResult:
        """Find the largest plan that meets the budget.

        Args:
            plan_for: Keep ratio -> plan; deterministic.
            model: The dense model.
            example: One image or more on the model's device.
            compare: Times the dense model beside a pruned copy.
            compensated: Whether consumers without bias will gain one.
        """
        if self.times is not None:
            return meet_latency(self.budget, plan_for, self.times, compare)
        return meet_count(
            self.budget, plan_for, self.costs, lambda plan: plan_cost(model, plan, example), compensated=compensated
        )


def neutral_plan(sites: Sequence[Site], **options: Any) -> PruningPlan:
    """Return a plan of the right widths before there are scores, the same share in every site.

    Args:
        sites: From `find_sites`.
        options: Of `make_plan`.
    """
    scores = {site.name: torch.zeros(site.hidden) for site in sites}
    return make_plan(sites, scores, **{"scope": "per_layer", **options})


def share_of(plan: PruningPlan) -> float:
    """Return the share of the MLP channels that a plan keeps."""
    return plan.kept / plan.total if plan.total else plan.keep_ratio


def check_reachable(budget: Budget, plan_for: PlanFor, costs: WidthCosts) -> None:
    """Refuse a budget of MACs or parameters that no plan meets, or that the dense model meets.

    The scores do not matter: at the floor and at full width every plan is the same, so this can be checked before
    any statistics are collected. A keep ratio, a latency and a speed-up pass.

    Raises:
        InputError: The reachable range is named.
    """
    if budget.quantity in ("macs", "params"):
        _check_range(budget, PlanSearch(plan_for), *_counted(budget, costs, compensated=True))


def meet_count(
    budget: Budget,
    plan_for: PlanFor,
    costs: WidthCosts,
    exact: Callable[[PruningPlan], PlanCost],
    *,
    compensated: bool = True,
) -> BudgetResult:
    """Find the largest keep ratio whose plan meets a budget of MACs, parameters or channels.

    Args:
        budget: Of a keep ratio (the nearest reachable plan is taken), MACs or parameters.
        plan_for: Keep ratio -> plan, by the scores and rules of the run; deterministic. It also says what becomes of
            attention.
        costs: Of the dense model.
        exact: `plan_cost` of the dense model: what decides in the end.
        compensated: Whether consumers without bias will gain one, which counts as parameters.

    Raises:
        InputError: No plan meets it, or the dense model does: the reachable range is named.
    """
    if budget.quantity == "keep_ratio":
        return _by_channels(budget, plan_for(budget.amount))
    search = PlanSearch(plan_for)
    cost, dense = _counted(budget, costs, compensated=compensated)
    _check_range(budget, search, cost, dense)
    target = limit = budget.limit(dense)
    for _ in range(_CORRECTIONS):
        plan = search.largest(cost, limit) or search.floor
        reached = _exact(budget, exact(plan), costs, plan, compensated=compensated)
        if reached <= target or plan is search.floor:
            break
        limit -= reached - target
    why = "" if reached <= target else "the count on a pruned copy exceeds what was computed from the widths"
    return BudgetResult(budget, plan, target, dense, reached, reached <= target, why)


def _counted(budget: Budget, costs: WidthCosts, *, compensated: bool) -> tuple[Callable[[PruningPlan], float], int]:
    """Return what a plan costs of the budget's quantity, and what the dense model costs."""
    if budget.quantity == "macs":
        return costs.macs_of, costs.macs
    return lambda plan: costs.params_of(plan, compensated=compensated), costs.params


def _exact(budget: Budget, counted: PlanCost, costs: WidthCosts, plan: PruningPlan, *, compensated: bool) -> int:
    if budget.quantity == "macs":
        return counted.macs[1]
    gained = costs.params_of(plan, compensated=compensated) - costs.params_of(plan)
    return counted.params[1] + gained


def _check_range(budget: Budget, search: PlanSearch, cost: Callable[[PruningPlan], float], dense: int) -> None:
    limit, lowest = budget.limit(dense), cost(search.floor)
    if lowest <= limit < dense:
        return
    whole = search.whole
    raise InputError(
        f"{budget.flag} must be from {_both(lowest, dense)} (every site at its floor: min_keep_ratio "
        f"{whole.min_keep_ratio}, round_to {whole.round_to}) to below {format_count(dense)} (the dense model), got "
        f"{_both(limit, dense)}; {'lower it' if limit >= dense else 'raise it or lower min_keep_ratio'}"
    )


def _both(count: float, dense: int) -> str:
    return (
        f"{format_count(math.ceil(count))}, {count / dense:.3f} of it" if count < dense else format_count(int(count))
    )


def _by_channels(budget: Budget, plan: PruningPlan) -> BudgetResult:
    reason = f"no nearer count with round_to {plan.round_to} and min_keep_ratio {plan.min_keep_ratio}"
    met = plan.kept <= plan.requested
    return BudgetResult(budget, plan, plan.requested, plan.total, plan.kept, met, "" if met else reason)
