"""Fine-tune a pruned model: one epoch at a time, cosine over all steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from vbp.distillation import DistillationLoss
from vbp.errors import InputError
from vbp.evaluation import logits_of


class Batches(Sized, Protocol):
    """A training loader: batches of images and labels in an order that depends on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of an epoch."""

    def __iter__(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Give the batches of the epoch."""


@dataclass(frozen=True)
class EpochResult:
    """What one epoch of training did."""

    epoch: int
    loss: float
    top1: float
    learning_rate: float
    images: int
    seconds: float


@dataclass(frozen=True)
class Trainer:
    """A student, its optimizer and schedule; the teacher, if there is one, teaches on the same batches.

    Attributes:
        loss: With a teacher; without one the loss is the cross-entropy alone.
    """

    student: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    device: torch.device
    teacher: nn.Module | None = None
    loss: DistillationLoss = field(default_factory=DistillationLoss)

    @staticmethod
    def of(
        student: nn.Module,
        *,
        steps: int,
        learning_rate: float,
        device: torch.device,
        teacher: nn.Module | None = None,
        loss: DistillationLoss | None = None,
        weight_decay: float = 0.01,
    ) -> Trainer:
        """Set up AdamW and a cosine over all `steps` down to 0.

        Source: VBP paper, section 4.1.
        """
        optimizer = AdamW(student.parameters(), lr=learning_rate, weight_decay=weight_decay)
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        scheduler = CosineAnnealingLR(optimizer, T_max=max(1, steps))
        return Trainer(student, optimizer, scheduler, device, teacher, loss or DistillationLoss())

    def train_epoch(
        self,
        loader: Batches,
        epoch: int,
        progress: Callable[[Batches], Iterable[tuple[Tensor, Tensor]]] = iter,  # type: ignore[assignment]
    ) -> EpochResult:
        """Train on every batch once.

        Args:
            loader: The training images.
            epoch: Counted from 1.
            progress: Wraps the loader, to draw a bar.

        Raises:
            InputError: The loss is no longer a finite number.
        """
        start = time.perf_counter()
        self.student.train()
        loader.set_epoch(epoch)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        # Sums stay on the device: reading them in the loop would make a GPU wait for every step.
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        images = 0
        for pixels, labels in progress(loader):
            sums += self._step(pixels.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))
            images += labels.shape[0]
        if images == 0:
            raise InputError("fine-tuning needs at least one image, got none; check the training images")
        loss, correct = sums.tolist()
        if not math.isfinite(loss):
            raise InputError(
                f"fine-tuning diverged: the loss of epoch {epoch} is {loss} at a learning rate of "
                f"{learning_rate:.3g}; lower --lr_ft; the checkpoints written so far are whole"
            )
        seconds = time.perf_counter() - start
        return EpochResult(epoch, loss / images, 100 * correct / images, learning_rate, images, seconds)

    def _step(self, pixels: Tensor, labels: Tensor) -> Tensor:
        logits = logits_of(self.student(pixels))
        if self.teacher is None:
            loss = F.cross_entropy(logits, labels)
        else:
            with torch.no_grad():
                target = logits_of(self.teacher(pixels))
            loss = self.loss(logits, target, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.scheduler.step()
        correct = (logits.detach().argmax(1) == labels).sum()
        return torch.stack((loss.detach().double() * labels.shape[0], correct.double()))
