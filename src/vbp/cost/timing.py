"""Time forward passes that take turns, so that whatever else the machine does meets all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# A turn of a fast model holds several passes: shorter turns are at the mercy of the scheduler and of cold caches.
_TURN_S = 0.1


@dataclass(frozen=True)
class Turn:
    """One turn of one model.

    Attributes:
        ms: Milliseconds of a pass, mean over the turn: by the wall clock, or by CUDA events on a GPU.
        cpu_ms: Milliseconds of processor time of a pass, all threads added; unlike `ms` it does not grow when the
            machine lets other programs run.
    """

    ms: float
    cpu_ms: float


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
    """Time each forward pass once a round, in an order that is reversed from round to round.

    Args:
        passes: Name -> one forward pass.
        device: Where they run.
        rounds: Timed turns of each.
        warmup: Passes of each before them; the last one says how many passes a turn takes.
        budget_s: Seconds after which no further round begins; three are timed in any case.

    Returns:
        Name -> one turn a round.
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


def measure_latency_ms(
    models: Mapping[str, nn.Module], example: Tensor, *, rounds: int = 15, warmup: int = 2, budget_s: float = 20
) -> dict[str, float]:
    """Time a forward pass of each model, taking turns.

    Args:
        models: In evaluation mode, on the device of `example`.
        example: The batch.
        rounds: Timed turns of each model.
        warmup: Passes of each model before them.
        budget_s: Seconds after which no further round begins; three are timed in any case.

    Returns:
        Model name -> median milliseconds for the whole batch.
    """
    passes = {name: _pass_of(model, example) for name, model in models.items()}
    with torch.inference_mode():
        turns = time_in_turns(passes, example.device, rounds=rounds, warmup=warmup, budget_s=budget_s)
    return {name: statistics.median(turn.ms for turn in timed) for name, timed in turns.items()}


def _pass_of(model: nn.Module, example: Tensor) -> Callable[[], Any]:
    return lambda: model(example)


def _warm_up(forward: Callable[[], object], device: torch.device, warmup: int) -> int:
    """Return the number of passes in a turn."""
    seconds = 0.0
    for _ in range(max(1, warmup)):
        seconds = _turn(forward, 1, device).ms / 1e3
    return max(1, min(1000, round(_TURN_S / max(seconds, 1e-9))))


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
