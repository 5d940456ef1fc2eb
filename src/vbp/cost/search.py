"""Find the largest plan that meets a budget of MACs, parameters or channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from vbp.cost.budget import Budget, BudgetResult
from vbp.cost.macs import PlanCost
from vbp.cost.widths import WidthCosts
from vbp.errors import InputError
from vbp.pruning.plan import PruningPlan
from vbp.runtime.tables import format_count

PlanFor = Callable[[float], PruningPlan]

# A count on a copy may differ from the computed one by what `WidthCosts` says; once is enough for that.
_CORRECTIONS = 4


class PlanSearch:
    """The plans of all keep ratios, from the floor (the fewest channels) to the whole dense model, each made once.

    The function of the keep ratio that makes them must be deterministic.
    """

    def __init__(self, plan_for: PlanFor) -> None:
        self._plan_for, self._plans = plan_for, dict[int, PruningPlan]()
        self.whole = plan_for(1.0)
        self._lowest = self.whole.min_keep_ratio
        # Attention alone is pruned by shares that no number of MLP channels stands for.
        self._total = self.whole.total or sum(entry.site.hidden for entry in self.whole.sites)
        self._plans[self._total] = self.whole
        self._first = max(1, math.ceil(self._total * self._lowest - 1e-9))
        self.floor = self._plan(self._first)

    def largest(self, cost: Callable[[PruningPlan], float], limit: float) -> PruningPlan | None:
        """Return the plan that keeps most among those that cost no more than `limit`; None if the floor costs more.

        Bisection: a plan that keeps more costs more. Rounding makes exceptions over a few channels, where one site
        is exchanged for another that costs more; so the next plans above the first that costs too much are tried.
        """
        low, high = self._first, self._total
        if cost(self.floor) > limit:
            return None
        if cost(self.whole) <= limit:
            return self.whole
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(self._plan(middle)) <= limit else (low, middle)
        step = self.whole.round_to
        for number in range(high + 1, min(self._total, high + step * len(self.whole.sites)), step):
            if cost(self._plan(number)) <= limit:
                low = number
        return self._exact_request(self._plan(low))

    def _plan(self, number: int) -> PruningPlan:
        """Return the plan that asks for this number of channels."""
        if number not in self._plans:
            # The division must not fall below the floor by a binary fraction.
            self._plans[number] = self._plan_for(max(number / self._total, self._lowest))
        return self._plans[number]

    def _exact_request(self, plan: PruningPlan) -> PruningPlan:
        """Return the plan of a request for the channels that a plan keeps, where rounding changed their number."""
        if not plan.total or plan.kept == plan.requested:
            return plan
        again = self._plan(max(plan.kept, self._first))
        return again if [entry.keep for entry in again.sites] == [entry.keep for entry in plan.sites] else plan


def check_reachable(budget: Budget, plan_for: PlanFor, costs: WidthCosts) -> None:
    """Refuse a budget of MACs or parameters that no plan meets, or that the dense model meets.

    The scores do not matter: at the floor and at full width every plan is the same, so this can be checked before
    any statistics are collected. A keep ratio, a latency and a speed-up pass.

    Raises:
        InputError: The reachable range is named.
    """
    if budget.quantity in ("macs", "params"):
        _check_range(budget, PlanSearch(plan_for), *counted(budget, costs, compensated=True))


def meet_count(
    budget: Budget,
    plan_for: PlanFor,
    costs: WidthCosts,
    exact: Callable[[PruningPlan], PlanCost],
    *,
    compensated: bool = True,
) -> BudgetResult:
    """Find the largest keep ratio whose plan meets a budget of MACs, parameters or channels.

    Of a keep ratio the nearest reachable plan is taken. The counts of `exact` (`plan_cost` of the dense model) decide
    in the end; where consumers without bias will gain one (`compensated`), these count as parameters.

    Raises:
        InputError: No plan meets it, or the dense model does: the reachable range is named.
    """
    if budget.quantity == "keep_ratio":
        return _by_channels(budget, plan_for(budget.amount))
    search = PlanSearch(plan_for)
    cost, dense = counted(budget, costs, compensated=compensated)
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


def counted(
    budget: Budget, costs: WidthCosts, *, compensated: bool = False
) -> tuple[Callable[[PruningPlan], float], int]:
    """Return the function from a plan to its cost in the budget's quantity, and the cost of the dense model."""
    if budget.quantity == "macs":
        return costs.macs_of, costs.macs
    return partial(costs.params_of, compensated=compensated), costs.params


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
