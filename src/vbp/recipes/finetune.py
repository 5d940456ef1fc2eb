"""Fine-tune the pruned model: epochs, evaluation, best and final file, and checkpoints to go on from."""

from __future__ import annotations

import json
import logging
import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import training_transform
from vbp.deploy.artifact import save_pruned
from vbp.errors import Interrupted
from vbp.models.weights import mismatch
from vbp.pruning.plan import PruningPlan
from vbp.pruning.surgery import cut_
from vbp.recipes.measure import describe, measure
from vbp.recipes.setup import Job, loader_options
from vbp.report.run_report import BEST, FINAL, METRICS, Measured, RunReport
from vbp.runtime.files import write_bytes
from vbp.runtime.forward import copy_model
from vbp.runtime.memory import out_of_memory
from vbp.runtime.signals import Interruption
from vbp.training.checkpoints import CHECKPOINTS, checked_content, save_checkpoint
from vbp.training.drop_path import set_drop_path_
from vbp.training.losses import DistillationLoss
from vbp.training.memory import dry_step
from vbp.training.meters import EpochResult, steps_per_epoch
from vbp.training.mixup import Mixup
from vbp.training.tensorboard import Tracker
from vbp.training.trainer import Trainer, TrainerSettings

_log = logging.getLogger(__name__)
_GO_ON, _SAVE, _STOP = 0, 1, 2


@dataclass
class _Progress:
    """State of fine-tuning beside the trainer's own: metrics of each epoch, and the best model."""

    job: Job
    plan: PruningPlan
    report: RunReport
    rows: list[dict[str, Any]]
    best_weights: Mapping[str, Tensor]

    @staticmethod
    def begin(job: Job, pruned: nn.Module, plan: PruningPlan, report: RunReport) -> _Progress:
        """Begin with the pruned model as epoch 0, or with the checkpoint that a run goes on from."""
        if job.resumed is not None:
            with checked_content(job.resumed.path):
                rows, weights = job.resumed.state["rows"], job.resumed.state["best_weights"]
                mismatched = mismatch(pruned.state_dict(), weights)
                if mismatched is not None or not all(isinstance(row["epoch"], int) for row in rows):
                    raise ValueError(f"its best weights or its epochs are damaged: {mismatched}")
            return _Progress(job, plan, report, [*rows], weights)
        row = {"epoch": 0, **_quality(report.best)}
        return _Progress(job, plan, report, [row], _weights(pruned))

    def add(self, model: nn.Module, result: EpochResult) -> None:
        """Measure the model after an epoch; keep it if it is the best so far."""
        final = replace(measure(self.job, model), epoch=result.epoch)
        _log.info("epoch %d/%d: loss %.4f; %s", result.epoch, self.job.config.epochs_ft, result.loss, describe(final))
        own = {"train_top1": result.top1} if self.job.labelled else {}
        self.rows.append({
            "epoch": final.epoch, **_quality(final), "train_loss": result.loss, **own, "lr": result.learning_rate,
            "images": result.images, "seconds": result.seconds,
        })  # fmt: skip
        self.report = replace(self.report, final=final)
        if final.score > self.report.best.score:
            self.report, self.best_weights = replace(self.report, best=final), _weights(model)
            self.save(BEST, final, self.best_weights)
        self.write_rows()

    def checkpoint(self, trainer: Trainer) -> None:
        """Write all that is needed to go on as if the run had not been interrupted."""
        processes = self.job.session.processes
        own = processes.all_gather(trainer.process_state())
        if not processes.is_main:
            return
        content = {
            "settings": self.job.settings,
            "plan": self.plan.to_dict(),
            "report": self.report.to_dict(),
            "trainer": trainer.state_dict(),
            "processes": own,
            "rows": self.rows,
            "best_weights": self.best_weights,
            "seconds": dict(self.job.session.seconds),
        }
        folder = self.job.config.save_dir
        path = save_checkpoint(folder, content, epoch=trainer.epoch, batch=trainer.batches_done)
        _log.debug("checkpoint %s", path)

    def write_rows(self) -> None:
        """Write a line for each epoch."""
        if self.job.session.processes.is_main:
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            write_bytes(self.job.config.save_dir / METRICS, lines.encode())

    def save(self, name: str, measured: Measured, weights: Mapping[str, Tensor]) -> None:
        """Write a model that can be loaded anywhere."""
        classifier = self.job.classifier
        if self.job.session.processes.is_main:
            save_pruned(
                weights,
                self.job.config.save_dir / name,
                plans=self.job.plans_with(self.plan),
                source=classifier.source,
                preprocessing=classifier.preprocessing,
                class_names=classifier.class_names,
                metrics={"epoch": measured.epoch, **_quality(measured), "images": measured.images},
            )


def _quality(measured: Measured) -> dict[str, float]:
    """Return the accuracies, or the agreement with the dense model where there are none."""
    names = ("top1", "top5") if measured.top1 is not None else ("cosine", "neighbours", "same")
    return {name: getattr(measured, name) for name in names if getattr(measured, name) is not None}


def finetune(
    job: Job, pruned: nn.Module, plan: PruningPlan, report: RunReport, *, teacher: nn.Module | None
) -> RunReport:
    """Fine-tune in place, keep the best and the last model, and return the report with both.

    The pruned model counts as epoch 0, tuned without labels where it was.

    Raises:
        Interrupted: The run was told to stop; a checkpoint is written.
    """
    progress = _Progress.begin(job, pruned, plan, report)
    progress.save(BEST, report.best, progress.best_weights)
    progress.write_rows()
    if job.config.epochs_ft > 0:
        pruned = _train(job, pruned, progress, teacher)
    progress.save(FINAL, progress.report.final, pruned.state_dict())
    return progress.report


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def check_memory(job: Job) -> None:
    """On a GPU, take one step before the work begins, so that a lack of memory does not show after hours."""
    if job.session.device.type == "cuda" and (job.config.epochs_ft > 0 or job.config.tune != "off"):
        dry_run(job)


