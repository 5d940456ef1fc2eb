"""Prune copies of one dense model by the settings of a sweep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from vbp.pruning.criteria import criterion_scores
from vbp.pruning.make_plan import PlanRules
from vbp.pruning.plan import PlanChoice, PruningPlan
from vbp.pruning.surgery import prune_
from vbp.refit.refits import Refits
from vbp.runtime.forward import copy_model
from vbp.sites.site import Site
from vbp.statistics.evidence import Evidence
from vbp.sweeps.rows import Setting


@dataclass(frozen=True)
class Pruner:
    """A dense model and what was collected of it; `evidence` must hold what `sweep_needs` says of the settings.

    Scores are computed once for a criterion. The scope of `rules` is the setting's own. `planners` make the plans of
    criteria that need more than scores (`auto`). `refits` follow the surgery.
    """

    model: nn.Module
    sites: Sequence[Site]
    evidence: Evidence
    rules: PlanRules = field(default_factory=PlanRules)
    planners: Mapping[str, Callable[[Setting], PlanChoice]] = field(default_factory=dict)
    refits: Refits | None = None

    def prune(self, setting: Setting) -> tuple[nn.Module, PruningPlan]:
        """Return a pruned copy of the dense model, and its plan."""
        planned = self.planners.get(setting.criterion, self._by_scores)(setting)
        choice = planned.compensated_by(setting.compensation)
        pruned = copy_model(self.model)
        prune_(pruned, choice.plan, choice.means, choice.covariances, ridge=self.evidence.ridge)
        if self.refits is not None:
            # Without the refit BatchNorms alone.
            only = () if setting.compensation == "refit" else (["batchnorm"],)
            self.refits.refit_(pruned, *only, plan=choice.plan)
        return pruned, choice.plan

    def _by_scores(self, setting: Setting) -> PlanChoice:
        rules = replace(self.rules, scope=setting.scope)
        plan = rules.plan(self.sites, self._scores(setting.criterion), setting.keep_ratio)
        statistics = self.evidence.statistics
        if statistics is None:
            return PlanChoice(plan, None, None)
        return PlanChoice(plan, statistics.means, statistics.covariances)

    @functools.cached_property
    def _scores(self) -> Callable[[str], Mapping[str, Tensor]]:
        return functools.cache(lambda criterion: criterion_scores(criterion, self.model, self.sites, self.evidence))
