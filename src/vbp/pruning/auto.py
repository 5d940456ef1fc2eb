"""The criterion `auto`: budgets, order and refit from the model's own sensitivity; the choice by measured divergence.

Inside a site the channels go in the order of greedy elimination, in a metric in which a step costs nats of the
predictions' divergence. Between sites these costs compete, and two things make them wrong: what sites do to one
another, and what the second order leaves out. So several plans are pruned, on copies, and judged by the predictions
on a few calibration images: the same share everywhere, the costs as they are, the paper's variance, mixtures, and
costs times a price for each site, found by asking the pruned model which sites are to blame. No labels, no training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.covariance import ChannelCovariance
from vbp.method.elimination import Elimination, eliminate
from vbp.method.ridge import RIDGE
from vbp.pruning.attention_costs import direction_costs
from vbp.pruning.competition import PlanCompetition, Sizing
from vbp.pruning.divergence import HELD_OUT_IMAGES, DenseReference
from vbp.pruning.make_plan import PlanRules, shares_budget
from vbp.pruning.plan import PlanChoice, PruningPlan
from vbp.pruning.readers import joint_matrix, metric_of, ridge_of
from vbp.runtime.fingerprints import json_fingerprint
from vbp.sites.site import Reader, Site, units_of
from vbp.statistics.images import ImageSource
from vbp.statistics.objective import Objective
from vbp.statistics.statistics import Statistics, observed_names

_log = logging.getLogger(__name__)


def refit_metrics(sites: Sequence[Site], statistics: Statistics) -> dict[str, ChannelCovariance]:
    """Return the covariances that the refit and the principal basis take: mixed with the sensitivity of the site.

    Raises:
        InputError: Covariances or sensitivities are missing.
    """
    metrics = dict(statistics.covariances)
    for site in sites:
        held = statistics.sensitivities if site.consumer else statistics.logit_sensitivities
        names = observed_names(site)
        wanted = names if site.consumer else (site.name,)
        if any(name not in held for name in wanted) or any(name not in metrics for name in names):
            raise InputError(
                f"the criterion auto needs covariance and sensitivity of site {site.name}, got "
                f"{'only the covariance' if site.name not in held and names[0] in metrics else 'no covariance'}; "
                "collect statistics with covariance=True and sensitivity=RandomProbes()"
            )
        if site.consumer:
            for name in names:
                metrics[name] = statistics.sensitivities[name].blended_covariance(metrics[name])
        elif site.rotatable:
            query, key = names
            pair = statistics.logit_sensitivities[site.name]
            metrics[query], metrics[key] = pair.blended(metrics[query], metrics[key])
    return metrics


def sensitivity_eliminations(
    model: nn.Module, sites: Sequence[Site], statistics: Statistics, *, ridge: float = RIDGE
) -> dict[str, Elimination]:
    """Order the channels of each MLP site by what their loss costs after the refit, in nats, where the model is.

    Raises:
        InputError: Covariances or sensitivities are missing or unfit.
    """
    metrics = refit_metrics(sites, statistics)

    def in_nats(reader: Reader, weight: Tensor) -> Tensor:
        plain = statistics.covariances[reader.key].to(weight.device)
        return statistics.sensitivities[reader.key].to(weight.device).scaled_weight(weight, plain)

    orders = {}
    for site in sites:
        if site.kind != "mlp":
            continue
        weighed = joint_matrix(model, site, statistics, in_nats)
        measured = metrics[site.name].to(weighed.device)
        metric = metric_of(model, site.readers[0], measured.covariance)
        try:
            orders[site.name] = eliminate(
                metric, weighed, ridge=ridge_of(model, site.readers[0], measured, ridge), heads=site.heads
            ).to("cpu")
        except InputError as error:
            raise InputError(f"site {site.name}: {error}") from error
    return orders


def auto_plan(
    model: nn.Module,
    sites: Sequence[Site],
    statistics: Statistics,
    reference: DenseReference,
    *,
    keep_ratio: float,
    min_keep_ratio: float = 0.02,
    round_to: int = 1,
    attn_keep_ratio: float | None = None,
    equal_widths: bool = False,
    ridge: float = RIDGE,
    orders: Mapping[str, Elimination] | None = None,
    progress: Callable[[str], None] | None = None,
) -> PlanChoice:
    """Choose the plan whose pruned, refitted model predicts most like the dense one.

    Deterministic, and the same on all processes of `reference`, which must all call it.

    Args:
        model: The dense model; left as it was.
        sites: From `find_sites`.
        statistics: Of this model, with covariances and sensitivities.
        reference: Of some hundred calibration images, which may be among those of the statistics.
        keep_ratio: As for `make_plan`, as are the next three.
        min_keep_ratio: See above.
        round_to: See above.
        attn_keep_ratio: See above. Where any basis serves, heads are cut in their principal one; other channels of
            attention go in the order of their variance.
        equal_widths: Let sites of one width keep as many channels; there is one such plan.
        ridge: Of the refit.
        orders: From `sensitivity_eliminations`, where several plans are made from them.
        progress: Told the name of each candidate before it is tried.

    Raises:
        InputError: A number is out of range, or statistics are missing or unfit.

    Example:
        >>> choice = vbp.auto_plan(model, sites, statistics, reference, keep_ratio=0.5)
        >>> errors = vbp.prune_(model, choice.plan, choice.means, choice.covariances)
    """
    rules = PlanRules("equal" if equal_widths else "global", round_to, min_keep_ratio, attn_keep_ratio)
    if orders is None:
        orders = sensitivity_eliminations(model, sites, statistics, ridge=ridge)
    metrics = refit_metrics(sites, statistics)
    search = PlanCompetition(
        model, sites, statistics, metrics, reference, rules, ridge, lambda plan_for: plan_for(keep_ratio), progress
    )
    return search.run({name: order.scores for name, order in orders.items()})


@dataclass(frozen=True)
class AutoSearch:
    """Search plans of several sizes for one dense model; what does not depend on the size is done once.

    All processes make it and call it alike. The first of the images compare plans. All plans have the floor and the
    rounding of the rules; of their scopes, `equal` alone makes a difference. Costs of the sites in `savings` are
    divided by what a channel saves there; rules by which attention shares the budget need those of all sites.
    """

    model: nn.Module
    sites: Sequence[Site]
    statistics: Statistics
    images: ImageSource
    rules: PlanRules
    ridge: float = RIDGE
    savings: Mapping[str, float] = field(default_factory=dict)
    objective: Objective | None = None

    @cached_property
    def _orders(self) -> Mapping[str, Elimination]:
        return sensitivity_eliminations(self.model, self.sites, self.statistics, ridge=self.ridge)

    @cached_property
    def _metrics(self) -> Mapping[str, ChannelCovariance]:
        return refit_metrics(self.sites, self.statistics)

    @cached_property
    def _costs(self) -> Mapping[str, Tensor]:
        """Return the nats of each channel of an MLP, and of each direction of an attention that shares the budget."""
        costs = {name: order.scores for name, order in self._orders.items()}
        for unit in units_of(self.sites) if self.rules.attn_shared else ():
            if unit[0].kind != "mlp" and shares_budget(unit):
                name = unit[0].name
                costs[name] = direction_costs(self.model, unit, self.statistics, self._metrics, ridge=self.ridge)
        return costs

    @cached_property
    def _reference(self) -> DenseReference:
        return DenseReference.held_out(self.model, self.images, range(HELD_OUT_IMAGES), self.objective)

    def plan(self, keep_ratio: float) -> PlanChoice:
        """Search the plan that keeps this share; otherwise as `plan_of_size`."""
        return self.plan_of_size(lambda plan_for: plan_for(keep_ratio), f"keep {keep_ratio:g}")

    def plan_of_size(
        self, size: Sizing, label: str, *, affordable: Callable[[PruningPlan], bool] = lambda plan: True
    ) -> PlanChoice:
        """Search among plans of one size, which `size` makes of each candidate's plans of all keep ratios.

        Where attention shares the budget, plans of MLPs alone may not reach it: then they are not `affordable`.

        Raises:
            InputError: Statistics are missing or unfit, or the processes do not find the same.
        """
        session = self.images.session
        with session.timed("search"), session.progress_steps(f"auto, {label}", "plan") as tell:
            known = self.model, self.sites, self.statistics, self._metrics, self._reference, self.rules, self.ridge
            best = PlanCompetition(*known, size, tell, self.savings, affordable).run(self._costs)
        session.processes.check_same("plan", json_fingerprint(best.plan.to_dict()))
        return best
