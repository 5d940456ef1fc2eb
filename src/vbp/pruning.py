"""From the dense model to the pruned one: statistics, plan, surgery, and what each step measured."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from vbp.after_surgery import AfterSurgery, Refitted
from vbp.artifacts import rebuild_
from vbp.calibration import calibrate
from vbp.choosing import Chosen, choose, plan_of
from vbp.cost import format_plan, plan_cost
from vbp.criteria import Evidence
from vbp.evidence import EvidenceReader
from vbp.fingerprints import json_fingerprint
from vbp.job import Job
from vbp.measuring import figures, latencies, measure
from vbp.plan import PruningPlan
from vbp.precision import move_
from vbp.ranking import variance_scores
from vbp.report import Measured
from vbp.surgery import prune_

_log = logging.getLogger(__name__)

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
        """Give plain data."""
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
    if job.processes.main:
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
    if job.processes.main:
        statistics.save(config.save_dir / STATISTICS)
    found = Evidence(statistics, gradients, config.seed, config.ridge)
    return found, None if convergence is None else convergence.to_dict()


def _chosen(job: Job, evidence: Evidence) -> Chosen:
    chosen = choose(job, evidence)
    job.processes.check_same("plan", json_fingerprint(chosen.plan.to_dict()))
    if job.processes.main:
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
