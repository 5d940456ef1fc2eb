"""Fine-tune a pruned model: one epoch at a time, the learning rate over all steps, and a state to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW

from vbp.errors import InputError
from vbp.models.weights import load_weights_
from vbp.runtime.forward import logits_of
from vbp.runtime.precision import Precision, in_float32, move_
from vbp.runtime.processes import Processes
from vbp.runtime.random_state import random_state, set_random_state_
from vbp.statistics.objective import Objective
from vbp.statistics.stream_target import StreamTarget
from vbp.training.compile import Compiled, compile_errors
from vbp.training.losses import DistillationLoss
from vbp.training.meters import EpochMeter, EpochResult
from vbp.training.mixup import Mixup
from vbp.training.optim import make_ema, make_schedule, parameter_groups

_OFF, _ALONE = Precision(), Processes()

# Images and their labels; without labels None.
TrainingBatch = tuple[Tensor, Tensor | None]


class TrainingLoader(Sized, Protocol):
    """A training loader: each process gets as many batches, in an order that depends on the epoch."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order and the augmentation of an epoch, and leave out its first `start` batches."""

    def global_size(self, batch: int) -> int:
        """Return the images of batch number `batch`, counted from 0, over all processes."""

    def __iter__(self) -> Iterable[TrainingBatch]:
        """Return the batches of the epoch."""


