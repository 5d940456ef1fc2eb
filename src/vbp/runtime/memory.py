"""Say how much memory there is and was used; turn an out-of-memory failure into one error that says what helps."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

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


# What a control group (a container) may use at most, and what it uses.
_GROUP: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


def available_memory() -> int:
    """Return the bytes of main memory that programs here may still take; 0 where the system does not say."""
    free = 0
    with suppress(OSError, ValueError, LookupError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
        limit, used = (file.read_text().strip() for file in _GROUP)
        free = free if limit == "max" else min(free, int(limit) - int(used))
    return max(free, 0)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far: of the GPU, or of main memory for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def gib(size: int) -> str:
    """Return a size in bytes as text."""
    return f"{size / 2**30:.2f} GiB"
