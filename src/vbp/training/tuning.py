"""Bring a pruned model nearer to a teacher on calibration images, without labels.

Short trials from the same start choose the learning rate, by the divergence on held-out images; a longer training at
this rate follows. After each epoch the model, a moving average of its weights, and weights half way from the pruned
model to that average are compared: few images make noisy gradients, and half of the way takes a quarter of what
the noise does and half of what is learnt. The model that is nearest on the held-out images is kept; where that is
the pruned model itself, it stays as it was.

Source: the mean of weights before and after training is WiSE-FT, Wortsman et al. 2022 (arXiv 2109.01903).
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.pruning.divergence import ONE_IN, DenseReference, held_out_places
from vbp.runtime.decode import from_json, to_json
from vbp.runtime.forward import evaluation_mode, frozen
from vbp.runtime.memory import gib, out_of_memory, peak_memory
from vbp.runtime.precision import Precision, move_
from vbp.statistics.images import ImageSource
from vbp.statistics.objective import Objective
from vbp.statistics.stream_target import StreamTarget
from vbp.statistics.training_images import UnlabelledLoader, training_images
from vbp.training.losses import DistillationLoss
from vbp.training.meters import DivergedError, EpochResult, steps_per_epoch
from vbp.training.trainer import Trainer, TrainerSettings
from vbp.training.tuning_length import RATES, Schedule, TuningLength
from vbp.training.tuning_report import TunedEpoch, TuningReport, Weights

_log = logging.getLogger(__name__)

# Share of the steps over which the rate rises: the first ones of AdamW know little of the size of gradients.
_WARMUP: Final = 0.1

# Of the error of the residual stream, beside that of the predictions.
STREAM_WEIGHT: Final = 8.0

# Of biases and the parameters of norms, as a multiple of the rate of weights: so few numbers do not learn single
# images by heart.
VECTOR_RATE: Final = 30.0

# Images in a batch of a process: a thousand images make few steps an epoch as it is.
LARGEST_BATCH: Final = 32


@dataclass(frozen=True)
class TunerSettings:
    """How a model is tuned, beside the learning rate: as for `TrainerSettings`."""

    length: TuningLength
    batch_size: int = LARGEST_BATCH
    accumulate: int = 1
    weight_decay: float = 0.01
    clip_grad: float | None = None
    compile: bool = False


@dataclass
class _State:
    """Where tuning stands: what a checkpoint holds beside the trainer's own state."""

    before: float
    schedule: Schedule
    phase: int = 0
    rows: list[TunedEpoch] = field(default_factory=list)
    best: TunedEpoch | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    peak_before: int = 0


def check_tuning_images(images: int) -> None:
    """Check that some images can judge and others be trained on."""
    if images < 2 * ONE_IN:
        raise InputError(
            f"tune needs at least {2 * ONE_IN} calibration images, got {images}; give more, or leave --tune out"
        )


