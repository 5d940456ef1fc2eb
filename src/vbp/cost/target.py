"""A budget of one model: whether it can be reached, checked before there are scores, and the plan that meets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from vbp.cost.budget import Budget, BudgetResult
from vbp.cost.latency_search import allowed_share, check_faster, check_reachable_time, meet_latency
from vbp.cost.macs import plan_cost
from vbp.cost.search import PlanFor, PlanSearch, check_reachable, counted, meet_count
from vbp.cost.timing import LatencyComparison
from vbp.cost.widths import LayerTimes, WidthCosts
from vbp.errors import InputError
from vbp.pruning.make_plan import PlanRules
from vbp.pruning.plan import PruningPlan
from vbp.sites.site import Site


@dataclass(frozen=True)
class BudgetTarget:
    """A budget of one model, with the costs of the dense model, and its times here if the budget is one of time.

    `keep_ratio` is the share of the channels that meets the budget where all sites keep the same share, as far as can
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
        rules: PlanRules,
        times: LayerTimes | None = None,
        compare: Callable[[PruningPlan], LatencyComparison] | None = None,
    ) -> BudgetTarget:
        """Check whether a budget can be reached, and estimate where; a budget of time still to be met needs `times`.

        Without `compare`, which measures a plan, a time out of reach is not refused.

        Raises:
            InputError: No plan meets it, or the dense model does.
        """
        equal_shares = partial(rules.neutral, sites)
        costs = WidthCosts.of(model, sites, example)
        if budget.quantity == "keep_ratio":
            total = sum(site.hidden for site in sites if site.kind == "mlp")
            if total and round(total * budget.amount) < 1:
                raise InputError(
                    f"keep_ratio must ask for one of the {total} hidden channels at least, got {budget.amount:g}; "
                    f"give {1 / total:.2g} or more"
                )
            return BudgetTarget(budget, costs, times, budget.amount)
        if budget.timed and times is None:
            return BudgetTarget(budget, costs, None, 1.0)
        search = PlanSearch(equal_shares)
        if times is not None:
            check_faster(budget, times)
            if compare is not None:
                check_reachable_time(budget, search.floor, times, compare)
            plan = search.largest(times.share, allowed_share(budget, times.dense_ms))
        else:
            check_reachable(budget, equal_shares, costs)
            cost, dense = counted(budget, costs)
            plan = search.largest(cost, budget.limit(dense))
        return BudgetTarget(budget, costs, times, share_of(plan or search.floor))

    def savings(self) -> dict[str, float]:
        """Return what a channel of each site saves in the budget's quantity, as a share of the mean channel's.

        From the dense model's widths, and for a budget of time from the measured layers. A channel that saves next to
        nothing counts as one that saves a thousandth of the best.
        """
        if self.times is not None:
            saved = self.times.saved_by_channel()
        else:
            which = ("macs", "params").index(self.budget.quantity)
            saved = {site.name: self.costs.of_site(site)[which] / site.hidden for site in self.costs.sites}
        least = max(saved.values()) / 1000
        saved = {name: max(value, least) for name, value in saved.items()}
        hidden = {site.name: site.hidden for site in self.costs.sites}
        mean = sum(saved[name] * hidden[name] for name in saved) / sum(hidden[name] for name in saved)
        return {name: value / mean for name, value in saved.items()}

    def proposal(self, plan_for: PlanFor, *, compensated: bool, like: PruningPlan | None = None) -> PruningPlan:
        """Return the largest of some plans that is computed to meet the budget, or to cost no more than another plan.

        The narrowest one if none does. A time is predicted from that of the layers.
        """
        if self.budget.quantity == "keep_ratio" or (self.budget.timed and self.times is None):
            return plan_for(self.keep_ratio)
        search, (cost, limit) = PlanSearch(plan_for), self._limited(compensated=compensated)
        return search.largest(cost, limit if like is None else cost(like)) or search.floor

    def affords(self, plan: PruningPlan, *, compensated: bool) -> bool:
        """Return whether a plan is computed to meet the budget; a keep ratio is met by the plan's rules."""
        if self.budget.quantity == "keep_ratio" or (self.budget.timed and self.times is None):
            return True
        cost, limit = self._limited(compensated=compensated)
        return cost(plan) <= limit

    def _limited(self, *, compensated: bool) -> tuple[Callable[[PruningPlan], float], float]:
        """Return the computed cost of a plan, and the most that it may be."""
        if self.times is not None:
            return self.times.share, allowed_share(self.budget, self.times.dense_ms)
        cost, dense = counted(self.budget, self.costs, compensated=compensated)
        return cost, self.budget.limit(dense)

    def meet(
        self,
        plan_for: PlanFor,
        model: nn.Module,
        example: Tensor,
        compare: Callable[[PruningPlan], LatencyComparison],
        *,
        compensated: bool,
    ) -> BudgetResult:
        """Find the largest plan that meets the budget, by `meet_latency` or `meet_count`."""
        if self.times is not None:
            return meet_latency(self.budget, plan_for, self.times, compare)
        return meet_count(
            self.budget, plan_for, self.costs, lambda plan: plan_cost(model, plan, example), compensated=compensated
        )


def share_of(plan: PruningPlan) -> float:
    """Return the share of the MLP channels that a plan keeps."""
    return plan.kept / plan.total if plan.total else plan.keep_ratio
