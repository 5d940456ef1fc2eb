"""The criterion `auto`: budgets, order and refit from the model's own sensitivity; the choice by measured divergence.

Inside a site the channels go in the order of greedy elimination, in a metric in which a step costs nats of the
predictions' divergence. Between sites these costs compete, and two things make them wrong: what sites do to one
another, and what the second order leaves out. So several plans are pruned, on copies, and judged by the predictions
on a few calibration images: the same share everywhere, the costs as they are, the paper's variance, mixtures, and
costs times a price for each site, found by asking the pruned model which sites are to blame. No labels, no training.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.covariance import ChannelCovariance
from vbp.method.elimination import Elimination, eliminate, strictly_rising
from vbp.method.ridge import RIDGE
from vbp.pruning.criteria import variance_scores
from vbp.pruning.divergence import HELD_OUT_IMAGES, DenseReference, cost_multipliers, mean_multipliers
from vbp.pruning.make_plan import PlanRules
from vbp.pruning.plan import Candidate, PlanChoice, PruningPlan
from vbp.pruning.surgery import prune_
from vbp.runtime.choices import Scope
from vbp.runtime.fingerprints import json_fingerprint
from vbp.runtime.log_file import log_lines
from vbp.sites.site import Site
from vbp.statistics.images import ImageSource
from vbp.statistics.objective import Objective
from vbp.statistics.statistics import Statistics, observed_names

_log = logging.getLogger(__name__)

# Price updates. One brings most of the gain, the others less and less of the rest.
_ROUNDS = 3
Scores = Mapping[str, Float[Tensor, "hidden"]]
# From the plans of all keep ratios to the one that is wanted.
Sizing = Callable[[Callable[[float], PruningPlan]], PruningPlan]


def refit_metrics(sites: Sequence[Site], statistics: Statistics) -> dict[str, ChannelCovariance]:
    """Return the covariances that the refit and the principal basis take: mixed with the sensitivity of the site.

    Raises:
        InputError: Covariances or sensitivities are missing.
    """
    metrics = dict(statistics.covariances)
    for site in sites:
        held = statistics.sensitivities if site.consumer else statistics.logit_sensitivities
        names = observed_names(site)
        if site.name not in held or any(name not in metrics for name in names):
            raise InputError(
                f"the criterion auto needs covariance and sensitivity of site {site.name}, got "
                f"{'only the covariance' if site.name not in held and names[0] in metrics else 'no covariance'}; "
                "collect statistics with covariance=True and sensitivity=RandomProbes()"
            )
        if site.consumer:
            plain = metrics[site.name]
            metrics[site.name] = statistics.sensitivities[site.name].blended_covariance(plain)
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
    orders = {}
    for site in sites:
        if site.kind != "mlp":
            continue
        weight = model.get_submodule(site.consumer).weight
        assert isinstance(weight, Tensor)
        sensitivity = statistics.sensitivities[site.name].to(weight.device)
        plain = statistics.covariances[site.name].to(weight.device)
        weighed = sensitivity.scaled_weight(weight, plain)
        metric = metrics[site.name].to(weight.device).covariance
        try:
            orders[site.name] = eliminate(metric, weighed, ridge=ridge).to("cpu")
        except InputError as error:
            raise InputError(f"site {site.name}: {error}") from error
    return orders


def mixed_with_uniform(scores: Scores, share: float) -> dict[str, Float[Tensor, "hidden"]]:
    """Return scores between those given and equal shares for all sites, in the same order inside each site.

    A channel's place among all channels is mixed with a share of its place in its own site, both from 0 to 1.
    """
    everyone = torch.cat(list(scores.values()))
    among_all, start, mixed = _places(everyone), 0, {}
    for name, score in scores.items():
        mixed[name] = share * _places(score) + (1 - share) * among_all[start : start + len(score)]
        start += len(score)
    return mixed


def scaled(scores: Scores, prices: Mapping[str, float]) -> dict[str, Float[Tensor, "hidden"]]:
    """Return the scores of each site times its price, in the same order inside each site.

    Many neighbours are one unit in the last place apart: a product alone would let some of them fall together.
    """
    products = {}
    for name, score in scores.items():
        order = score.argsort(stable=True)
        products[name] = torch.empty_like(score)
        products[name][order] = strictly_rising(score[order] * prices[name])
    return products


def per_saving(scores: Scores, savings: Mapping[str, float]) -> Scores:
    """Return the scores of each site divided by what a channel of it saves; without `savings` the scores themselves.

    Channels removed in this order lose the least for what they save.
    """
    if not savings:
        return scores
    weighed = scaled(
        {name: score.double() for name, score in scores.items() if name in savings},
        {name: 1 / saving for name, saving in savings.items()},
    )
    return {**scores, **weighed}


def _places(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return each value its place among all, in (0, 1); equal ones in their order."""
    places = torch.empty(len(values), dtype=torch.float64)
    places[values.argsort(stable=True)] = (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values)
    return places


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
    search = _Search(
        model, sites, statistics, reference, rules, ridge, lambda plan_for: plan_for(keep_ratio), progress
    )
    return search.run({name: order.scores for name, order in orders.items()})


@dataclass
class _Attempt:
    """Hold a candidate with its pruned model; `plan_for` makes its plan, and others like it."""

    divergence: float
    plan: PruningPlan
    pruned: nn.Module
    plan_for: Callable[[float], PruningPlan]


