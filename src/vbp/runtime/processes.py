"""Launch the processes of a job, exchange data between them, and end all when one fails."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from vbp.errors import InputError, Interrupted, PeerError, first_line

_T = TypeVar("_T")

# Signs in the message of a collective whose other end went away.
_LOST_PEER = ("gloo", "nccl", "connection", "peer", "store", "timed out", "timeout")


# The processes of a job are told to stop at about the same time.
_MAIN_REPORTS_WITHIN = timedelta(seconds=3)


@dataclass(frozen=True)
class Processes:
    """The processes of this job, seen from one of them. The default is a job of one.

    `local_rank` and `local_world` count those of this node. `control` is a group for small messages on the CPU,
    whatever device the tensors of the job are on; into `store` a process that fails writes its error for the others.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    control: dist.ProcessGroup | None = None
    store: Store | None = None

    @property
    def is_main(self) -> bool:
        """Return whether this is the process that writes."""
        return self.rank == 0

    def all_gather(self, value: _T) -> list[_T]:
        """Return everyone's value to everyone, in the order of ranks; plain data or tensors on the CPU."""
        if self.world == 1:
            return [value]
        values: list[_T | None] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values  # type: ignore[return-value]

    def from_main(self, compute: Callable[[], _T]) -> _T:
        """Return to all processes what the main one computes."""
        return self.all_gather(compute() if self.is_main else None)[0]  # type: ignore[return-value]

    def all_reduce_sum_(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place, on the device where it lies."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of everyone's small whole numbers; cheap enough for every step."""
        if self.world == 1:
            return value
        largest = torch.tensor([value])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.world > 1:
            dist.barrier(group=self.control)

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Let one process of each node do the block first: the others find the files in place and in memory."""
        if self.local_rank != 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()
        self.barrier()

    def check_same(self, what: str, value: str) -> None:
        """Stop all processes if they do not hold the same value."""
        values = self.all_gather(value)
        if len(set(values)) > 1:
            listed = ", ".join(f"{rank}: {value[:12]}" for rank, value in enumerate(values))
            raise InputError(
                f"all processes must hold the same {what}, got {listed}; see that all nodes run the same versions "
                "on the same files and the same kind of device"
            )


def launched() -> Processes:
    """Read from the environment how torchrun started this process; without it, it is alone."""
    if "WORLD_SIZE" not in os.environ:
        return Processes()
    numbers = []
    rank = "0" if os.environ["WORLD_SIZE"] == "1" else None
    for name, default in (("RANK", rank), ("WORLD_SIZE", None), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        value = os.environ.get(name, default)
        if value is None or not value.isdecimal():
            raise InputError(
                f"{name} must be a whole number, got {value!r}; start with torchrun, or unset WORLD_SIZE"
            )
        numbers.append(int(value))
    processes = Processes(numbers[0], numbers[1], numbers[2], numbers[3])
    if not processes.rank < processes.world:
        raise InputError(
            f"RANK must be below WORLD_SIZE, got {processes.rank} and {processes.world}; start with torchrun"
        )
    return processes


def command_line() -> str:
    """Return the command that started this process as one would type it; empty in a notebook."""
    if "ipykernel" in sys.modules:
        return ""
    interpreter, *words = sys.orig_argv
    program = words[0] if words else interpreter
    # What pip puts into bin/ is typed by its name.
    installed = Path(program).parent == Path(interpreter).parent and not program.startswith("-")
    return shlex.join([Path(program).name, *words[1:]] if installed else [Path(interpreter).name, *words])


def restarts() -> int:
    """Return how often torchrun has started this job again after a failure (`--max-restarts`)."""
    value = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(value) if value.isdecimal() else 0


def check_launch(script: str, *, disable_ddp: bool) -> None:
    """Check that a script meant for torchrun was either started by it, or was told not to need it."""
    if not disable_ddp and "WORLD_SIZE" not in os.environ:
        raise InputError(
            f"{script} must be started by torchrun or with --disable_ddp, got neither; type "
            f"`python {script} --disable_ddp ...` for one GPU if there is one, else the CPU, or "
            f"`torchrun --nproc_per_node=4 {script} ...` for one process on each of four GPUs"
        )
    world = launched().world
    if disable_ddp and world > 1:
        raise InputError(
            f"disable_ddp means one plain process, got it under torchrun with {world} processes; leave --disable_ddp "
            "out, or start with python"
        )


def device_of(name: str, processes: Processes) -> torch.device:
    """Choose the device of this process; each process of a node takes the GPU of its place.

    The name is `auto` (a GPU if there is one, else the CPU), `cpu`, `cuda`, or `cuda:N` in a job of one process.
    """
    wanted = name
    if name == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if processes.world > 1 and wanted.startswith("cuda"):
        if wanted != "cuda":
            raise InputError(
                f"device must be auto, cpu or cuda under torchrun with {processes.world} processes, got {name!r}; "
                "each process takes the GPU of its place (choose GPUs by CUDA_VISIBLE_DEVICES)"
            )
        count = torch.cuda.device_count()
        if processes.local_world > count:
            raise InputError(
                f"each process needs a GPU of its own, got {processes.local_world} processes for {count} GPUs; start "
                f"with torchrun --nproc_per_node={max(1, count)}, or give --device cpu"
            )
        wanted = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device must be auto, cpu, cuda or cuda:N and present, got {name!r} ({error})") from error
    if device.type == "cuda":
        # With its number: torch.cuda takes no device without one, and tensors' devices have one.
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: str, timeout_minutes: float) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes of this job; NCCL on GPUs, gloo on CPUs.

    An error of one process ends all: it writes the error into the store, and the others read it there when they are
    told to stop, lose the connection, or have waited for the time-out.

    Raises:
        PeerError: Another process failed.
    """
    launch = launched()
    place = device_of(device, launch)
    if launch.world == 1:
        yield launch, place
        return
    timeout = timedelta(minutes=timeout_minutes)
    common, rank, world = next(rendezvous("env://", timeout=timeout))
    # The launcher's store outlives an attempt: what the last one left must not be taken for this one's.
    store = PrefixStore(f"vbp/attempt{restarts()}", common)
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        store=PrefixStore("group", store), rank=rank, world_size=world, timeout=timeout,
        device_id=place if place.type == "cuda" else None,
    )  # fmt: skip
    control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
    processes = Processes(rank, world, launch.local_rank, launch.local_world, control, PrefixStore("failures", store))

    def end(number: int, frame: FrameType | None) -> None:
        if failure := _first_failure(processes, ""):
            raise _peer_error(processes, failure)
        if _main_is_told(processes):
            raise Interrupted(number)
        raise _peer_error(processes, "the job was told to stop, and process 0, which reports it, is gone or busy")

    # torchrun sends SIGTERM to the others when one process has failed.
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield processes, place
    except BaseException as error:
        # This process is about to end, and has yet to say why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # The group is left as it is: closing it could wait for processes that are gone.
        raise _root_cause(processes, error) from error
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