class Tuner:
    """Tunes one pruned model; all processes of the images' session make this object, and use it alike.

    Attributes:
        trainer: Of the trial or training under way; None before the first.
        batches: Of one of its epochs.
        epochs_before: That earlier trials had.
    """

    def __init__(
        self,
        pruned: nn.Module,
        teacher: nn.Module,
        images: ImageSource,
        settings: TunerSettings,
        *,
        precision: Precision,
        objective: Objective | None = None,
        stream: StreamTarget | None = None,
        state: Mapping[str, Any] | None = None,
        own: Mapping[str, Any] | None = None,
    ) -> None:
        """Read the images, and compare both models on the held-out ones.

        Args:
            pruned: As surgery and refits left it, on the teacher's device.
            teacher: The dense model, which is left as it was, but for its layout in memory.
            images: Calibration images, at least 8.
            settings: How.
            precision: Of the training passes; models are compared in that of the session.
            objective: What the student learns of the teacher, and is judged by; by default what the teacher returns.
            stream: What the student learns of the teacher's residual stream, beside its predictions.
            state: What `state_dict` returned, to go on from there.
            own: With it, what `process_state` returned on the process with this rank.
        """
        self._pruned, self._teacher, self._images, self._settings = pruned, teacher, images, settings
        self._precision, self._session, self._stream = precision, images.session, stream
        self._device = next(pruned.parameters()).device
        check_tuning_images(len(images))
        held_out = held_out_places(len(images))
        move_(teacher, self._device)  # as training does: another layout in memory changes the last bits
        self._reference = DenseReference.held_out(teacher, images, held_out, objective)
        self.trainer: Trainer | None = None
        self._going_on = None if state is None or own is None else (state["trainer"], own)
        if state is None:
            peak = peak_memory(self._device)
            self._state = _State(self._reference.divergence(pruned), self._schedule(), peak_before=peak)
        else:
            self._state = _read(state)
        self.loader = self._training_images(self._state.schedule.images)
        self.batches = len(self.loader)

    @property
    def epochs_before(self) -> int:
        """Return the epochs of the trials that have ended."""
        return sum(self._state.schedule.phases[: self._state.phase])

    def tune_(self, after_step: Callable[[], None] | None = None) -> TuningReport:
        """Tune the model in place; `after_step` is called after each step, and may save the state or stop."""
        state, phases = self._state, self._state.schedule.phases
        schedule = state.schedule
        _log.info(
            "tuning without labels: %d images, %d epochs after trials of %d at peak learning rates %s; %d held-out "
            "images, KL %.4f; amp %s", schedule.images, schedule.epochs, schedule.trial_epochs,
            ", ".join(f"{rate:g}" for rate in RATES), self._reference.images, state.before, self._precision.name,
        )  # fmt: skip
        if self._stream is None:
            _log.info("what is learnt: the predictions; the models have no residual stream in common")
        else:
            _log.info("what is learnt: the predictions, and the stream after %d blocks", len(self._stream.modules))
        with evaluation_mode(self._teacher), frozen(self._teacher), out_of_memory():
            while state.phase < len(phases):
                if state.phase == len(RATES) and not self._ended:
                    break  # no rate is left
                try:
                    self._train(phases[state.phase], after_step)
                except DivergedError:
                    rate = self._rate()
                    _log.warning("training at peak learning rate %g diverged: it is left out", rate)
                state.phase += 1
        if state.best is not None:
            self._pruned.load_state_dict(state.weights)
        report = self._report()
        _log.info("%s", report.sentence())
        _log.info("memory: at most %s before tuning, %s with it", gib(report.peak_before), gib(report.peak))
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return what all processes share, as plain data and tensors."""
        state = self._state
        return {
            "start": self._pruned.state_dict(),
            "trainer": None if self.trainer is None else self.trainer.state_dict(),
            "weights": dict(state.weights),
            "plain": {
                "before": state.before,
                "schedule": to_json(state.schedule),
                "phase": state.phase,
                "rows": to_json(state.rows),
                "best": to_json(state.best),
                "peak_before": state.peak_before,
            },
        }

    def process_state(self) -> dict[str, Any] | None:
        """Return what this process has for itself; None before the first trial."""
        return None if self.trainer is None else self.trainer.process_state()

    def _train(self, epochs: int, after_step: Callable[[], None] | None) -> None:
        """Train for the epochs of one phase, or those that are left of it, and compare after each."""
        rate, self.trainer = self._rate(), None  # the memory of the last one is free before the next takes its own
        self.trainer = trainer = self._new_trainer(rate, epochs)
        if self._going_on is not None:
            trainer.load_state_dict(*self._going_on)
            self._going_on = None
        label = f"{'trial' if self._state.phase < len(RATES) else 'tuning'} at {rate:g}"
        for epoch in range(max(1, trainer.epoch), epochs + 1):
            show = partial(self._session.progress, label=f"{label}, {epoch}/{epochs}")
            result = trainer.train_epoch(self.loader, epoch, show, after_step=after_step)
            self._judge(trainer, epochs, result, label)

    def _judge(self, trainer: Trainer, epochs: int, result: EpochResult, label: str) -> None:
        models: dict[Weights, nn.Module] = {
            "trained": trainer.student,
            "averaged": trainer.evaluated,
            "half way": _half_way(self._pruned, trainer.evaluated),
        }
        found = {name: self._reference.divergence(model) for name, model in models.items()}
        if not math.isfinite(sum(found.values())):
            raise DivergedError(f"{label} diverged: the held-out KL is {found}")
        row = TunedEpoch(trainer.settings.learning_rate, result.epoch, epochs, result.loss, found)
        self._state.rows.append(row)
        nearest = self._state.before if self._state.best is None else self._state.best.best
        if row.best < nearest:
            chosen = models[row.nearest].state_dict()
            self._state.best = row
            self._state.weights = {name: each.detach().cpu().clone() for name, each in chosen.items()}
        _log.info(
            "%s, epoch %d/%d: loss %.4f; held-out KL %.4f, averaged weights %.4f, half way to them %.4f; %.1f s",
            label, result.epoch, epochs, result.loss, *found.values(), result.seconds,
        )  # fmt: skip

    def _rate(self) -> float:
        """Return the rate of the phase: of a trial its own, then that of the trial that came nearest."""
        if self._state.phase < len(RATES):
            return RATES[self._state.phase]
        return min(self._ended, key=lambda row: row.best).learning_rate

    @property
    def _ended(self) -> list[TunedEpoch]:
        """Return the last epochs of the trials that did not diverge."""
        rows = self._state.rows
        return [row for row in rows if row.epoch == row.epochs == self._state.schedule.trial_epochs]

    def _new_trainer(self, rate: float, epochs: int) -> Trainer:
        settings, steps = self._settings, steps_per_epoch(len(self.loader), self._settings.accumulate)
        trainer = TrainerSettings(
            steps=epochs * steps,
            learning_rate=rate,
            weight_decay=settings.weight_decay,
            vector_rate=VECTOR_RATE,
            warmup_steps=int(_WARMUP * epochs * steps),
            loss=DistillationLoss(alpha=0.0, beta=1.0, temperature=1.0),
            accumulate=settings.accumulate,
            clip_grad=settings.clip_grad,
            ema_decay=1 - 1 / steps,  # over about an epoch
            compile=settings.compile,
            fixed_statistics=True,
            objective=None if self._reference.objective.kind == "logits" else self._reference.objective,
            stream=self._stream,
            stream_weight=STREAM_WEIGHT,
        )
        return Trainer(
            copy.deepcopy(self._pruned), trainer, device=self._device, teacher=self._teacher,
            precision=self._precision, processes=self._session.processes,
        )  # fmt: skip

    def _training_images(self, count: int) -> UnlabelledLoader:
        first = len(held_out_places(len(self._images)))
        return training_images(self._images, range(first, first + count), self._settings.batch_size)

    def _schedule(self) -> Schedule:
        """Return what the length comes to; a time is shared out by the seconds of a few batches."""
        length, held_out = self._settings.length, len(held_out_places(len(self._images)))
        images = len(self._images) - held_out
        if length.epochs is not None:
            return Schedule(images, length.epochs)
        if length.seconds is None:
            return Schedule.by_device(images, self._device.type)
        an_image = self._seconds_an_image()
        schedule = Schedule.within(length.seconds, an_image, images, held_out, self._settings.batch_size)
        _log.info("an image takes %.4f s: planned for %g s", an_image, length.seconds)
        return schedule

    def _seconds_an_image(self) -> float:
        """Return the seconds that a training image takes, on the slowest process; a first batch warms up."""
        count = 3 * self._settings.batch_size * self._session.processes.world
        self.loader = _FirstBatches(self._training_images(min(count, len(self._images) * 3 // 4)))
        with evaluation_mode(self._teacher), frozen(self._teacher), out_of_memory():
            trainer = self._new_trainer(RATES[0], 2)
            trainer.train_epoch(self.loader, 1)
            self.loader.first = 2
            start = time.perf_counter()
            result = trainer.train_epoch(self.loader, 2)
        each = (time.perf_counter() - start) / result.images
        return max(self._session.processes.all_gather(each))

    def _report(self) -> TuningReport:
        state, best = self._state, self._state.best
        kept: dict[str, Any] = {}
        if best is not None:
            kept = {"learning_rate": best.learning_rate, "epoch": best.epoch, "weights": best.nearest}
        return TuningReport(
            state.schedule.images, self._reference.images, state.before, state.before if best is None else best.best,
            precision=self._precision.name, rows=tuple(state.rows), peak_before=state.peak_before,
            peak=peak_memory(self._device), **kept,
        )  # fmt: skip


def _half_way(start: nn.Module, end: nn.Module) -> nn.Module:
    """Return a copy of a model with the mean of its weights and those that training began with."""
    middle = copy.deepcopy(end)
    with torch.no_grad():
        for mine, other in zip(middle.parameters(), start.parameters(), strict=True):
            mine.lerp_(other, 0.5)
    return middle


class _FirstBatches:
    """The first batches of a loader."""

    def __init__(self, loader: UnlabelledLoader) -> None:
        self._loader, self.first = loader, 1

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self._loader.set_epoch(epoch, start)

    def global_size(self, batch: int) -> int:
        return self._loader.global_size(batch)

    def __len__(self) -> int:
        return min(self.first, len(self._loader))

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        return (batch for _, batch in zip(range(len(self)), self._loader, strict=False))


def _read(state: Mapping[str, Any]) -> _State:
    plain = state["plain"]
    rows = from_json(_Rows, {"rows": plain["rows"]}, "the epochs of tuning", "start over").rows
    best = None if plain["best"] is None else from_json(TunedEpoch, plain["best"], "the best epoch", "start over")
    schedule = from_json(Schedule, plain["schedule"], "the schedule of tuning", "start over")
    if not (isinstance(plain["phase"], int) and 0 <= plain["phase"] < len(schedule.phases)):
        raise ValueError(f"phase must be one of {len(schedule.phases)}, got {plain['phase']!r}")
    before = float(plain["before"])
    if not math.isfinite(before):
        raise ValueError(f"the divergence before tuning must be a finite number, got {before}")
    return _State(before, schedule, plain["phase"], list(rows), best, state["weights"], int(plain["peak_before"]))


@dataclass(frozen=True)
class _Rows:
    rows: tuple[TunedEpoch, ...]