@dataclass
class _Search:
    model: nn.Module
    sites: Sequence[Site]
    statistics: Statistics
    reference: DenseReference
    rules: PlanRules
    ridge: float
    size: Sizing
    progress: Callable[[str], None] | None
    savings: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._variances = per_saving(variance_scores(self.statistics), self.savings)
        self._covariances = refit_metrics(self.sites, self.statistics)
        self._means = self.statistics.means | {name: metric.mean for name, metric in self._covariances.items()}
        self._tried: list[Candidate] = []
        self._seen: set[tuple[int, ...]] = set()
        self.best: _Attempt | None = None

    def run(self, costs: Scores) -> PlanChoice:
        costs = per_saving(costs, self.savings)
        if self.rules.scope == "equal":
            self.attempt("equal widths", costs, scope="equal")
        else:
            self._compete(costs)
        assert self.best is not None
        best = self.best
        choice = PlanChoice(best.plan, self._means, self._covariances, tuple(self._tried), best.plan_for)
        _log.info("auto: %d plans tried on %d images", len(self._tried), self.reference.images)
        log_lines(_log, choice.table())
        return choice

    def _compete(self, costs: Scores) -> None:
        first = self.attempt("equal shares", costs, scope="per_layer")
        if first is not None and first.plan.kept == first.plan.total:
            return  # attention alone loses something, in one way
        self.attempt("variance", {})
        self.attempt("sensitivity", costs)
        self.attempt("half equal shares", mixed_with_uniform(costs, 0.5))
        improved = self._improve(costs)
        self.attempt("priced, half equal", mixed_with_uniform(improved, 0.5))
        self.attempt("priced, quarter equal", mixed_with_uniform(improved, 0.25))

    def _improve(self, costs: Scores) -> Scores:
        """Update the prices in rounds: the mean of what all rounds asked for, each measured on the plan before.

        What one round asks for is noisy and depends on the plan before: by itself it oscillates.
        """
        assert self.best is not None
        latest, price, asked = self.best, dict.fromkeys(costs, 1.0), []
        for number in range(1, _ROUNDS + 1):
            asked.append(self._wanted(costs, latest))
            price = mean_multipliers(asked)
            tried = self.attempt(f"priced, round {number}", scaled(costs, price))
            if tried is None:
                break  # the plan was there before
            latest = tried
        return scaled(costs, price)

    def _wanted(self, costs: Scores, start: _Attempt) -> dict[str, float]:
        lost = {
            entry.site.name: float(costs[entry.site.name][list(entry.removed)].sum())
            * self.savings.get(entry.site.name, 1.0)
            for entry in start.plan.sites
            if entry.site.kind == "mlp"
        }
        return cost_multipliers(lost, self.reference.site_contributions(start.pruned, start.plan))

    def attempt(self, name: str, scores: Scores, scope: Scope = "global") -> _Attempt | None:
        """Make a plan, prune a copy by it, and keep it if it is the best so far; return it if it is a new one."""
        rules = replace(self.rules, scope=scope, attn_basis="principal")

        def plan_for(keep_ratio: float) -> PruningPlan:
            return rules.plan(self.sites, {**self._variances, **scores}, keep_ratio)

        plan = self.size(plan_for)
        key = tuple(hash(entry.keep) for entry in plan.sites)
        if key in self._seen:
            return None
        if self.progress is not None:
            self.progress(name)
        pruned = copy.deepcopy(self.model)
        prune_(pruned, plan, self._means, self._covariances, ridge=self.ridge)
        self._seen.add(key)
        divergence = self.reference.divergence(pruned)
        self._tried.append(Candidate(name, divergence, {entry.site.name: len(entry.keep) for entry in plan.sites}))
        attempt = _Attempt(divergence, plan, pruned, plan_for)
        # A NaN is never better.
        if self.best is None or divergence < self.best.divergence:
            self.best = attempt
        return attempt


@dataclass(frozen=True)
class AutoSearch:
    """Search plans of several sizes for one dense model; what does not depend on the size is done once.

    All processes make it and call it alike. The first of the images compare plans. All plans have the floor and the
    rounding of the rules; of their scopes, `equal` alone makes a difference. Costs of the sites in `savings` are
    divided by what a channel saves there.
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
    def _reference(self) -> DenseReference:
        return DenseReference.held_out(self.model, self.images, range(HELD_OUT_IMAGES), self.objective)

    def plan(self, keep_ratio: float) -> PlanChoice:
        """Search the plan that keeps this share; otherwise as `plan_of_size`."""
        return self.plan_of_size(lambda plan_for: plan_for(keep_ratio), f"keep {keep_ratio:g}")

    def plan_of_size(self, size: Sizing, label: str) -> PlanChoice:
        """Search among plans of one size, which `size` makes of each candidate's plans of all keep ratios.

        Raises:
            InputError: Statistics are missing or unfit, or the processes do not find the same.
        """
        session = self.images.session
        with session.timed("search"), session.progress_steps(f"auto, {label}", "plan") as tell:
            known = self.model, self.sites, self.statistics, self._reference, self.rules, self.ridge
            search = _Search(*known, size, tell, self.savings)
            best = search.run({name: one.scores for name, one in self._orders.items()})
        session.processes.check_same("plan", json_fingerprint(best.plan.to_dict()))
        return best
