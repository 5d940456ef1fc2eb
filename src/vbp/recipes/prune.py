"""From the dense model to the pruned one: statistics, plan, surgery, and what each step measured."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from vbp.cost.budget import BudgetResult
from vbp.cost.latency_search import Comparison, compare_in_turns
from vbp.cost.macs import format_plan, plan_cost
from vbp.cost.search import PlanFor
from vbp.cost.target import share_of
from vbp.deploy.artifact import rebuild_
from vbp.method.covariance import ChannelCovariance
from vbp.pruning.auto import AutoSearch, Candidate
from vbp.pruning.convergence import calibrate
from vbp.pruning.criteria import criterion_scores, variance_scores
from vbp.pruning.make_plan import make_plan
from vbp.pruning.plan import PruningPlan
from vbp.pruning.surgery import prune_
from vbp.recipes.measure import figures, latencies, measure
from vbp.recipes.setup import Job, latency_batch
from vbp.refit.refits import AfterSurgery, Refitted
from vbp.report.run_report import Measured
from vbp.runtime.fingerprints import json_fingerprint
from vbp.runtime.precision import move_
from vbp.statistics.evidence import Evidence, EvidenceReader

_log = logging.getLogger(__name__)


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
        if job.processes.is_main:
            batch = latency_batch(job.config, job.model, job.example)
            found = compare_in_turns(job.model, plan, batch, precision=job.precision)
        measured = job.processes.all_gather(found)[0]
        assert measured is not None
        return measured

    return job.target.meet(plan_for, job.model, job.example, compare, compensated=job.config.compensation != "none")


STATISTICS, PLAN = "statistics.safetensors", "plan.json"


@dataclass(frozen=True)
class Pruned:
    """What is known once the model is pruned; a checkpoint holds it, so that a resumed run need not find it again.

    Attributes:
        plan: What was kept.
        base: The dense model.
        pruned: Right after surgery.
        uncompensated: Right after surgery without compensation, if asked for.
        images: Calibration images.
        latency_batch: Images in the batch whose latency was measured.
        convergence: How the plan settled as the images grew; None if the statistics came from a file.
        budget: What was asked for, and whether the plan meets it.
        candidates: Plans that the criterion auto tried; none otherwise.
        reconstruction: Site name -> variances `mean_shift`, `refit` and `energy` of its consumer's output, on the
            calibration images; without refit none.
        producers: What the refit of the producers did; None without one.
        stream: What the refit of the residual stream did; None without one.
        head: What the refit of the last layer did; None without one.
    """

    plan: PruningPlan
    base: Measured
    pruned: Measured
    uncompensated: Measured | None
    images: int
    latency_batch: int
    convergence: Mapping[str, Any] | None
    budget: Mapping[str, Any]
    candidates: Sequence[Mapping[str, Any]]
    reconstruction: Mapping[str, Mapping[str, float]]
    producers: Mapping[str, Any] | None
    stream: Mapping[str, Any] | None
    head: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "plan": self.plan.to_dict(),
            "base": asdict(self.base),
            "pruned": asdict(self.pruned),
            "uncompensated": None if self.uncompensated is None else asdict(self.uncompensated),
            "images": self.images,
            "latency_batch": self.latency_batch,
            "convergence": self.convergence,
            "budget": self.budget,
            "candidates": self.candidates,
            "reconstruction": self.reconstruction,
            "producers": self.producers,
            "stream": self.stream,
            "head": self.head,
        }

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Pruned:
        """Read what `to_dict` gave."""
        bare = value["uncompensated"]
        return Pruned(
            PruningPlan.from_dict(value["plan"]),
            Measured(**value["base"]),
            Measured(**value["pruned"]),
            None if bare is None else Measured(**bare),
            value["images"],
            value["latency_batch"],
            value["convergence"],
            value["budget"],
            value["candidates"],
            value["reconstruction"],
            value["producers"],
            value["stream"],
            value["head"],
        )


def prune(job: Job) -> tuple[Pruned, nn.Module]:
    """Prune the job's model in place.

    Returns:
        What was found on the way, and the dense model.
    """
    base = measure(job, job.model)
    _log.info("dense: %s", figures(base))
    evidence, convergence = _evidence(job)
    assert evidence.statistics is not None
    chosen = _chosen(job, evidence)
    plan = chosen.plan
    dense = copy.deepcopy(job.model)
    uncompensated = _uncompensated(job, plan)
    with job.timed("surgery"):
        errors = prune_(job.model, plan, chosen.means, chosen.covariances, ridge=job.config.ridge)
    refitted = _refitted(job, dense)
    pruned = measure(job, job.model)
    _log.info("pruned: %s", figures(pruned))
    latency, batch = latencies(job, {"base": dense, "pruned": job.model})
    return Pruned(
        plan,
        replace(base, latency_ms=latency["base"]),
        replace(pruned, latency_ms=latency["pruned"], epoch=0),
        uncompensated,
        evidence.statistics.images,
        batch,
        convergence,
        chosen.result.to_dict(),
        [one.to_dict() for one in chosen.tried],
        {one.site: {"mean_shift": one.mean_shift, "refit": one.refit, "energy": one.energy} for one in errors},
        None if refitted.producers is None else refitted.producers.to_dict(),
        None if refitted.stream is None else refitted.stream.to_dict(),
        None if refitted.head is None else refitted.head.to_dict(),
    ), dense


def _refitted(job: Job, dense: nn.Module) -> Refitted:
    """Refit what surgery left to the dense model, in a row of its own in the report's seconds."""
    if job.config.compensation != "refit":
        return Refitted()
    with job.timed("refit"):
        return AfterSurgery(job, dense).refit_(job.model)


