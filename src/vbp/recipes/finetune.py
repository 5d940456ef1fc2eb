"""Fine-tune the pruned model: epochs, evaluation, best and final file, and checkpoints to go on from."""

from __future__ import annotations

import copy
import json
import logging
import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from vbp.cost.target import neutral_plan
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import training_transform
from vbp.deploy.artifact import save_pruned
from vbp.errors import Interrupted
from vbp.pruning.surgery import prune_
from vbp.recipes.measure import figures, measure
from vbp.recipes.prune import Pruned
from vbp.recipes.setup import Job, reading
from vbp.report.run_report import Measured
from vbp.runtime.files import write_bytes
from vbp.runtime.memory import out_of_memory
from vbp.runtime.session import bar
from vbp.runtime.signals import Interruption
from vbp.training.checkpoints import save_checkpoint
from vbp.training.losses import DistillationLoss
from vbp.training.memory import dry_step
from vbp.training.meters import EpochResult, steps_per_epoch
from vbp.training.mixup import Mixup
from vbp.training.tensorboard import Tracker
from vbp.training.trainer import Trainer, TrainerSettings

_log = logging.getLogger(__name__)


METRICS, BEST, FINAL = "metrics.jsonl", "vbp_best.pth", "vbp_final.pth"


_GO_ON, _SAVE, _STOP = 0, 1, 2


@dataclass
class _Progress:
    """How far fine-tuning has come, beside the trainer's own state."""

    rows: list[dict[str, Any]]
    best: Measured
    final: Measured
    best_weights: Mapping[str, Tensor]


def finetune(job: Job, pruned: Pruned, teacher: nn.Module | None) -> tuple[Measured, Measured]:
    """Fine-tune and keep the best and the last model; the pruned model counts as epoch 0.

    Args:
        job: Its model is trained in place.
        pruned: What was measured before.
        teacher: The dense model, for distillation.

    Returns:
        The best and the last model, as measured.

    Raises:
        Interrupted: The run was told to stop; a checkpoint is written.
    """
    found = None if job.found is None else job.found.state
    progress = _start(job, pruned) if found is None else _restored(found)
    _save(job, BEST, pruned, progress.best, progress.best_weights)
    _write_rows(job, progress.rows)
    if job.config.epochs_ft > 0:
        loader = _loader(job)
        trainer = _trainer(job, job.model, _announced(job, loader), teacher, compiled=job.config.compile)
        if found is not None:
            trainer.load_state_dict(found["trainer"], found["processes"][job.processes.rank])
        log_dir = job.config.log_dir if job.processes.is_main else None
        with Interruption() as interruption, Tracker(log_dir, first_epoch=trainer.epoch) as tracker:
            tracker.sites(pruned.plan)
            _epochs(job, pruned, progress, loader, trainer, interruption, tracker)
        model = trainer.evaluated
    else:
        model = job.model
    _save(job, FINAL, pruned, progress.final, model.state_dict())
    return progress.best, progress.final


def _start(job: Job, pruned: Pruned) -> _Progress:
    row = {"epoch": 0, "top1": pruned.pruned.top1, "top5": pruned.pruned.top5}
    return _Progress([row], pruned.pruned, pruned.pruned, _weights(job.model))


def _restored(found: Mapping[str, Any]) -> _Progress:
    measured = {name: Measured(**found[name]) for name in ("best", "final")}
    return _Progress(list(found["rows"]), measured["best"], measured["final"], found["best_weights"])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _loader(job: Job) -> ImageLoader:
    config = job.config
    return make_loader(
        job.train,
        training_transform(job.classifier.preprocessing, hflip=config.hflip, scale=config.crop_scale),
        batch_size=config.train_batch_size,
        shuffle=True,
        seed=config.seed,
        rank=job.processes.rank,
        world=job.processes.world,
        **reading(job.config),
    )


def rehearse(job: Job) -> None:
    """On a GPU, take one step before the work begins, so that a lack of memory does not show after hours.

    Raises:
        InputError: Memory does not suffice.
    """
    if job.device.type == "cuda" and job.config.epochs_ft > 0:
        try_step(job)


def try_step(job: Job) -> None:
    """Take one training step and one evaluation batch of the real size on a copy, and say what they took.

    Raises:
        InputError: Memory does not suffice.
    """
    student = copy.deepcopy(job.model)
    prune_(student, neutral_plan(job.sites, keep_ratio=job.target.keep_ratio, **job.rules))
    # Memory does not shrink when the compiler is left out, and compiling twice would take minutes.
    trainer = _trainer(job, student, 1, job.model if job.config.use_kd else None, compiled=False)
    use = dry_step(
        trainer,
        tuple(job.example.shape[1:]),
        batch_size=job.config.train_batch_size,
        val_batch_size=job.config.val_batch_size,
    )
    job.model.requires_grad_(True)  # as the teacher it had none
    _log.info("%s", use)


def _announced(job: Job, loader: ImageLoader) -> int:
    """Return what a step is, and give the steps of an epoch."""
    config, world = job.config, job.processes.world
    steps = steps_per_epoch(len(loader), config.grad_accum)
    _log.info(
        "fine-tuning: %d images a step (%d x %d processes x %d accumulated), %d steps an epoch, peak learning rate "
        "%g as given",
        config.train_batch_size * world * config.grad_accum, config.train_batch_size, world, config.grad_accum, steps,
        config.lr_ft,
    )  # fmt: skip
    return steps


