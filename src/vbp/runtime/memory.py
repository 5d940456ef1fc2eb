"""Turn an out-of-memory failure into one error that says what helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vbp.errors import InputError, first_line

# How CPUs and the libraries of GPUs say that memory is at its end, in errors of no type of their own.
_SIGNS = ("can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED", "CUDA out of memory")

_REMEDIES = {
    "fine-tuning": (
        "lower --train_batch_size and raise --grad_accum by as much, add --grad_checkpointing or --amp bf16, or "
        "leave --use_kd out"
    ),
    "evaluation": "lower --val_batch_size, or add --amp bf16",
    "calibration": "lower --val_batch_size, or add --amp bf16",
}


@contextmanager
def out_of_memory(stage: str = "fine-tuning") -> Iterator[None]:
    """Turn an end of memory in a stage (fine-tuning, evaluation, calibration) into an error that says what helps."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        plain = not isinstance(error, torch.OutOfMemoryError | MemoryError)
        if plain and not any(sign in str(error) for sign in _SIGNS):
            raise
        raise InputError(
            f"{stage} needs more memory than there is{_figures()}: {first_line(error)}; {_REMEDIES[stage]}"
        ) from error


def _figures() -> str:
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    return f" ({gib(peak)} in use at most, {gib(free)} of {gib(total)} free)"


def gib(size: int) -> str:
    """Return a size in bytes as text."""
    return f"{size / 2**30:.2f} GiB"
