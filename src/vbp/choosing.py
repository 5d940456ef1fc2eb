"""From what is known of the dense model to the plan that meets the budget, by the criterion of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vbp.aiming import latency_batch
from vbp.auto import Candidate
from vbp.auto_search import AutoSearch
from vbp.budget_search import PlanFor
from vbp.budgets import BudgetResult
from vbp.covariance import ChannelCovariance
from vbp.criteria import Evidence, criterion_scores
from vbp.job import Job
from vbp.latency_budget import Comparison, compare_in_turns
from vbp.plan import PruningPlan
from vbp.planning import make_plan
from vbp.ranking import variance_scores
from vbp.targets import share_of

# A plan of another size than was searched for, by more than this share of the channels, is searched for again.
_NEAR = 0.02


@dataclass(frozen=True)
class Chosen:
    """A plan, and what surgery takes with it.

    Attributes:
        result: The plan, and whether it meets the budget.
        means: For the mean shift and the refit; None without compensation.
        covariances: For the refit.
        tried: The candidates of the criterion auto.
    """

    result: BudgetResult
    means: Mapping[str, Tensor] | None
    covariances: Mapping[str, ChannelCovariance] | None
    tried: tuple[Candidate, ...] = ()

    @property
    def plan(self) -> PruningPlan:
        return self.result.plan


def choose(job: Job, evidence: Evidence) -> Chosen:
    """Make the plan that the configuration asks for; the same on every process."""
    assert evidence.statistics is not None
    if job.config.criterion == "auto":
        return _by_divergence(job, evidence)
    with job.timed("planning"):
        scores = _scores(job, evidence)
        result = _meet(job, lambda keep_ratio: plan_of(job, scores, keep_ratio))
    means, covariances = evidence.statistics.means, evidence.statistics.covariances
    compensation = job.config.compensation
    return Chosen(result, None if compensation == "none" else means, covariances if compensation == "refit" else None)


def plan_of(job: Job, scores: Mapping[str, Tensor], keep_ratio: float | None = None) -> PruningPlan:
    """Make a plan by the rules of the run, by default of about the size that it will have."""
    return make_plan(
        job.sites,
        scores,
        keep_ratio=job.target.keep_ratio if keep_ratio is None else keep_ratio,
        scope="global" if job.config.global_pruning else "equal" if job.config.equal_widths else "per_layer",
        **job.rules,
    )


def _scores(job: Job, evidence: Evidence) -> Mapping[str, Tensor]:
    if job.config.norm_per_layer:
        assert evidence.statistics is not None
        return variance_scores(evidence.statistics, norm_per_layer=True)
    return criterion_scores(job.config.criterion, job.model, job.sites, evidence)


def _by_divergence(job: Job, evidence: Evidence) -> Chosen:
    """Search at the size that the budget comes to; once more if the sites' costs make it another."""
    assert evidence.statistics is not None
    search = AutoSearch(job, evidence.statistics, ridge=job.config.ridge)
    found = search.plan(job.target.keep_ratio)
    result = _meet(job, found.plan_for)
    if abs(share_of(result.plan) - job.target.keep_ratio) > _NEAR:
        found = search.plan(share_of(result.plan))
        result = _meet(job, found.plan_for)
    return Chosen(result, found.means, found.covariances, found.tried)


def _meet(job: Job, plan_for: PlanFor) -> BudgetResult:
    def compare(plan: PruningPlan) -> Comparison:
        """Time on the main process, for all."""
        found = None
        if job.processes.main:
            batch = latency_batch(job.config, job.model, job.example)
            found = compare_in_turns(job.model, plan, batch, precision=job.precision)
        measured = job.processes.gather(found)[0]
        assert measured is not None
        return measured

    return job.target.meet(plan_for, job.model, job.example, compare, compensated=job.config.compensation != "none")
