"""Measure the layers around each site at several widths, inside the modules and on the inputs of the real model."""

from __future__ import annotations

import copy
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vbp.allocation import Bounds
from vbp.fingerprints import json_fingerprint
from vbp.layer_times import LayerTimes, TimedUnit, TimingConditions
from vbp.modes import evaluation_mode
from vbp.plan import PruningPlan, SitePlan
from vbp.precision import Precision
from vbp.sites import Site
from vbp.surgery import prune_
from vbp.timed_units import Call, Unit, disjoint, find_units, run_pass, within
from vbp.timing import Turn, time_in_turns

Timer = Callable[..., dict[str, list[Turn]]]

_SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
# Blocks of one shape that run one after the other in a pass: in the model, too, each finds the caches full of others.
_BLOCKS = 4
# A pass of this many seconds flushes the caches by itself.
_SLOW_S = 1.0


def clock_of(device: torch.device) -> Literal["wall", "processor"]:
    """Give the clock that is read on a device: processor time where one thread of a CPU does the work.

    On an idle machine the two agree then; on a busy one the wall clock counts other programs, too.
    """
    return "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def read_ms(turn: Turn, clock: str) -> float:
    """Give the milliseconds of a pass by a clock of `clock_of`."""
    return turn.cpu_ms if clock == "processor" else turn.ms


def timing_conditions(
    model: nn.Module, sites: Sequence[Site], images: Tensor, *, precision: Precision, round_to: int = 1
) -> TimingConditions:
    """Give the conditions under which times are measured here and now.

    Args:
        model: Dense, on the device of the images.
        sites: From `find_sites`.
        images: The batch.
        precision: Of the forward pass.
        round_to: Of the plans.
    """
    shapes = [[name, list(value.shape)] for name, value in model.named_parameters()]
    weights = str(next(model.parameters()).dtype).removeprefix("torch.")
    return TimingConditions(
        hardware=_hardware(images.device),
        threads=torch.get_num_threads() if images.device.type == "cpu" else 0,
        precision=weights if precision.dtype is None else f"{weights}, autocast {precision.name}",
        batch=tuple(images.shape),
        torch=torch.__version__,
        model=json_fingerprint([type(model).__name__, shapes, [[site.name, site.hidden] for site in sites]]),
        round_to=round_to,
        clock=clock_of(images.device),
    )


def measure_layer_times(
    model: nn.Module,
    sites: Sequence[Site],
    images: Tensor,
    *,
    precision: Precision,
    round_to: int = 1,
    rounds: int = 9,
    budget_s: float = 30,
    timer: Timer = time_in_turns,
) -> LayerTimes:
    """Time the dense model, and the modules around its sites at eight widths each, all taking turns.

    Sites of one shape are timed once, each in the module and on the input that it has in the dense model. A time
    counts as a part of the dense one of the same round, so that other programs spoil little of it.

    Args:
        model: Dense, on the device of the images.
        sites: From `find_sites`.
        images: The batch.
        precision: Of the forward pass.
        round_to: Of the plans; with 1 odd widths are timed, as most of a plan's are then no round numbers.
        rounds: Timed turns of each.
        budget_s: Seconds after which no further round begins; three are timed in any case.
        timer: Takes turns; for tests.
    """
    conditions = timing_conditions(model, sites, images, precision=precision, round_to=round_to)
    passes: dict[str, Callable[[], object]] = {}
    taken: dict[str, list[tuple[str, int, int]]] = {}
    with evaluation_mode(model), torch.inference_mode():
        groups, seconds = find_units(model, sites, images, precision)
        passes["dense"] = run_pass([(model, Call((images,), {}))], precision)
        for group in groups:
            chosen = disjoint(group, 1 if seconds > _SLOW_S else _BLOCKS)
            for width, modules in _trials(model, chosen, round_to):
                label = f"{group[0].name} at {width}"
                taken.setdefault(group[0].name, []).append((label, width, len(chosen)))
                passes[label] = run_pass(modules, precision)
        turns = timer(passes, images.device, rounds=rounds, warmup=1 if seconds > _SLOW_S else 2, budget_s=budget_s)
    read = {label: [read_ms(turn, conditions.clock) for turn in timed] for label, timed in turns.items()}
    dense = read["dense"]
    parts = {
        label: statistics.median(ms / whole for ms, whole in zip(timed, dense, strict=True))
        for label, timed in read.items()
    }
    dense_ms = statistics.median(dense)
    return LayerTimes(
        conditions,
        dense_ms,
        tuple(
            TimedUnit(tuple(site.name for site in unit.sites), group[0].name) for group in groups for unit in group
        ),
        {
            name: _ascending([(width, parts[label] * dense_ms / blocks) for label, width, blocks in labels])
            for name, labels in taken.items()
        },
    )


def _trials(
    model: nn.Module, units: Sequence[Unit], round_to: int
) -> Iterator[tuple[int, list[tuple[nn.Module, Call]]]]:
    """Give the units' modules at each width, the dense one first."""
    yield units[0].sites[0].hidden, [(model.get_submodule(unit.home), unit.call) for unit in units]
    for kept, entries in _narrower(units, round_to).items():
        # What is not pruned is shared with the model, for several copies of a large one would fill the memory.
        shared: dict[int, object] = {
            id(value): value
            for name, value in model.named_parameters()
            if not any(within(name, unit.home) for unit in units)
        }
        trial = copy.deepcopy(model, shared)
        prune_(trial, PruningPlan(tuple(entries), 1.0, "per_layer"))
        yield kept, [(trial.get_submodule(unit.home), unit.call) for unit in units]


def _narrower(units: Sequence[Unit], round_to: int) -> dict[int, list[SitePlan]]:
    """Give what is cut for each width of a site below the dense one."""
    first = units[0].sites[0]
    size = first.hidden // first.heads
    widths = {}
    for share in _SHARES:
        count = min(Bounds.of(size, round_to, 0.0).counts, key=lambda count: abs(count - size * share))
        if round_to == 1 and first.kind == "mlp" and count % 2 == 0:
            count -= 1
        if count < size:
            widths[count * first.heads] = [_first_channels(site, count) for unit in units for site in unit.sites]
    return widths


def _first_channels(site: Site, count: int) -> SitePlan:
    size = site.hidden // site.heads
    return SitePlan(site, tuple(head * size + index for head in range(site.heads) for index in range(count)))


def _ascending(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Order by width, and smooth out what is slower though narrower: noise, which would lead a search astray."""
    from sklearn.isotonic import isotonic_regression  # slow to import

    ordered = sorted(points)
    times = isotonic_regression([ms for _, ms in ordered])
    return tuple((width, float(ms)) for (width, _), ms in zip(ordered, times, strict=True))


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        if match := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            name = match[1].strip()
    return f"{name} ({os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()})"
