"""Let plans of one size compete: each is pruned on a copy of the dense model, and judged by its predictions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.method.covariance import ChannelCovariance
from vbp.method.elimination import strictly_rising
from vbp.pruning.criteria import variance_scores
from vbp.pruning.divergence import DenseReference, cost_multipliers, mean_multipliers
from vbp.pruning.make_plan import PlanRules
from vbp.pruning.plan import Candidate, PlanChoice, PruningPlan, SitePlan
from vbp.pruning.surgery import prune_
from vbp.runtime.choices import Scope
from vbp.runtime.forward import copy_model
from vbp.runtime.log_file import log_lines
from vbp.sites.site import Site, blocks_of, units_of
from vbp.statistics.statistics import Statistics

_log = logging.getLogger(__name__)

# Price updates. One brings most of the gain, the others less and less of the rest.
_ROUNDS = 3
Scores = Mapping[str, Float[Tensor, "hidden"]]
# From the plans of all keep ratios to the one that is wanted.
Sizing = Callable[[Callable[[float], PruningPlan]], PruningPlan]


@dataclass
class Attempt:
    """Hold a candidate with its pruned model; `plan_for` makes its plan, and others like it."""

    divergence: float
    plan: PruningPlan
    pruned: nn.Module
    plan_for: Callable[[float], PruningPlan]


@dataclass
class PlanCompetition:
    """Make plans of one size for a dense model, and keep the best.

    `metrics` are those of `refit_metrics`, `size` makes the one plan that is wanted of all plans of a candidate, and
    `savings` say what a channel of each site saves. Where attention shares the budget they are needed; MLPs alone
    are a candidate where their plan is `affordable`.
    """

    model: nn.Module
    sites: Sequence[Site]
    statistics: Statistics
    metrics: Mapping[str, ChannelCovariance]
    reference: DenseReference
    rules: PlanRules
    ridge: float
    size: Sizing
    progress: Callable[[str], None] | None = None
    savings: Mapping[str, float] = field(default_factory=dict)
    affordable: Callable[[PruningPlan], bool] = lambda plan: True

    def __post_init__(self) -> None:
        self._savings = unit_savings(self.sites, self.savings) if self.rules.attn_shared else self.savings
        self._variances = per_saving(variance_scores(self.statistics), self.savings)
        self._means = self.statistics.means | {name: metric.mean for name, metric in self.metrics.items()}
        self._tried: list[Candidate] = []
        self._seen: set[tuple[int, ...]] = set()
        self.best: Attempt | None = None

    def run(self, costs: Scores) -> PlanChoice:
        """Compare plans by the costs of channels, in nats, and of heads' directions where these compete too."""
        costs = per_saving(costs, self._savings)
        if self.rules.scope == "equal":
            self.attempt("equal widths", costs, scope="equal")
            if self.rules.attn_shared:
                self.attempt("equal widths, MLPs alone", costs, scope="equal", attn_part=0.0)
                self.attempt("equal widths, attention half as much", costs, scope="equal", attn_part=0.5)
        else:
            self._compete(costs)
        assert self.best is not None
        best = self.best
        choice = PlanChoice(best.plan, self._means, self.metrics, tuple(self._tried), best.plan_for)
        _log.info("auto: %d plans tried on %d images", len(self._tried), self.reference.images)
        log_lines(_log, choice.table())
        return choice

    def _compete(self, costs: Scores) -> None:
        first = self.attempt("equal shares", costs, scope="per_layer")
        if first is not None and not self.rules.attn_shared and first.plan.kept == first.plan.total:
            return  # attention alone loses something, in one way
        whole = 0.0 if self.rules.attn_shared else None
        self.attempt("variance", {}, attn_part=whole)
        self.attempt("sensitivity", costs)
        self.attempt("half equal shares", mixed_with_uniform(costs, 0.5))
        if self.rules.attn_shared:
            self.attempt("sensitivity, MLPs alone", costs, attn_part=0.0)
        improved = self._improve(costs)
        self.attempt("priced, half equal", mixed_with_uniform(improved, 0.5))
        self.attempt("priced, quarter equal", mixed_with_uniform(improved, 0.25))
        if self.rules.attn_shared:
            self.attempt("priced, MLPs alone", improved, attn_part=0.0)

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

    def _wanted(self, costs: Scores, start: Attempt) -> dict[str, float]:
        """Return what each cost should be multiplied by; the costs of one attention alike."""
        entries = {entry.site: entry for entry in start.plan.sites}
        blocks = {
            block[0].name: [site.name for site in block if site.name in costs] for block in blocks_of([*entries])
        }
        lost = {}
        for block in blocks_of([*entries]):
            lost[block[0].name] = sum(self._lost(costs, entries[site]) for site in block if site.name in costs)
        wanted = cost_multipliers(lost, self.reference.site_contributions(start.pruned, start.plan))
        return {name: wanted[block] for block, names in blocks.items() for name in names}

    def _lost(self, costs: Scores, entry: SitePlan) -> float:
        """Return the nats that the costs predict for what a plan removes of a site."""
        name, heads = entry.site.name, entry.site.heads
        # A direction goes from all heads, the last one first.
        gone = list(entry.removed) if entry.site.kind == "mlp" else slice(len(entry.keep) // heads, None)
        return float(costs[name][gone].sum()) * self._savings.get(name, 1.0)

    def attempt(
        self, name: str, scores: Scores, scope: Scope = "global", *, attn_part: float | None = None
    ) -> Attempt | None:
        """Make a plan, prune a copy by it, and keep it if it is the best so far; return it if it is a new one.

        `attn_part` cuts attention by a part of the share that MLPs lose, instead of as the rules say.
        """
        rules = replace(self.rules, scope=scope, attn_basis="principal")

        def plan_for(keep_ratio: float) -> PruningPlan:
            if attn_part is None and rules.attn_shared and scope == "global":
                return rules.shared(self.sites, scores, self._savings, keep_ratio)
            attention = rules.attn_keep_ratio if attn_part is None else 1 - attn_part * (1 - keep_ratio)
            own = replace(rules, attn_keep_ratio=attention)
            return own.plan(self.sites, {**self._variances, **scores}, keep_ratio)

        plan = self.size(plan_for)
        key = tuple(hash(entry.keep) for entry in plan.sites)
        if key in self._seen or (attn_part is not None and not self.affordable(plan)):
            return None
        if self.progress is not None:
            self.progress(name)
        pruned = copy_model(self.model)
        prune_(pruned, plan, self._means, self.metrics, ridge=self.ridge)
        self._seen.add(key)
        divergence = self.reference.divergence(pruned)
        self._tried.append(Candidate(name, divergence, {entry.site.name: len(entry.keep) for entry in plan.sites}))
        attempt = Attempt(divergence, plan, pruned, plan_for)
        # A NaN is never better.
        if self.best is None or divergence < self.best.divergence:
            self.best = attempt
        return attempt


def unit_savings(sites: Sequence[Site], savings: Mapping[str, float]) -> dict[str, float]:
    """Return what a channel of each MLP saves, and a direction of all heads of each attention, by its first site."""
    return {
        unit[0].name: sum(savings[site.name] * (1 if site.kind == "mlp" else site.heads) for site in unit)
        for unit in units_of(sites)
    }


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