def _trainer(job: Job, student: nn.Module, steps: int, teacher: nn.Module | None, *, compiled: bool) -> Trainer:
    config = job.config
    settings = TrainerSettings(
        steps=config.epochs_ft * steps,
        learning_rate=config.lr_ft,
        weight_decay=config.weight_decay,
        warmup_steps=math.ceil(config.warmup_epochs * steps),
        loss=DistillationLoss(config.kd_alpha, config.kd_beta, config.kd_T, label_smoothing=config.label_smoothing),
        accumulate=config.grad_accum,
        clip_grad=config.clip_grad,
        ema_decay=config.ema_decay if config.ema else None,
        compile=compiled,
        mixup=_mixup(job),
        measure_gradients=config.log_dir is not None,
    )
    return Trainer(
        student, settings, device=job.device, teacher=teacher, precision=job.precision, processes=job.processes
    )


def _mixup(job: Job) -> Mixup | None:
    config = job.config
    if config.mixup == 0 and config.cutmix == 0:
        return None
    return Mixup(config.mixup, config.cutmix, config.label_smoothing, job.classifier.num_classes, config.seed)


def _epochs(
    job: Job,
    pruned: Pruned,
    progress: _Progress,
    loader: ImageLoader,
    trainer: Trainer,
    interruption: Interruption,
    tracker: Tracker,
) -> None:
    epochs = job.config.epochs_ft
    save = partial(_checkpoint, job, pruned, progress, trainer)
    if trainer.epoch == 0:
        save()
    for epoch in range(max(1, trainer.epoch), epochs + 1):
        after_step = partial(_after_step, job, trainer, len(loader), interruption, save)
        with job.timed("finetune"), out_of_memory():
            result = trainer.train_epoch(
                loader, epoch, partial(bar, job, label=f"epoch {epoch}/{epochs}"), after_step=after_step
            )
        progress.final = replace(measure(job, trainer.evaluated, "evaluation"), epoch=epoch)
        _log.info("epoch %d/%d: loss %.4f; %s", epoch, epochs, result.loss, figures(progress.final))
        progress.rows.append(_row(progress.final, result))
        tracker.epoch(progress.rows[-1], result)
        if progress.final.top1 > progress.best.top1:
            progress.best, progress.best_weights = progress.final, _weights(trainer.evaluated)
            _save(job, BEST, pruned, progress.best, progress.best_weights)
        _write_rows(job, progress.rows)


def _row(final: Measured, result: EpochResult) -> dict[str, Any]:
    return {
        "epoch": final.epoch, "top1": final.top1, "top5": final.top5, "train_loss": result.loss,
        "train_top1": result.top1, "lr": result.learning_rate, "images": result.images, "seconds": result.seconds,
    }  # fmt: skip


def _after_step(
    job: Job, trainer: Trainer, batches: int, interruption: Interruption, save: Callable[[], None]
) -> None:
    """Write a checkpoint where it is time: at the end of an epoch, every so many minutes, or when told to stop."""
    wish = _GO_ON
    if trainer.batches_done == batches or (job.processes.is_main and interruption.due(job.config.checkpoint_minutes)):
        wish = _SAVE
    if interruption.signal is not None:
        wish = _STOP
    # A signal may reach one process a step before another: all must do the same.
    wish = job.processes.all_reduce_max(wish)
    if wish != _GO_ON:
        save()
    if wish == _STOP:
        number = interruption.signal or signal.SIGTERM
        raise Interrupted(
            number,
            f"stopped by {signal.Signals(number).name} in epoch {trainer.epoch} after {trainer.batches_done} of "
            f"{batches} batches; the same command with --resume auto goes on from there",
        )


def _checkpoint(job: Job, pruned: Pruned, progress: _Progress, trainer: Trainer) -> None:
    """Write what is needed to go on, in such a way that it makes no difference."""
    own = job.processes.all_gather(trainer.process_state())
    if not job.processes.is_main:
        return
    content = {
        "settings": job.settings,
        "pruned": pruned.to_dict(),
        "trainer": trainer.state_dict(),
        "processes": own,
        "rows": progress.rows,
        "best": asdict(progress.best),
        "final": asdict(progress.final),
        "best_weights": progress.best_weights,
        "seconds": dict(job.seconds),
    }
    path = save_checkpoint(job.config.save_dir, content, epoch=trainer.epoch, batch=trainer.batches_done)
    _log.info("checkpoint %s", path)


def _write_rows(job: Job, rows: list[dict[str, Any]]) -> None:
    if job.processes.is_main:
        write_bytes(job.config.save_dir / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _save(job: Job, name: str, pruned: Pruned, measured: Measured, weights: Mapping[str, Tensor]) -> None:
    if not job.processes.is_main:
        return
    save_pruned(
        weights,
        job.config.save_dir / name,
        plans=pruned.plan,
        source=job.classifier.source,
        preprocessing=job.classifier.preprocessing,
        class_names=job.classifier.class_names,
        metrics={"epoch": measured.epoch, "top1": measured.top1, "top5": measured.top5},
    )
