"""Tune the pruned model of a run without labels, before any fine-tuning, with checkpoints to go on from."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from torch import nn

from vbp.pruning.plan import PruningPlan
from vbp.recipes.finetune import after_step
from vbp.recipes.measure import describe, measure
from vbp.recipes.setup import Job
from vbp.report.run_report import RunReport
from vbp.runtime.precision import Precision
from vbp.runtime.signals import Interruption
from vbp.statistics.stream_target import StreamTarget
from vbp.training.checkpoints import checked_content, save_checkpoint
from vbp.training.tuning import LARGEST_BATCH, Tuner, TunerSettings
from vbp.training.tuning_length import TuningLength

_log = logging.getLogger(__name__)

# The stage in the report's seconds, and the key of a checkpoint that was written in it.
TUNE = "tune"


def tune(job: Job, pruned: nn.Module, plan: PruningPlan, report: RunReport, *, teacher: nn.Module) -> RunReport:
    """Tune in place, if that is asked for and not yet done, and return the report with the row `tuned`.

    The tuned model is then the one that fine-tuning begins with.

    Raises:
        Interrupted: The run was told to stop; a checkpoint is written.
    """
    length = TuningLength.of(job.config.tune)
    if length is None or report.tuned is not None:
        return report
    start = time.perf_counter()
    tuner = _tuner(job, pruned, length, teacher)

    def save() -> None:
        own = job.session.processes.all_gather(tuner.process_state())
        if job.session.processes.is_main:
            spent = {TUNE: job.session.seconds.get(TUNE, 0.0) + time.perf_counter() - start}
            _save(job, plan, report, tuner, own, dict(job.session.seconds) | spent)

    with Interruption() as interruption:
        if tuner.trainer is None:
            save()

        def saved() -> None:
            assert tuner.trainer is not None
            after_step(job, tuner.trainer, tuner.batches, interruption, save, "tuning, ")

        with job.session.timed(TUNE):
            done = tuner.tune_(saved)
    tuned = replace(report.pruned, epoch=0)
    if done.learning_rate is not None:
        tuned = replace(measure(job, pruned), epoch=done.epoch)
    _log.info("tuned: %s", describe(tuned))
    begun = replace(tuned, epoch=0)  # of fine-tuning
    return replace(report, tuned=tuned, tuning=done.to_dict(), best=begun, final=begun)


def _tuner(job: Job, pruned: nn.Module, length: TuningLength, teacher: nn.Module) -> Tuner:
    config, resumed = job.config, job.resumed
    settings = TunerSettings(
        length,
        batch_size=min(config.train_batch_size, LARGEST_BATCH),
        accumulate=config.grad_accum,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
        compile=config.compile,
    )
    precision = Precision.for_tuning(config.amp, job.session.device)
    known = pruned, teacher, job.calibration, settings
    stream = StreamTarget.find(teacher, pruned, job.sites, job.example, job.calibration)
    more: dict[str, Any] = {"precision": precision, "objective": job.objective, "stream": stream}
    if resumed is None:
        return Tuner(*known, **more)
    with checked_content(resumed.path):
        state, own = resumed.state[TUNE], resumed.state["processes"][job.session.processes.rank]
        return Tuner(*known, **more, state=state, own=own)


def _save(
    job: Job, plan: PruningPlan, report: RunReport, tuner: Tuner, own: list[Any], seconds: dict[str, float]
) -> None:
    """Write all that is needed to go on as if the run had not been interrupted."""
    content = {
        "settings": job.settings,
        "plan": plan.to_dict(),
        "report": report.to_dict(),
        TUNE: tuner.state_dict(),
        "processes": own,
        "seconds": seconds,
    }
    epoch, batch = (0, 0) if tuner.trainer is None else (tuner.trainer.epoch, tuner.trainer.batches_done)
    number = tuner.epochs_before + epoch
    path = save_checkpoint(job.config.save_dir, content, epoch=number, batch=batch, tuning=True)
    _log.info("checkpoint %s", path)
