"""From statistics to a pruned copy of the dense model that meets the budget: what all recipes call to prune."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from vbp.cost.budget import BudgetResult
from vbp.cost.macs import format_plan, plan_cost
from vbp.cost.search import PlanFor
from vbp.cost.target import share_of
from vbp.method.ridge import Reconstruction
from vbp.pruning.auto import AutoSearch
from vbp.pruning.competition import per_saving
from vbp.pruning.convergence import Convergence, calibrate
from vbp.pruning.criteria import criterion_scores, variance_scores
from vbp.pruning.divergence import held_out_places
from vbp.pruning.plan import PlanChoice, PruningPlan
from vbp.pruning.readers import few_samples
from vbp.pruning.surgery import prune_
from vbp.recipes.planning import comparison_by_main
from vbp.recipes.setup import PruneJob
from vbp.refit.refits import RefitReport, Refits
from vbp.report.run_report import PLAN, STATISTICS
from vbp.runtime.fingerprints import json_fingerprint
from vbp.runtime.forward import copy_model
from vbp.runtime.log_file import log_lines, told_if_slow
from vbp.statistics.evidence import Evidence, EvidenceReader

_log = logging.getLogger(__name__)

# A plan of another size than was searched for, by more than this share of the channels, is searched for again.
_NEAR = 0.02


@dataclass(frozen=True)
class Pruned:
    """A pruned copy of a dense model, and what was found on the way to it."""

    model: nn.Module
    choice: PlanChoice
    budget: BudgetResult
    images: int
    convergence: Convergence | None
    reconstruction: tuple[Reconstruction, ...]
    refits: RefitReport

    @property
    def plan(self) -> PruningPlan:
        return self.choice.plan


def prune_copy(
    job: PruneJob, refits: Refits | None, *, stop_early: bool = False, save_dir: Path | None = None
) -> Pruned:
    """Prune a copy of the dense model: statistics, plan, surgery, refits. The dense model stays as it was.

    With `stop_early` statistics end when the plan has converged. Statistics and plan are written to `save_dir` as
    soon as they are there.
    """
    evidence, convergence = collect_evidence(job, stop_early=stop_early)
    assert evidence.statistics is not None
    if save_dir is not None and job.session.processes.is_main:
        evidence.statistics.save(save_dir / STATISTICS)
    choice, budget = choose_plan(job, evidence, save_dir)
    pruned = copy_model(job.dense)
    with (
        job.session.timed("surgery"),
        told_if_slow(_log, "cutting the model and fitting what stands in for channels"),
    ):
        errors = prune_(pruned, choice.plan, choice.means, choice.covariances, ridge=job.config.ridge)
    refitted = RefitReport()
    if refits is not None:
        with job.session.timed("refit"):
            refitted = refits.refit_(pruned, plan=choice.plan)
    return Pruned(pruned, choice, budget, evidence.statistics.images, convergence, errors, refitted)


def collect_evidence(job: PruneJob, *, stop_early: bool) -> tuple[Evidence, Convergence | None]:
    """Collect what criterion and compensation need, in stages; return also how the plan converged meanwhile."""
    config, session, statistics, needs = job.config, job.session, job.given_statistics, job.config.needs
    if statistics is not None:
        _log.info("statistics of %d images from %s", statistics.images, config.stats_path)
        needs &= {"gradients"}
    convergence, first = None, 0
    if config.tune != "off":
        # Images of which the statistics were made would flatter the model that tuning is compared with.
        first = len(held_out_places(len(job.calibration)))
        _log.info("%d images are held out: statistics and refits do without them", first)
        if statistics is not None:
            _log.warning("statistics from a file may be of these images too; then tuning has to gain more to be kept")
    with session.timed("calibration"):
        reader = EvidenceReader(
            job.dense, job.sites, job.calibration, needs,
            covariance_tokens=config.covariance_tokens, objective=job.objective,
        )  # fmt: skip
        if statistics is None:
            statistics, convergence = calibrate(
                reader.read,
                len(job.calibration),
                # By the variances whatever the criterion: plans are compared that cost nothing to make.
                lambda collected: _plan(job, variance_scores(collected, norm_per_layer=config.norm_per_layer)),
                processes=session.processes,
                auto=stop_early,
                first=first,
            )
            _log.info("statistics of %d sites over %d images", len(job.sites), statistics.images)
            log_lines(_log, convergence.table())
        elif needs:
            reader.read(range(first, len(job.calibration)))
        gradients = reader.gradients()
    if statistics is not None and (sentence := few_samples(job.dense, job.sites, statistics, config.ridge)):
        _log.info("%s", sentence)
    return Evidence(statistics, gradients, job.calibration.seed, config.ridge), convergence


@told_if_slow(_log, "choosing the channels")
def choose_plan(job: PruneJob, evidence: Evidence, save_dir: Path | None) -> tuple[PlanChoice, BudgetResult]:
    """Make the plan that the configuration asks for, and keep it; the same on every process."""
    if job.config.criterion == "auto":
        choice, budget = _by_divergence(job, evidence)
    else:
        choice, budget = _by_scores(job, evidence)
    keep_plan(job, choice.plan, save_dir)  # before a log that may fail
    log_lines(_log, format_plan(choice.plan, plan_cost(job.dense, choice.plan, job.example)))
    if budget.is_told:
        (_log.info if budget.met else _log.warning)("%s", budget.sentence())
    return choice, budget


def keep_plan(job: PruneJob, plan: PruningPlan, save_dir: Path | None) -> None:
    """Check that all processes have the same plan, and write it."""
    job.session.processes.check_same("plan", json_fingerprint(plan.to_dict()))
    if save_dir is not None and job.session.processes.is_main:
        plan.save(save_dir / PLAN)


def _plan(job: PruneJob, scores: Mapping[str, Tensor], keep_ratio: float | None = None) -> PruningPlan:
    """Make a plan by the rules of the run, by default of about the size that it will have."""
    return job.plan_rules.plan(job.sites, scores, job.target.keep_ratio if keep_ratio is None else keep_ratio)


def _by_scores(job: PruneJob, evidence: Evidence) -> tuple[PlanChoice, BudgetResult]:
    statistics, config = evidence.statistics, job.config
    assert statistics is not None
    with job.session.timed("planning"):
        if config.norm_per_layer:
            scores: Mapping[str, Tensor] = variance_scores(statistics, norm_per_layer=True)
        else:
            scores = criterion_scores(config.criterion, job.dense, job.sites, evidence)
        scores = per_saving(scores, savings_of(job))
        budget = _meet(job, lambda keep_ratio: _plan(job, scores, keep_ratio))
    choice = PlanChoice(budget.plan, statistics.means, statistics.covariances)
    return choice.compensated_by(config.compensation), budget


def _by_divergence(job: PruneJob, evidence: Evidence) -> tuple[PlanChoice, BudgetResult]:
    """Search among plans that are computed to meet the budget; once more if a measurement asks for another size."""
    assert evidence.statistics is not None
    known = job.dense, job.sites, evidence.statistics, job.calibration, job.plan_rules
    search = AutoSearch(*known, ridge=job.config.ridge, savings=savings_of(job), objective=job.objective)
    label = f"{job.target.budget.flag} {job.target.budget.amount:g}"
    size = partial(job.target.proposal, compensated=True)
    affordable = partial(job.target.affords, compensated=True)
    choice = search.plan_of_size(size, label, affordable=affordable)
    budget = _meet(job, choice.plan_for)
    if abs(share_of(budget.plan) - share_of(choice.plan)) > _NEAR:
        choice = search.plan_of_size(partial(size, like=budget.plan), label, affordable=affordable)
        budget = _meet(job, choice.plan_for)
    return replace(choice, plan=budget.plan), budget


def savings_of(job: PruneJob) -> dict[str, float]:
    """Return by what the costs of each site's channels are divided; nothing where they are not."""
    return job.target.savings() if job.config.ranks_by_cost else {}


def _meet(job: PruneJob, plan_for: PlanFor | None) -> BudgetResult:
    assert plan_for is not None
    compare = comparison_by_main(job.session, job.dense, job.latency_images)
    return job.target.meet(plan_for, job.dense, job.example, compare, compensated=job.config.compensation != "none")