def prune_again(job: Job, found: Mapping[str, Any]) -> tuple[Pruned, nn.Module]:
    """Bring the job's model to where a checkpoint was written; the rest as `prune`."""
    pruned = Pruned.from_dict(found["pruned"])
    dense = copy.deepcopy(job.model)
    rebuild_(job.model, (pruned.plan,), found["trainer"]["student"])
    move_(job.model, job.device)
    for stage, seconds in found["seconds"].items():
        job.seconds[stage] = job.seconds.get(stage, 0.0) + seconds
    if job.processes.is_main:
        pruned.plan.save(job.config.save_dir / PLAN)
    job.processes.check_same("plan", json_fingerprint(pruned.plan.to_dict()))
    return pruned, dense


def _evidence(job: Job) -> tuple[Evidence, Mapping[str, Any] | None]:
    """Collect what criterion and compensation need, in stages; give also how the plan settled meanwhile."""
    config, needs = job.config, job.config.needs
    if job.given is not None:
        _log.info("statistics of %d images from %s", job.given.images, config.stats_path)
        needs &= {"gradients"}
    statistics, convergence = job.given, None
    with job.timed("calibration"):
        reader = EvidenceReader(job, needs, covariance_tokens=config.covariance_tokens)
        if statistics is None:
            statistics, convergence = calibrate(
                reader.read,
                len(job.calibration),
                # By the variances whatever the criterion: plans are compared that cost nothing to make.
                lambda found: plan_of(job, variance_scores(found, norm_per_layer=config.norm_per_layer)),
                processes=job.processes,
                auto=config.calib_samples == "auto",
            )
            _log.info("statistics of %d sites over %d images", len(job.sites), statistics.images)
            _log.info("%s", convergence.table())
        elif needs:
            reader.read(range(len(job.calibration)))
        gradients = reader.gradients()
    if job.processes.is_main:
        statistics.save(config.save_dir / STATISTICS)
    found = Evidence(statistics, gradients, config.seed, config.ridge)
    return found, None if convergence is None else convergence.to_dict()


def _chosen(job: Job, evidence: Evidence) -> Chosen:
    chosen = choose(job, evidence)
    job.processes.check_same("plan", json_fingerprint(chosen.plan.to_dict()))
    if job.processes.is_main:
        chosen.plan.save(job.config.save_dir / PLAN)
    _log.info("%s", format_plan(chosen.plan, plan_cost(job.model, chosen.plan, job.example)))
    (_log.info if chosen.result.met else _log.warning)("%s", chosen.result.sentence())
    return chosen


def _uncompensated(job: Job, plan: PruningPlan) -> Measured | None:
    if not job.config.compare_uncompensated:
        return None
    model = copy.deepcopy(job.model)
    prune_(model, plan)
    measured = measure(job, model)
    _log.info("pruned without compensation: %s", figures(measured))
    return measured
