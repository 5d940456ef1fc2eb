"""Fit training into memory: gradient checkpointing, and a dry step before the work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.runtime.forward import evaluation_mode
from vbp.runtime.memory import gib, out_of_memory
from vbp.training.evaluate import evaluate
from vbp.training.trainer import Trainer

# timm's switch, and Hugging Face's under its newer and its older name.
_CHECKPOINTING: dict[str, dict[str, Any]] = {
    "set_grad_checkpointing": {"enable": True},
    "activation_checkpointing_enable": {"activation_checkpointing_kwargs": {"use_reentrant": False}},
    "gradient_checkpointing_enable": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


def enable_gradient_checkpointing_(model: nn.Module) -> None:
    """Keep fewer activations in training and compute them again for the gradients, which stay the same."""
    text = (
        f"grad_checkpointing needs a timm or Hugging Face model that offers it, got {type(model).__name__} without; "
        "leave --grad_checkpointing out and lower --train_batch_size"
    )
    switch = next((name for name in _CHECKPOINTING if hasattr(model, name)), None)
    if switch is None:
        raise InputError(text)
    try:
        getattr(model, switch)(**_CHECKPOINTING[switch])
    except (AssertionError, ValueError, NotImplementedError) as error:
        raise InputError(f"{text} ({error})") from error


@dataclass(frozen=True)
class MemoryUse:
    """The most that a dry step took of a GPU; nothing is known of a CPU."""

    peak: int | None = None
    total: int | None = None

    def __str__(self) -> str:
        """Return one line for the log."""
        if self.peak is None or self.total is None:
            return "a step and an evaluation batch fit into memory"
        return f"a step and an evaluation batch take {gib(self.peak)} of {gib(self.total)}"


def dry_step(trainer: Trainer, image: tuple[int, ...], *, batch_size: int, val_batch_size: int) -> MemoryUse:
    """Find out before the work whether it fits: one step of training and one batch of evaluation, on blank images.

    Everything takes part: teacher, precision, compiler, moments of the optimizer, gradients that wait for a second
    batch. Afterwards trainer, models and random numbers are as they were. All processes call it.
    """
    cuda = trainer.device.type == "cuda"
    shared, own = (_copied(state) for state in (trainer.state_dict(), trainer.process_state()))
    if cuda:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    try:
        # Training chooses its own mode; this one puts each module's back.
        with evaluation_mode(trainer.student), out_of_memory("fine-tuning"):
            trainer.train_epoch(_Blank(trainer, image, batch_size), epoch=1)
        with out_of_memory("evaluation"):
            blank = torch.zeros(val_batch_size, *image), torch.zeros(val_batch_size, dtype=torch.int64)
            if trainer.settings.objective is None:
                evaluate(trainer.predictor, [blank], trainer.device, precision=trainer.precision)
            else:
                with evaluation_mode(trainer.predictor), torch.no_grad(), trainer.precision.autocast():
                    trainer.predictor(blank[0].to(trainer.device))
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.load_state_dict(shared, own)
    if not cuda:
        return MemoryUse()
    return MemoryUse(torch.cuda.max_memory_allocated(trainer.device), torch.cuda.mem_get_info(trainer.device)[1])


class _Blank:
    """A loader of blank images: as many batches as make one step, two at most."""

    def __init__(self, trainer: Trainer, image: tuple[int, ...], batch_size: int) -> None:
        self.batch = torch.zeros(batch_size, *image), torch.zeros(batch_size, dtype=torch.int64)
        self.batches = min(2, trainer.settings.accumulate)
        self.world = trainer.processes.world

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        pass

    def global_size(self, batch: int) -> int:
        return len(self.batch[1]) * self.world

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * self.batches)


def _copied(state: Any) -> Any:
    """Copy a state to the CPU, so that it takes no memory of the device."""
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, Mapping):
        return {name: _copied(value) for name, value in state.items()}
    return type(state)(_copied(value) for value in state) if isinstance(state, list | tuple) else state
