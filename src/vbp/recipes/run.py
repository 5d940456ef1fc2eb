"""The whole story: a trained classifier and its data in, a pruned, fine-tuned, reported one out."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from vbp.deploy.artifact import installed_versions
from vbp.deploy.artifact_files import remove_folder
from vbp.recipes.checks import check_config
from vbp.recipes.config import RunConfig
from vbp.recipes.finetune import BEST, FINAL, METRICS, finetune, rehearse
from vbp.recipes.prune import PLAN, STATISTICS, Pruned, prune, prune_again
from vbp.recipes.publish import ARTIFACT, check_shipping, publish_artifact, write_artifact
from vbp.recipes.resume import CONFIG, SUMMARY
from vbp.recipes.setup import Job, prepare
from vbp.refit.refits import check_refits
from vbp.report.run_report import Measured, RunReport
from vbp.runtime.files import clear_folder, write_json
from vbp.runtime.log_file import RunLog, run_log
from vbp.runtime.processes import process_group
from vbp.statistics.evidence import check_given
from vbp.training.checkpoints import clear_checkpoints

_log = logging.getLogger(__name__)


LOG = "vbp_imagenet.log"


_FILES = (LOG, CONFIG, STATISTICS, PLAN, METRICS, BEST, FINAL, SUMMARY)


def run(config: RunConfig) -> RunReport:
    """Prune a classifier, fine-tune it, and leave log, checkpoints and report in `config.save_dir`.

    Everything that the configuration names is checked before any work is done and before anything is written.
    Under torchrun each process calls it; all do their share, one writes, and all return the same report.

    Raises:
        InputError: Something in the configuration or behind its paths is wrong.
        OutputError: A file could not be written, or the upload failed; the files before it are whole.
        PeerError: Another process of the job failed.
        Interrupted: The run was told to stop during fine-tuning, and wrote a checkpoint.

    Source: VBP paper (arXiv 2507.12988), section 3.
    """
    check_config(config)
    with run_log() as log, process_group(config.device, config.timeout_minutes) as (processes, device):
        if processes.main:
            check_shipping(config)
        job = prepare(config, processes, device)
        check_given(job, config.needs)
        check_refits(job)
        _open(job, log)
        torch.manual_seed(config.seed + processes.rank)
        rehearse(job)
        pruned, dense = prune(job) if job.found is None else prune_again(job, job.found.state)
        teacher = dense if config.use_kd else None
        del dense  # without distillation its memory is wanted for training
        best, final = finetune(job, pruned, teacher)
        report = _report(job, pruned, best, final)
        if processes.main:
            _leave(config, report)
        _log.info("results in %s\n%s", config.save_dir, report.table())
        _log.info('load it with vbp.load_pruned("%s")', config.save_dir / ARTIFACT)
        if processes.main and config.push_to_hub is not None:
            _log.info("published: %s", publish_artifact(config))
    return report


def _open(job: Job, log: RunLog) -> None:
    """Begin to write: from here on the folder is this run's."""
    if not job.processes.main:
        return
    folder = job.config.save_dir
    if job.found is None:
        clear_folder(folder, _FILES)
        remove_folder(folder / ARTIFACT)
    from vbp.report.html import clear_report

    clear_report(folder)
    # Checkpoints later than the one that was chosen belong to another course of the run.
    clear_checkpoints(folder, after=None if job.found is None else job.found.path)
    # First, since a run that ends at once is known again by it.
    write_json(folder / CONFIG, job.config.to_dict())
    log.open(folder / LOG, append=job.found is not None)


def _leave(config: RunConfig, report: RunReport) -> None:
    """Write what the run has come to; the summary last but for the pages that are drawn from it."""
    write_artifact(config.save_dir, report)
    write_json(config.save_dir / SUMMARY, report.to_dict())
    from vbp.report.html import write_report  # drawing takes a second to import

    _log.info("report: %s", write_report(config.save_dir))


def _report(job: Job, pruned: Pruned, best: Measured, final: Measured) -> RunReport:
    folder: Path = job.config.save_dir
    plan = pruned.plan
    return RunReport(
        base=pruned.base,
        pruned=pruned.pruned,
        best=best,
        final=final,
        uncompensated=pruned.uncompensated,
        keep_ratio=plan.kept / plan.total if plan.total else 1.0,
        sites=plan.widths,
        seconds=job.seconds,
        images={"calibration": pruned.images, "val": pruned.base.images or 0},
        convergence=pruned.convergence,
        budget=pruned.budget,
        candidates=pruned.candidates,
        reconstruction=pruned.reconstruction,
        producers=pruned.producers,
        stream=pruned.stream,
        head=pruned.head,
        latency_batch=pruned.latency_batch,
        device=str(job.device.type),
        processes=job.processes.world,
        versions=installed_versions(),
        config=job.config.to_dict(),
        files={name: str(folder / name) for name in (*_FILES, ARTIFACT)},
    )
