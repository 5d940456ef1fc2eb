"""Time forward passes that take turns, so that other work of the machine disturbs all of them equally."""

from __future__ import annotations

import logging
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vbp.cost.macs import count_macs
from vbp.runtime.forward import evaluation_mode
from vbp.runtime.log_file import told_if_slow
from vbp.runtime.precision import Precision

_log = logging.getLogger(__name__)

# Seconds of a turn, which holds several passes of a fast model: shorter turns suffer from the scheduler and from cold
# caches.
TURN_S = 0.1

# Multiply-accumulates that a CPU computes in about a second.
CPU_BATCH_MACS = 20_000_000_000
Clock = Literal["wall", "processor"]


@dataclass(frozen=True)
class Turn:
    """Mean milliseconds of a pass over one turn of one model.

    `ms` is by the wall clock, or by CUDA events on a GPU; `cpu_ms` is processor time of all threads, which does not
    grow when the machine lets other programs run.
    """

    ms: float
    cpu_ms: float

    def read(self, clock: Clock) -> float:
        """Return the milliseconds of a pass by a clock."""
        return self.cpu_ms if clock == "processor" else self.ms


Timer = Callable[..., dict[str, list[Turn]]]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Return the spread of one value or more."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


def time_in_turns(
    passes: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 3,
    budget_s: float = math.inf,
) -> dict[str, list[Turn]]:
    """Return one turn a round of each forward pass by its name, in an order that is reversed from round to round.

    Each has `warmup` passes before, of which the last one says how many passes a turn takes. After `budget_s` seconds
    no further round begins; three are timed in any case.
    """
    begin = time.perf_counter()
    counts = {name: _warm_up(forward, device, warmup) for name, forward in passes.items()}
    turns: dict[str, list[Turn]] = {name: [] for name in passes}
    names = list(passes)
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - begin > budget_s:
            break
        for name in names if number % 2 == 0 else reversed(names):
            if counts[name] > 1:
                passes[name]()  # the turn before has left the caches full of another model
            turns[name].append(_turn(passes[name], counts[name], device))
    return turns


@dataclass(frozen=True)
class LatencyComparison:
    """A dense and a pruned model, timed in turns: what was measured, and under which conditions.

    The speed-up is dense over pruned, round by round: two separate medians would compare different minutes of the
    machine. The report of a run, of a sweep and of `vbp latency` hold this, and nothing else about time.

    Attributes:
        dense_ms: Milliseconds of a batch.
        pruned_ms: Likewise.
        speedup: Dense time over pruned time.
        batch: Images in a batch.
        device: Kind of device.
        precision: Type of the weights, and of autocast if there is any.
        clock: What the times were read from.
        rounds: Turns of each model.
        seconds: What the comparison took.
        load: Programs that wanted the processor, mean of the last minute; None where the system does not say.
        cpu_speedup: By processor time, steadier on a machine with other work; None on a GPU.
    """

    dense_ms: Spread
    pruned_ms: Spread
    speedup: Spread
    batch: int
    device: str
    precision: str
    clock: Clock
    rounds: int
    seconds: float
    load: float | None
    cpu_speedup: Spread | None = None

    @property
    def latency_text(self) -> str:
        """Return both medians as tables show them: 12.00 -> 9.60 ms."""
        return f"{self.dense_ms.median:.2f} -> {self.pruned_ms.median:.2f} ms"

    @property
    def speedup_text(self) -> str:
        """Return the speed-up as tables show it, median and quartiles: 1.25x (1.21 to 1.29)."""
        return f"{self.speedup.median:.2f}x ({self.speedup.low:.2f} to {self.speedup.high:.2f})"

    @property
    def conditions(self) -> str:
        """Return in words under which conditions it holds: batch 32 on cpu in float32."""
        clock = ", processor time" if self.clock == "processor" else ""
        return f"batch {self.batch} on {self.device} in {self.precision}{clock}"


