"""One point of a sweep: prune, measure, fine-tune; in a folder of its own, which is that of a run if it is tuned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import nn

from vbp.deploy.artifact_files import ARTIFACT, remove_folder
from vbp.errors import Interrupted
from vbp.pruning.plan import PruningPlan
from vbp.recipes.finetune import finetune
from vbp.recipes.folder import clear_halves
from vbp.recipes.measure import compare_latency, measure
from vbp.recipes.publish import write_artifact
from vbp.recipes.resume import CONFIG, check_same_settings
from vbp.recipes.run import circumstances, restore
from vbp.recipes.setup import Job, Resumed
from vbp.report.run_report import BEST, FINAL, METRICS, PLAN, SUMMARY, Measured, RunReport
from vbp.runtime.files import LOCK, clear_folder, try_lock, write_json
from vbp.runtime.processes import Processes
from vbp.sweeps.config import SweepConfig
from vbp.sweeps.pruner import Pruner
from vbp.sweeps.rows import Point, SweepRow
from vbp.sweeps.state import POINTS, ROW, point_folder
from vbp.training.checkpoints import (
    CHECKPOINTS,
    checked_content,
    clear_checkpoints,
    has_checkpoints,
    latest_checkpoint,
    read_checkpoint,
)

# What a run leaves and a point does not need: its best model is in the artefact.
_PASSING: Final = (BEST, FINAL)

# Facts about this attempt, which stand over what the configuration says.
_FACTS: Final = ("device", "amp", "world", "local_rank", "model", "train", "val")


@contextmanager
def taken(folder: Path, point: Point, processes: Processes) -> Iterator[bool]:
    """Hold a point for the length of the block, if no other job does it; say whether, the same to all processes."""
    with ExitStack() as stack:
        yield processes.from_main(lambda: stack.enter_context(try_lock(point_folder(folder, point))))


def has_begun(folder: Path, point: Point) -> bool:
    """Return whether a point goes on from a checkpoint."""
    return has_checkpoints(point_folder(folder, point) / CHECKPOINTS)


def measure_point(
    config: SweepConfig, job: Job, pruner: Pruner, dense: Measured, point: Point, teacher: nn.Module | None
) -> SweepRow:
    """Prune a copy of the dense model, measure it, and fine-tune it if that is asked for.

    Fine-tuning goes on from the point's newest checkpoint, and leaves the folder of a run.

    Raises:
        Interrupted: The sweep was told to stop; a checkpoint is written.
    """
    session, folder = job.session, point_folder(config.save_dir, point)
    settings = config.run_config_of(point, folder)
    facts = {name: job.settings[name] for name in _FACTS}
    job = replace(job, config=settings, settings=settings.to_dict() | facts)
    # As a run of these settings alone, whatever was done before.
    torch.manual_seed(point.seed + session.processes.rank)
    if session.processes.is_main:
        clear_halves(folder)
    resumed = session.processes.from_main(lambda: latest_checkpoint(folder / CHECKPOINTS))
    if resumed is not None:
        found = _read(resumed, job)
        job = replace(job, resumed=found)
        pruned, plan, report = restore(job, found)
        return _tuned(job, pruned, plan, report, point, teacher)
    with session.timed("surgery"):
        pruned, plan = pruner.prune(point.setting)
    latency = compare_latency(job, pruned) if config.latency else None
    small = measure(job, pruned)
    if config.epochs_ft == 0:
        return SweepRow(point.setting, plan.kept, plan.total, small, latency, point.seed)
    small = replace(small, epoch=0)
    report = RunReport(
        base=dense,
        pruned=small,
        best=small,
        final=small,
        keep_ratio=plan.kept / plan.total if plan.total else 1.0,
        sites=plan.widths,
        attention=plan.attention_share,
        images={"calibration": len(job.calibration), "val": dense.images or 0},
        latency=latency,
        **circumstances(job),
    )
    if session.processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, settings.to_dict())
        plan.save(folder / PLAN)
    return _tuned(job, pruned, plan, report, point, teacher)


def _read(path: Path, job: Job) -> Resumed:
    state = read_checkpoint(path)
    with checked_content(path):
        saved = dict(state["settings"])
    check_same_settings(saved, job.settings, path)
    return Resumed(path, state)


def _tuned(
    job: Job, pruned: nn.Module, plan: PruningPlan, report: RunReport, point: Point, teacher: nn.Module | None
) -> SweepRow:
    """Fine-tune a pruned model, and leave the folder of a run."""
    try:
        report = finetune(job, pruned, plan, report, teacher=teacher)
    except Interrupted as error:
        # What it says is the way on of a run.
        raise Interrupted(error.signal) from error
    finally:
        job.dense.requires_grad_(True)  # as the teacher it had none
    report = replace(report, **circumstances(job))
    if job.session.processes.is_main:
        folder = job.config.save_dir
        write_artifact(folder, report)
        write_json(folder / SUMMARY, report.to_dict())
    return SweepRow(
        point.setting, plan.kept, plan.total, replace(report.pruned, epoch=None), report.latency, point.seed,
        report.best,
    )  # fmt: skip


def clear_passing(folder: Path, point: Point) -> None:
    """Remove what a point needed only until its row was written."""
    place = point_folder(folder, point)
    if (place / CHECKPOINTS).is_dir():
        clear_checkpoints(place)
        with contextlib.suppress(OSError):
            (place / CHECKPOINTS).rmdir()
    clear_folder(place, _PASSING)


def clear_killed(folder: Path, point: Point) -> None:
    """Remove what a job left that was killed after it had written the row of a point."""
    place = point_folder(folder, point)
    if any((place / name).exists() for name in (LOCK, CHECKPOINTS, *_PASSING)):
        with try_lock(place) as free:
            if free:
                clear_passing(folder, point)


def clear_points(folder: Path) -> None:
    """Remove the points of another sweep: what vbp has written, and folders that hold nothing else."""
    places = [place for place in (folder / POINTS).glob("*") if place.is_dir()]
    for place in places:
        clear_checkpoints(place)
        clear_halves(place)
        remove_folder(place / ARTIFACT)
        clear_folder(place, (ROW, CONFIG, PLAN, METRICS, SUMMARY, *_PASSING))
        for part in (place / CHECKPOINTS, place):
            with contextlib.suppress(OSError):
                part.rmdir()
    clear_folder(folder / POINTS, [file.name for file in (folder / POINTS).glob("*-of-*.log")])
    with contextlib.suppress(OSError):
        (folder / POINTS).rmdir()
