"""How a run was launched: alone, or as one of several processes."""

from __future__ import annotations

import os

from vbp.errors import InputError


def world_size() -> int:
    """Give the number of processes of this job, as torchrun says it.

    Raises:
        InputError: The environment variable WORLD_SIZE is no positive number.
    """
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"WORLD_SIZE must be a positive number, got {value!r}; unset it, or start with torchrun")
    return int(value)


def check_single_process() -> None:
    """Refuse a job of several processes.

    Raises:
        InputError: torchrun started more than one process.
    """
    if world_size() > 1:
        raise InputError(
            f"one process is supported so far, got WORLD_SIZE={world_size()}; start one process "
            "(torchrun --nproc_per_node=1, or plain python with --disable_ddp)"
        )


def check_launch(script: str, *, disable_ddp: bool) -> None:
    """Check that a script meant for torchrun was started by it, or was told not to need it.

    Raises:
        InputError: Neither is so, or there are several processes.
    """
    if not disable_ddp and "WORLD_SIZE" not in os.environ:
        raise InputError(
            f"{script} must be started by torchrun or with --disable_ddp, got neither; type\n"
            f"  python {script} --disable_ddp ...              one GPU if there is one, else the CPU\n"
            f"  torchrun --nproc_per_node=1 {script} ...       the same under torchrun"
        )
    check_single_process()