def dry_run(job: Job) -> None:
    """Take one training step and one evaluation batch of the real size on a copy, and log what they took."""
    student = copy_model(job.dense)
    cut_(student, job.plan_rules.neutral(job.sites, job.target.keep_ratio))
    # Memory does not shrink when the compiler is left out, and compiling twice would take minutes.
    taught = job.config.use_kd or job.config.tune != "off" or not job.labelled
    trainer = _trainer(job, student, 1, job.dense if taught else None, compiled=False)
    use = dry_step(
        trainer,
        tuple(job.example.shape[1:]),
        batch_size=job.config.train_batch_size,
        val_batch_size=job.config.val_batch_size,
    )
    job.dense.requires_grad_(True)  # as the teacher it had none
    _log.info("%s", use)


def _loader(job: Job) -> tuple[ImageLoader, int]:
    """Return the training images and the steps of an epoch, and log what a step is."""
    config, processes = job.config, job.session.processes
    loader = make_loader(
        job.train,
        training_transform(
            job.classifier.preprocessing,
            hflip=config.hflip,
            scale=config.crop_scale,
            auto_augment=config.auto_augment,
            reprob=config.reprob,
        ),
        batch_size=config.train_batch_size,
        shuffle=True,
        seed=config.seed,
        **loader_options(config, processes),
    )
    steps = steps_per_epoch(len(loader), config.grad_accum)
    _log.info(
        "fine-tuning: %d images a step (%d x %d processes x %d accumulated), %d steps an epoch, peak learning rate "
        "%g as given; checkpoints after each epoch in %s",
        config.train_batch_size * processes.world * config.grad_accum, config.train_batch_size, processes.world,
        config.grad_accum, steps, config.lr_ft, config.save_dir / CHECKPOINTS,
    )  # fmt: skip
    return loader, steps


def _trainer(job: Job, student: nn.Module, steps: int, teacher: nn.Module | None, *, compiled: bool) -> Trainer:
    config, mixup = job.config, None
    if config.mixup > 0 or config.cutmix > 0:
        mixup = Mixup(config.mixup, config.cutmix, config.label_smoothing, job.classifier.num_classes, config.seed)
    settings = TrainerSettings(
        steps=config.epochs_ft * steps,
        learning_rate=config.lr_ft,
        layer_decay=config.layer_decay,
        weight_decay=config.weight_decay,
        warmup_steps=math.ceil(config.warmup_epochs * steps),
        loss=DistillationLoss(config.kd_alpha, config.kd_beta, config.kd_T, label_smoothing=config.label_smoothing),
        accumulate=config.grad_accum,
        clip_grad=config.clip_grad,
        ema_decay=config.ema_decay if config.ema else None,
        compile=compiled,
        mixup=mixup,
        measure_gradients=config.log_dir is not None,
        objective=None if job.labelled else job.objective,
    )
    return Trainer(
        student, settings, device=job.session.device, teacher=teacher, precision=job.session.precision,
        processes=job.session.processes,
    )  # fmt: skip


def _train(job: Job, pruned: nn.Module, progress: _Progress, teacher: nn.Module | None) -> nn.Module:
    """Train for all epochs, or for those that are left; return the model to evaluate and to save."""
    epochs, session, (loader, steps) = job.config.epochs_ft, job.session, _loader(job)
    if job.config.drop_path > 0:
        set_drop_path_(pruned, job.config.drop_path)
    trainer = _trainer(job, pruned, steps, teacher, compiled=job.config.compile)
    if job.resumed is not None:
        state = job.resumed.state
        with checked_content(job.resumed.path):
            trainer.load_state_dict(state["trainer"], state["processes"][session.processes.rank])
    save = partial(progress.checkpoint, trainer)
    log_dir = job.config.log_dir if session.processes.is_main else None
    with Interruption() as interruption, Tracker(log_dir, first_epoch=trainer.epoch) as tracker:
        tracker.sites(progress.plan.widths)
        if trainer.epoch == 0:
            save()
        for epoch in range(max(1, trainer.epoch), epochs + 1):
            saved = partial(after_step, job, trainer, len(loader), interruption, save)
            with session.timed("finetune"), out_of_memory():
                result = trainer.train_epoch(
                    loader, epoch, partial(session.progress, label=f"epoch {epoch}/{epochs}"), after_step=saved
                )
            progress.add(trainer.evaluated, result)
            tracker.epoch(progress.rows[-1], result)
    return trainer.evaluated


def after_step(
    job: Job, trainer: Trainer, batches: int, interruption: Interruption, save: Callable[[], None], stage: str = ""
) -> None:
    """Write a checkpoint at the end of an epoch, every `checkpoint_minutes`, and when told to stop.

    Raises:
        Interrupted: The run was told to stop, in an epoch of this stage; a checkpoint is written.
    """
    wish, processes = _GO_ON, job.session.processes
    if trainer.batches_done == batches or (processes.is_main and interruption.due(job.config.checkpoint_minutes)):
        wish = _SAVE
    if interruption.signal is not None:
        wish = _STOP
    # A signal may reach one process a step before another: all must do the same.
    wish = processes.all_reduce_max(wish)
    if wish != _GO_ON:
        save()
    if wish == _STOP:
        number = interruption.signal or signal.SIGTERM
        raise Interrupted(
            number,
            f"stopped by {signal.Signals(number).name} in {stage}epoch {trainer.epoch} after {trainer.batches_done} "
            f"of {batches} batches; the same command with --resume auto goes on from there",
        )