def _root_cause(processes: Processes, error: BaseException) -> BaseException:
    """Return the error of the process that failed first; if it is this one, the others can read it from now on."""
    if isinstance(error, KeyboardInterrupt | PeerError):
        return error  # all processes were told to stop, or the first error is known
    text = first_line(error)
    if isinstance(error, RuntimeError) and any(sign in text.lower() for sign in _LOST_PEER):
        unknown = f"another process ended without an error message, seen by process {processes.rank}: {text}"
        return _peer_error(processes, _first_failure(processes, "") or unknown)
    mine = f"process {processes.rank} of {processes.world} failed: {text}"
    first = _first_failure(processes, mine)
    return error if first == mine else _peer_error(processes, first)


def _peer_error(processes: Processes, text: str) -> PeerError:
    """Return the error of another process; the first process of a node that knows of it shows it."""
    assert processes.store is not None
    rank = str(processes.rank)
    try:
        first = processes.store.compare_set(f"shown by {os.environ.get('GROUP_RANK', '0')}", "", rank).decode()
    except RuntimeError:  # the process that held the store is gone
        first = rank
    return PeerError(text, shown=first == rank)


def _main_is_told(processes: Processes) -> bool:
    """Return whether the main process was told to stop, and so will report it; called where this one was."""
    assert processes.store is not None
    try:
        if processes.is_main:
            processes.store.set("told", "1")
        processes.store.wait(["told"], _MAIN_REPORTS_WITHIN)
    except RuntimeError:
        return False
    return True


def _first_failure(processes: Processes, mine: str) -> str:
    """Return what the process that failed first has written; `mine`, which is written then, if none has."""
    assert processes.store is not None
    try:
        return str(processes.store.compare_set("failure", "", mine).decode())
    except RuntimeError:
        return mine  # the process that held the store is gone