def compare_passes(
    dense: Callable[[], object],
    pruned: Callable[[], object],
    device: torch.device,
    *,
    batch: int,
    precision: str,
    clock: Clock = "wall",
    rounds: int = 15,
    warmup: int = 2,
    budget_s: float = 20,
    timer: Timer = time_in_turns,
) -> LatencyComparison:
    """Time a forward pass of a dense model against one of its pruned model; tests pass another `timer`.

    `batch` and `precision` say what the passes compute, for the result.
    """
    begin = time.perf_counter()
    with told_if_slow(_log, "timing the dense and the pruned model in turns, batch %d", batch):
        turns = timer({"dense": dense, "pruned": pruned}, device, rounds=rounds, warmup=warmup, budget_s=budget_s)
    pairs = list(zip(turns["dense"], turns["pruned"], strict=True))

    def speedup(clock: Clock) -> Spread:
        return Spread.of([one.read(clock) / other.read(clock) for one, other in pairs])

    return LatencyComparison(
        Spread.of([one.read(clock) for one, _ in pairs]),
        Spread.of([other.read(clock) for _, other in pairs]),
        speedup(clock),
        batch,
        device.type,
        precision,
        clock,
        len(pairs),
        time.perf_counter() - begin,
        system_load(),
        speedup("processor") if device.type == "cpu" else None,
    )


def compare_models(
    dense: nn.Module,
    pruned: nn.Module,
    images: Tensor,
    *,
    precision: Precision,
    clock: Clock | None = None,
    rounds: int = 15,
    budget_s: float = 20,
) -> LatencyComparison:
    """Time a dense model against its pruned one by `compare_passes`, in evaluation mode on the images' device.

    Without a `clock` it is that of `clock_of`.
    """

    def forward(model: nn.Module) -> None:
        with precision.autocast():
            model(images)

    with evaluation_mode(dense), evaluation_mode(pruned), torch.inference_mode():
        passes = partial(forward, dense), partial(forward, pruned)
        return compare_passes(
            *passes, images.device, batch=len(images), precision=precision_of(dense, precision),
            clock=clock or clock_of(images.device), rounds=rounds, budget_s=budget_s,
        )  # fmt: skip


def latency_batch(dense: nn.Module, example: Tensor, *, at_most: int, size: int | None = None) -> int:
    """Return how many images to time in a batch, on a CPU as many as take about a second.

    A run asks once, with its dense model: a pruned one has fewer MACs and would get a larger batch, whose times
    cannot be compared with those that met the budget. On a GPU it is `at_most`; a `size` of the user is returned.
    """
    if size is not None:
        return size
    if example.device.type != "cpu":
        return at_most
    return min(at_most, 32, max(1, CPU_BATCH_MACS // count_macs(dense, example)))


def clock_of(device: torch.device) -> Clock:
    """Return the clock that is read on a device: processor time where one thread of a CPU does the work.

    On an idle machine the two agree then; on a busy one the wall clock counts other programs, too.
    """
    return "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def precision_of(model: nn.Module, precision: Precision) -> str:
    """Return in which precision a model computes: the type of its weights, and that of autocast if there is any."""
    weights = str(next((weight.dtype for weight in model.parameters()), torch.float32)).removeprefix("torch.")
    return weights if precision.dtype is None else f"{weights}, autocast {precision.name}"


def hardware(device: torch.device) -> str:
    """Return the name of a device, and of a CPU the number of its cores and its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        if match := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            name = match[1].strip()
    return f"{name} ({os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()})"


def system_load() -> float | None:
    """Return how many programs wanted the processor, mean of the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _warm_up(forward: Callable[[], object], device: torch.device, warmup: int) -> int:
    """Return the number of passes in a turn."""
    seconds = 0.0
    for _ in range(max(1, warmup)):
        seconds = _turn(forward, 1, device).ms / 1e3
    return max(1, min(1000, round(TURN_S / max(seconds, 1e-9))))


def _turn(forward: Callable[[], object], count: int, device: torch.device) -> Turn:
    if device.type == "cuda":
        return _cuda_turn(forward, count, device)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        forward()
    return Turn((time.perf_counter() - start) * 1e3 / count, (time.process_time() - cpu) * 1e3 / count)


def _cuda_turn(forward: Callable[[], object], count: int, device: torch.device) -> Turn:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        cpu = time.process_time()
        start.record()
        for _ in range(count):
            forward()
        end.record()
        end.synchronize()
    return Turn(start.elapsed_time(end) / count, (time.process_time() - cpu) * 1e3 / count)
