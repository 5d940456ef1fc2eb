"""From the dense model to the pruned one: statistics, plan, surgery, and what each step measured."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from vbp.artifacts import rebuild_
from vbp.calibration import calibrate
from vbp.cost import format_plan, plan_cost
from vbp.data import balanced_order, make_loader
from vbp.fingerprints import json_fingerprint
from vbp.job import Job, plan_of, reading
from vbp.measuring import bar, figures, latencies, measure
from vbp.memory import out_of_memory
from vbp.plan import PruningPlan
from vbp.precision import move_
from vbp.preprocessing import evaluation_transform
from vbp.ranking import variance_scores
from vbp.report import Measured
from vbp.statistics import Statistics, collect_statistics
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
    """

    plan: PruningPlan
    base: Measured
    pruned: Measured
    uncompensated: Measured | None
    images: int
    latency_batch: int
    convergence: Mapping[str, Any] | None

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
        )


def prune(job: Job) -> tuple[Pruned, nn.Module]:
    """Prune the job's model in place.

    Returns:
        What was found on the way, and the dense model.
    """
    base = measure(job, job.model)
    _log.info("dense: %s", figures(base))
    statistics, convergence = _statistics(job)
    plan = _plan(job, statistics)
    dense = copy.deepcopy(job.model)
    uncompensated = _uncompensated(job, plan)
    with job.timed("surgery"):
        prune_(job.model, plan, statistics.means if job.config.compensation == "mean" else None)
    pruned = measure(job, job.model)
    _log.info("pruned: %s", figures(pruned))
    latency, batch = latencies(job, {"base": dense, "pruned": job.model})
    base = replace(base, latency_ms=latency["base"])
    pruned = replace(pruned, latency_ms=latency["pruned"], epoch=0)
    return Pruned(plan, base, pruned, uncompensated, statistics.images, batch, convergence), dense


def prune_again(job: Job, found: Mapping[str, Any]) -> tuple[Pruned, nn.Module]:
    """Bring the job's model to where a checkpoint was written; the rest as `prune`."""
    pruned = Pruned.from_dict(found["pruned"])
    dense = copy.deepcopy(job.model)
    rebuild_(job.model, (pruned.plan,), found["trainer"]["student"])
    move_(job.model, job.device)
    for stage, seconds in found["seconds"].items():
        job.seconds[stage] += seconds
    if job.processes.main:
        pruned.plan.save(job.config.save_dir / PLAN)
    job.processes.check_same("plan", json_fingerprint(pruned.plan.to_dict()))
    return pruned, dense


def _statistics(job: Job) -> tuple[Statistics, Mapping[str, Any] | None]:
    if job.given is not None:
        _log.info("statistics of %d images from %s", job.given.images, job.config.stats_path)
        return _kept(job, job.given), None
    order = balanced_order(job.calibration, job.config.seed)
    transform = evaluation_transform(job.classifier.preprocessing)

    def collect(part: Sequence[int]) -> Statistics | None:
        loader = make_loader(
            job.calibration.select([order[place] for place in part]),
            transform,
            batch_size=job.config.val_batch_size,
            rank=job.processes.rank,
            world=job.processes.world,
            **reading(job.config),
        )
        if len(loader) == 0:
            return None
        with job.precision.autocast(), out_of_memory("calibration"):
            return collect_statistics(
                job.model, job.sites, bar(job, loader, "statistics"), device=job.device, data=job.data
            )

    with job.timed("calibration"):
        statistics, convergence = calibrate(
            collect,
            len(job.calibration),
            lambda statistics: _plan_from(job, statistics),
            processes=job.processes,
            auto=job.config.calib_samples == "auto",
        )
    _log.info("statistics of %d sites over %d images\n%s", len(job.sites), statistics.images, convergence.table())
    return _kept(job, statistics), convergence.to_dict()


def _kept(job: Job, statistics: Statistics) -> Statistics:
    if job.processes.main:
        statistics.save(job.config.save_dir / STATISTICS)
    return statistics


def _plan_from(job: Job, statistics: Statistics) -> PruningPlan:
    return plan_of(job.config, job.sites, variance_scores(statistics, norm_per_layer=job.config.norm_per_layer))


def _plan(job: Job, statistics: Statistics) -> PruningPlan:
    with job.timed("planning"):
        plan = _plan_from(job, statistics)
    job.processes.check_same("plan", json_fingerprint(plan.to_dict()))
    if job.processes.main:
        plan.save(job.config.save_dir / PLAN)
    _log.info("%s", format_plan(plan, plan_cost(job.model, plan, job.example)))
    return plan


def _uncompensated(job: Job, plan: PruningPlan) -> Measured | None:
    if not job.config.compare_uncompensated:
        return None
    model = copy.deepcopy(job.model)
    prune_(model, plan)
    measured = measure(job, model)
    _log.info("pruned without compensation: %s", figures(measured))
    return measured
