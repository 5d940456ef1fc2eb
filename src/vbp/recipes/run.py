"""A whole run: a trained classifier and its data in; a pruned, fine-tuned one and its report out."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import torch
from torch import nn

from vbp.deploy.artifact import PrunedArtifact, installed_versions, rebuild_
from vbp.deploy.artifact_files import ARTIFACT, remove_folder
from vbp.deploy.open_model import is_pruned, open_dense, open_model
from vbp.errors import InputError
from vbp.models.class_names import is_imagenet
from vbp.pruning.plan import PlanChoice, PruningPlan
from vbp.pruning.surgery import prune_
from vbp.recipes.checks import check_config
from vbp.recipes.config import FinetuneConfig, RunConfig
from vbp.recipes.finetune import check_memory, finetune
from vbp.recipes.folder import ASKED, BEGUN, begin_anew, clear_halves, own_folder
from vbp.recipes.measure import compare_latency, describe, machine, measure, measure_dense
from vbp.recipes.prune import keep_plan, prune_copy
from vbp.recipes.publish import changed_settings, check_shipping, publish_artifact, write_artifact
from vbp.recipes.resume import CONFIG, ended_run, way_on
from vbp.recipes.setup import Job, Resumed, make_refits, open_session, prepare
from vbp.recipes.tune import TUNE, tune
from vbp.refit.refits import Refits
from vbp.report.run_report import BEST, FINAL, METRICS, PLAN, STATISTICS, SUMMARY, Measured, RunReport
from vbp.runtime.decode import from_json, to_json
from vbp.runtime.files import clear_folder, write_json
from vbp.runtime.forward import copy_model
from vbp.runtime.log_file import RunLog, log_lines, run_log, told_if_slow
from vbp.runtime.precision import move_
from vbp.runtime.processes import Processes, command_line, restarts
from vbp.runtime.session import Session
from vbp.training.checkpoints import checked_content, clear_checkpoints

_log = logging.getLogger(__name__)
LOG = "vbp_imagenet.log"
_FILES = (LOG, CONFIG, STATISTICS, PLAN, METRICS, BEST, FINAL, SUMMARY)


def run(config: RunConfig) -> RunReport:
    """Prune a model, fine-tune it, and leave log, checkpoints and report in `config.save_dir`.

    Everything that the configuration names is checked before any work is done and before anything is written.
    Under torchrun each process calls it; all do their share, one writes, and all return the same report.

    Raises:
        InputError: Something in the configuration or behind its paths is wrong.
        OutputError: A file could not be written, or the upload failed; the files before it are whole.
        PeerError: Another process of the job failed.
        Interrupted: The run was told to stop during fine-tuning, and wrote a checkpoint.

    Source: VBP paper (arXiv 2507.12988), section 3.

    Example:
        >>> vbp.run(config).keep_ratio
        0.5
    """
    check_config(config)
    with run_log() as log, open_session(config) as session, _own_folder(config, session.processes):
        if session.processes.is_main:
            check_shipping(config)
        ended = session.processes.from_main(partial(ended_run, config, restarted=restarts() > 0))
        if ended is not None:
            if session.processes.is_main:
                clear_halves(config.save_dir)
                clear_folder(config.save_dir, (ASKED,))
                log.open(config.save_dir / LOG, append=True)
            _log.info("the run in %s has ended; its report is written again", config.save_dir)
            _show(config, session, ended)
            return ended
        job = prepare(config, session, config.needs)  # model, sites, images, budget: all checked, nothing written
        refits = make_refits(job)
        teacher = teacher_of(job)
        dense = measure_dense(job) if job.resumed is None else None  # before anything else is done
        _open_folder(job, log)
        session.processes.barrier()  # an error of another process is to find the log
        torch.manual_seed(config.seed + session.processes.rank)
        check_memory(job)
        if job.resumed is None:
            assert dense is not None
            pruned, plan, report = _prune(job, dense, refits)
        else:
            pruned, plan, report = restore(job, job.resumed)
        return _finish(job, pruned, plan, report, teacher)


def run_finetune(config: FinetuneConfig) -> RunReport:
    """Fine-tune a pruned model, and leave what a run leaves, but for statistics.

    Raises:
        InputError: The model is none that vbp pruned, or as `run`.
    """
    settings = config.run_config()
    if not is_pruned(config.artifact):
        raise InputError(
            f"vbp finetune takes a pruned model or the folder of a run, got {config.artifact}; prune it by vbp run"
        )
    if settings.epochs_ft < 1 and settings.tune == "off":
        raise InputError(
            f"epochs_ft must be at least 1 to fine-tune, got {settings.epochs_ft}; 10 is usual, or give --tune"
        )
    if settings.tune == "off" and settings.calib_samples:
        raise InputError(
            f"calib_samples changes nothing without tune, got {settings.calib_samples}; leave it out, or give --tune"
        )
    check_config(settings)
    with run_log() as log, open_session(settings) as session, _own_folder(settings, session.processes):
        if session.processes.is_main:
            check_shipping(settings)
        job = prepare(settings, session)
        teacher = teacher_of(job)
        if not job.labelled:
            job = replace(job, original=teacher)
        _open_folder(job, log)
        session.processes.barrier()  # an error of another process is to find the log
        torch.manual_seed(settings.seed + session.processes.rank)
        check_memory(job)
        if job.resumed is None:
            pruned, plan, report = _as_it_is(job)
        else:
            pruned, plan, report = restore(job, job.resumed)
        return _finish(job, pruned, plan, report, teacher)


def _finish(job: Job, pruned: nn.Module, plan: PruningPlan, report: RunReport, teacher: nn.Module) -> RunReport:
    """Tune without labels, fine-tune, and write, show and publish the results."""
    report = tune(job, pruned, plan, report, teacher=teacher)
    if job.resumed is not None and TUNE in job.resumed.state:
        job = replace(job, resumed=None)  # fine-tuning begins
    report = finetune(job, pruned, plan, report, teacher=teacher if job.config.use_kd or not job.labelled else None)
    report = replace(report, **circumstances(job))
    if job.session.processes.is_main:
        _write_results(job.config, report)
    _show(job.config, job.session, report)
    return report


def teacher_of(job: Job) -> nn.Module:
    """Return the model to learn from, the dense one unless another is named: checked before any work."""
    config = job.config
    if not job.labelled:
        # It learns from the dense one alone; a model that is pruned already, from what it was made of.
        if job.artifact is None or (config.epochs_ft == 0 and config.tune == "off"):
            return job.dense
        return move_(open_dense(config.model_name).model, job.session.device)
    if config.teacher is None:
        return job.dense
    source = config.teacher == "source"
    teacher = open_dense(config.model_name) if source else open_model(config.teacher).classifier
    if teacher.num_classes != job.classifier.num_classes or teacher.preprocessing != job.classifier.preprocessing:
        raise InputError(
            f"a teacher must take the same images and have the same classes as the model, got {config.teacher} with "
            f"{teacher.num_classes} classes and {teacher.preprocessing}, and {job.classifier.num_classes} with "
            f"{job.classifier.preprocessing}; choose another --teacher"
        )
    return move_(teacher.model, job.session.device)


def _as_it_is(job: Job) -> tuple[nn.Module, PruningPlan, RunReport]:
    """Measure the pruned model that is fine-tuned; the report has the plan by which it was pruned."""
    assert job.artifact is not None
    small, made = measure(job, job.dense), job.artifact.plans[-1]
    _log.info("pruned: %s", describe(small))
    small = replace(small, epoch=0)
    keep_plan(job, made, job.config.save_dir)
    report = RunReport(
        base=_dense_of(job.artifact) or small,
        pruned=small,
        best=small,
        final=small,
        keep_ratio=made.kept / made.total if made.total else 1.0,
        sites=made.widths,
        attention=made.attention_share,
        images={"calibration": 0, "val": small.images or 0},
        **circumstances(job),
    )
    return copy_model(job.dense), job.plan_rules.neutral(job.sites, 1.0), report


def _dense_of(artifact: PrunedArtifact) -> Measured | None:
    """Return what was measured of the dense model when the pruned one was made, if that is known."""
    dense = (artifact.metrics or {}).get("dense")
    if isinstance(dense, dict):
        dense = {"top1": None, "top5": None, **dense}
    try:
        return None if dense is None else from_json(Measured, dense, "the dense model's figures", use_defaults=True)
    except InputError:
        return None  # of another program's making


def run_to_budget(config: RunConfig) -> RunReport:
    """Call `run`, and raise at its end if a target was missed, unless `config.best_effort` accepts that.

    Raises:
        InputError: Likewise; or as `run`.
    """
    report = run(config)
    if config.budget.quantity != "keep_ratio" and not (report.budget["met"] or config.best_effort):
        raise InputError(
            f"{report.budget['sentence']}; the results are in {config.save_dir}: change the target, or give "
            "--best_effort to accept the nearest plan"
        )
    return report


def _prune(job: Job, dense: Measured, refits: Refits | None) -> tuple[nn.Module, PruningPlan, RunReport]:
    """Prune a copy of the dense model, and measure it."""
    config = job.config
    pruned = prune_copy(job, refits, stop_early=config.calib_samples == "auto", save_dir=config.save_dir)
    plan, convergence = pruned.plan, pruned.convergence
    uncompensated = _uncompensated(job, pruned.choice)
    small = measure(job, pruned.model)
    _log.info("pruned: %s", describe(small))
    latency = compare_latency(job, pruned.model)
    small = replace(small, epoch=0)
    report = RunReport(
        base=dense,
        pruned=small,
        best=small,  # until it is fine-tuned
        final=small,
        keep_ratio=plan.kept / plan.total if plan.total else 1.0,
        sites=plan.widths,
        attention=plan.attention_share,
        images={"calibration": pruned.images, "val": dense.images or 0},
        latency=latency,
        uncompensated=uncompensated,
        convergence=None if convergence is None else convergence.to_dict(),
        budget=pruned.budget.to_dict(),
        candidates=to_json(pruned.choice.tried),
        reconstruction={
            one.site: {"mean_shift": one.mean_shift, "refit": one.refit, "energy": one.energy}
            for one in pruned.reconstruction
        },
        **pruned.refits.to_dict(),
        **circumstances(job),
    )
    return pruned.model, plan, report


def restore(job: Job, resumed: Resumed) -> tuple[nn.Module, PruningPlan, RunReport]:
    """Bring a copy of the dense model to where a checkpoint was written; the rest as `_prune`."""
    with checked_content(resumed.path):
        state = resumed.state
        plan, report = PruningPlan.from_dict(state["plan"]), RunReport.from_dict(state["report"])
        pruned = copy_model(job.dense)
        rebuild_(pruned, (plan,), state[TUNE]["start"] if TUNE in state else state["trainer"]["student"])
        move_(pruned, job.session.device)
        for stage, seconds in state["seconds"].items():
            job.session.seconds[stage] = job.session.seconds.get(stage, 0.0) + seconds
        keep_plan(job, plan, job.config.save_dir)
    return pruned, plan, report


def _uncompensated(job: Job, choice: PlanChoice) -> Measured | None:
    if not job.config.compare_uncompensated:
        return None
    model = copy_model(job.dense)
    # The directions that go are part of the plan, not of the compensation.
    prune_(model, choice.plan, covariances=choice.covariances if choice.plan.principal else None)
    measured = measure(job, model)
    _log.info("pruned without compensation: %s", describe(measured))
    return measured


def circumstances(job: Job) -> dict[str, Any]:
    """Return when, where and by which command this attempt ran: an earlier one may have run elsewhere."""
    folder, config, classifier = job.config.save_dir, job.config.to_dict(), job.classifier
    return {
        "seconds": dict(job.session.seconds),
        "device": job.session.device.type,
        "processes": job.session.processes.world,
        "versions": installed_versions(),
        "config": config,
        "objective": {
            "kind": job.objective.kind,
            "measure": job.objective.measure,
            "sentence": job.objective.sentence(),
        },
        "files": {name: str(folder / name) for name in (*_FILES, ARTIFACT)},
        "date": datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        "command": command_line(),
        "hardware": machine(job.session.device),
        "changed": changed_settings(config),
        "imagenet": is_imagenet(classifier.class_names, classifier.num_classes),
    }


def _own_folder(config: RunConfig, processes: Processes) -> AbstractContextManager[None]:
    # A restarted attempt finds results of its own, which it goes on from.
    settings = config.to_dict() if config.overwrite and restarts() == 0 else None
    return own_folder(config.save_dir, config.data_path, processes, partial(way_on, config.save_dir), settings)


def _open_folder(job: Job, log: RunLog) -> None:
    """Begin to write: from here on the folder is this run's."""
    if not job.session.processes.is_main:
        return
    folder, resumed, settings = job.config.save_dir, job.resumed, job.config.to_dict()

    def clear() -> None:
        from vbp.report.html import clear_report

        if resumed is None:
            clear_folder(folder, _FILES)
            remove_folder(folder / ARTIFACT)
        clear_report(folder)
        # Checkpoints later than the one that was chosen belong to another course of the run.
        clear_checkpoints(folder, after=None if resumed is None else resumed.path)

    clear_halves(folder)
    if resumed is None:
        begin_anew(folder, CONFIG, settings, clear)
    else:
        clear()
        write_json(folder / CONFIG, settings)
        clear_folder(folder, (BEGUN, ASKED))
    log.open(folder / LOG, append=resumed is not None)


def _write_results(config: RunConfig, report: RunReport) -> None:
    """Write the results: the summary last, but for the pages that are drawn from it."""
    write_artifact(config.save_dir, report)
    write_json(config.save_dir / SUMMARY, report.to_dict())


def _show(config: RunConfig, session: Session, report: RunReport) -> None:
    """Draw the pages of a report, show its table, and publish the model if asked to."""
    if session.processes.is_main:
        from vbp.report.html import write_report  # drawing takes a second to import

        with told_if_slow(_log, "drawing the report"):
            report_file = write_report(config.save_dir)
        _log.info("report: %s", report_file)
    _log.info("results in %s", config.save_dir)
    log_lines(_log, report.table())
    _log.info('load it with vbp.load_pruned("%s")', config.save_dir / ARTIFACT)
    if session.processes.is_main and config.push_to_hub is not None:
        _log.info("published: %s", publish_artifact(config))