@dataclass(frozen=True)
class TrainerSettings:
    """How a student is trained: AdamW, and a cosine over all `steps` down to 0 after a linear warm-up.

    Attributes:
        steps: Of the optimizer, in all epochs.
        learning_rate: The peak, used as it is, however many processes and batches make a step.
        layer_decay: Factor of the learning rate from each layer to the one before it, as `layer_groups` has them.
        weight_decay: Of all parameters, or of weights alone.
        vector_rate: Factor of the learning rate for biases and parameters of norms, which then have no weight decay.
        warmup_steps: Of the `steps`.
        loss: With a teacher; without one the loss is the cross-entropy alone, with the same label smoothing.
        accumulate: Batches whose gradients make one step.
        clip_grad: Largest norm of the gradient of a step.
        ema_decay: What remains of the moving average at each step; None keeps none.
        compile: Call student and teacher through torch.compile.
        mixup: Mixes the images of each batch, for student and teacher alike.
        fixed_statistics: Keep dropout off and the running statistics of BatchNorms as they are.
        measure_gradients: Report the norm of the gradients.
        objective: What is distilled from the teacher in the place of `loss`, without labels: features, or
            similarities with texts.
        stream: With a teacher, also brings the student's residual stream to the teacher's.
        stream_weight: Of its error, beside the rest of the loss.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> settings = vbp.TrainerSettings(steps=1000, learning_rate=1.5e-5, accumulate=2)

    Source: VBP paper, section 4.1.
    """

    steps: int
    learning_rate: float
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    vector_rate: float | None = None
    warmup_steps: int = 0
    loss: DistillationLoss = field(default_factory=DistillationLoss)
    accumulate: int = 1
    clip_grad: float | None = None
    ema_decay: float | None = None
    compile: bool = False
    mixup: Mixup | None = None
    fixed_statistics: bool = False
    measure_gradients: bool = False
    objective: Objective | None = None
    stream: StreamTarget | None = None
    stream_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the values that nothing else checks."""
        if self.accumulate < 1:
            raise InputError(
                f"grad_accum must be at least 1, got {self.accumulate}; leave it out for one batch a step"
            )
        if self.clip_grad is not None and not 0 < self.clip_grad < math.inf:
            raise InputError(f"clip_grad must be above 0 and finite, got {self.clip_grad}; leave it out not to clip")


class Trainer:
    """A student, its optimizer and schedule; the teacher, if there is one, teaches on the same batches.

    Attributes:
        student: As its user knows it; training may call it through DDP and the compiler.
        average: Moving average of the student's weights and buffers.
        epoch: Number of the epoch that was begun last; 0 before the first.
        batches_done: Of that epoch, on this process.
        steps_done: Of the optimizer, in all.

    Example:
        >>> settings = vbp.TrainerSettings(steps=8, learning_rate=1e-4)
        >>> trainer = vbp.Trainer(pruned, settings, device=images.device, teacher=model)
    """

    def __init__(
        self,
        student: nn.Module,
        settings: TrainerSettings,
        *,
        device: torch.device,
        teacher: nn.Module | None = None,
        precision: Precision = _OFF,
        processes: Processes = _ALONE,
    ) -> None:
        """Set up the optimizer, and what is called: the student under DDP, both models under the compiler.

        Args:
            student: Trained in place.
            settings: How.
            device: Where student and teacher are brought.
            teacher: Frozen, in evaluation mode.
            precision: Of the forward passes of student and teacher.
            processes: Each trains on its share of a batch.

        Raises:
            InputError: A value is out of range.
        """
        if teacher is None and (settings.objective is not None or settings.stream is not None):
            raise InputError("an objective is distilled from a teacher, got none; give the dense model as teacher")
        self.student, self.teacher = move_(student, device), teacher
        if teacher is not None:
            move_(teacher, device).eval().requires_grad_(False)
        self.settings, self.device, self.precision, self.processes = settings, device, precision, processes
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizer = AdamW(
            parameter_groups(
                student, rate, decay, layer_decay=settings.layer_decay, vector_rate=settings.vector_rate
            ),
            lr=rate,
            weight_decay=decay,
            fused=True if device.type == "cuda" else None,
        )
        self.scheduler = make_schedule(self.optimizer, settings.steps, settings.warmup_steps)
        self.average = None if settings.ema_decay is None else make_ema(student, settings.ema_decay)
        self.epoch = self.batches_done = self.steps_done = 0
        self._ddp: DistributedDataParallel | None = None
        if processes.world > 1:
            devices = [device] if device.type == "cuda" else None
            self._ddp = DistributedDataParallel(student, device_ids=devices, gradient_as_bucket_view=True)
        called = self._ddp or student
        self._student = Compiled(called) if settings.compile else called
        self._teacher = Compiled(teacher) if settings.compile and teacher is not None else teacher
        stream = settings.stream
        self._stream = None if stream is None or teacher is None else stream.watch(student, teacher)
        self._scaler: GradScaler = precision.scaler()
        self._dtype = next((each.dtype for each in student.parameters() if each.is_floating_point()), torch.float32)
        self._meter = EpochMeter(device)

    @property
    def evaluated(self) -> nn.Module:
        """Return the model to evaluate and to save: the moving average if there is one, else the student."""
        return self.student if self.average is None else self.average.module

    @cached_property
    def predictor(self) -> nn.Module:
        """Return `evaluated` as it is called fastest: compiled if asked for."""
        if not self.settings.compile:
            return self.evaluated
        return self._student if self._ddp is None and self.average is None else Compiled(self.evaluated)

    def train_epoch(
        self,
        loader: TrainingLoader,
        epoch: int,
        progress: Callable[[TrainingLoader], Iterable[TrainingBatch]] = iter,  # type: ignore[assignment]
        after_step: Callable[[], None] | None = None,
    ) -> EpochResult:
        """Train on every batch once, or on what is left of the epoch that a loaded state had begun.

        Args:
            loader: The training images.
            epoch: Counted from 1. One that is done is not trained again: its result is given.
            progress: Wraps the loader, to draw a bar.
            after_step: Called after each step of the optimizer, when the state is whole: it may save it, or raise
                an exception to stop.

        Raises:
            InputError: The loss is no longer a finite number.
        """
        if epoch != self.epoch:
            self.epoch, self.batches_done = epoch, 0
            self._meter.begin(max(map(float, self.scheduler.get_last_lr())))
        self._to_training()
        start = time.perf_counter() - self._meter.seconds
        if self.batches_done < len(loader):
            loader.set_epoch(epoch, start=self.batches_done)
            for number, (pixels, labels) in enumerate(progress(loader), start=self.batches_done):
                ends_step = (number + 1) % self.settings.accumulate == 0 or number + 1 == len(loader)
                self._learn(pixels, labels, number, self._weight(loader, number, len(pixels)), ends_step)
                if ends_step:
                    self._step()
                    self.batches_done = number + 1
                    self._meter.seconds = time.perf_counter() - start
                    if after_step is not None:
                        after_step()
        self._share_buffers()
        applied = max((int(state["step"]) for state in self.optimizer.state.values()), default=0)
        return self._meter.result(epoch, self.processes, skipped_steps=self.steps_done - applied)

    def _to_training(self) -> None:
        self._student.train()
        if self.settings.fixed_statistics:
            # Modules without children: norms and dropout. Blocks recompute their activations in training mode alone.
            for module in self._student.modules():
                if next(module.children(), None) is None:
                    module.eval()

    def _weight(self, loader: TrainingLoader, number: int, count: int) -> float:
        """Return what the mean over this batch counts in the mean over all images of the step.

        DDP takes the mean of the processes' gradients, whatever the number of their images.
        """
        if self.settings.accumulate == self.processes.world == 1:
            return 1.0
        first = number - number % self.settings.accumulate
        group = range(first, min(first + self.settings.accumulate, len(loader)))
        return count * self.processes.world / sum(loader.global_size(batch) for batch in group)

    def _learn(self, pixels: Tensor, labels: Tensor | None, number: int, weight: float, ends_step: bool) -> None:
        """Add the gradient of one batch; processes exchange theirs once a step."""
        pixels = pixels.to(self.device, self._dtype, non_blocking=True)
        labels = None if labels is None else labels.to(self.device, non_blocking=True)
        if self.settings.mixup is not None:
            if labels is None:
                raise InputError("mixup needs labels, got batches without; mix the images before, or leave it out")
            pixels, labels = self.settings.mixup(
                pixels, labels, epoch=self.epoch, batch=number, rank=self.processes.rank
            )
        if number % self.settings.accumulate == 0:
            self.optimizer.zero_grad(set_to_none=True)
        exchange: AbstractContextManager[None] = nullcontext()
        if self._ddp is not None and not ends_step:
            exchange = self._ddp.no_sync()
        with exchange, compile_errors() if self.settings.compile else nullcontext():
            logits, classes, loss = self._loss_with_stream(pixels, labels)
            weighted = loss if weight == 1 else loss * weight
            self._scaler.scale(weighted).backward()  # type: ignore[no-untyped-call]
        self._meter.add(loss, logits, classes)

    def _loss_with_stream(self, pixels: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        if self._stream is None:
            return self._loss(pixels, labels)
        with self._stream.watching():
            logits, classes, loss = self._loss(pixels, labels)
            return logits, classes, loss + self.settings.stream_weight * self._stream.loss()

    def _loss(self, pixels: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return logits, if any, the classes that count as right (without labels the teacher's), and the loss."""
        if self.settings.objective is not None:
            return None, pixels.new_zeros(len(pixels)).long(), self._distance(self.settings.objective, pixels)
        with self.precision.autocast():
            logits = logits_of(self._student(pixels))
            if self._teacher is not None:
                with torch.no_grad():
                    target = logits_of(self._teacher(pixels))
        logits = in_float32(logits)
        if self._teacher is None:
            if labels is None:
                raise InputError("training needs labels or a teacher, got batches with neither; give a teacher")
            return logits, labels, self.settings.loss.cross_entropy(logits, labels)
        loss = self.settings.loss(logits, in_float32(target), labels)
        return logits, target.argmax(1) if labels is None else labels, loss

    def _distance(self, objective: Objective, pixels: Tensor) -> Tensor:
        """Return the mean error of the objective: the student's against the teacher's."""
        assert self._teacher is not None
        with self.precision.autocast():
            values = objective.read(self._student(pixels))
            with torch.no_grad():
                target = objective.target(objective.read(self._teacher(pixels)))
        return objective.loss(values, target) / len(pixels)

    def _step(self) -> None:
        if self.settings.clip_grad is not None or self.settings.measure_gradients:
            self._scaler.unscale_(self.optimizer)
            parameters = [parameter for parameter in self.student.parameters() if parameter.grad is not None]
            norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
            if self.settings.measure_gradients:
                self._meter.add_norm(norm)
            if self.settings.clip_grad is not None:
                clip_grads_with_norm_(parameters, self.settings.clip_grad, norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        # The rate follows the steps that were asked for: how many were left out is known to the GPU alone.
        self.scheduler.step()
        self.steps_done += 1
        if self.average is not None:
            self.average.update_parameters(self.student)

    def _share_buffers(self) -> None:
        """Send the running statistics of the first process, whose model is saved, to all."""
        if self.processes.world == 1:
            return
        for model in dict.fromkeys((self.student, self.evaluated)):
            for buffer in model.buffers():
                if buffer.dtype != torch.bool:
                    dist.broadcast(buffer, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return what all processes share, for `torch.save`; tensors are the live ones, as everywhere in torch."""
        average = self.average
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": None
            if average is None
            else {"steps": int(average.n_averaged), "model": average.module.state_dict()},
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            "steps_done": self.steps_done,
        }

    def process_state(self) -> dict[str, Any]:
        """Return what this process has for itself: its random numbers, and its sums of the epoch."""
        return self._meter.state_dict() | {"random": random_state(self.device)}

    def load_state_dict(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Go on from where both states were taken, by a trainer with the same settings.

        Args:
            shared: From `state_dict`.
            own: From `process_state` of the process with this rank.
        """
        load_weights_(self.student, shared["student"])
        self.optimizer.load_state_dict(shared["optimizer"])
        self.scheduler.load_state_dict(shared["scheduler"])
        self._scaler.load_state_dict(shared["scaler"])
        if self.average is not None:
            self.average.module.load_state_dict(shared["average"]["model"])
            self.average.n_averaged.fill_(shared["average"]["steps"])
        self.epoch, self.batches_done, self.steps_done = (
            int(shared[name]) for name in ("epoch", "batches_done", "steps_done")
        )
        self._meter.load_state_dict(own)
        set_random_state_(own["random"], self.device)
