"""Measure the layers around each site at several widths, inside the modules and on the inputs of the real model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from vbp.cost.timing import Timer, clock_of, hardware, precision_of, time_in_turns
from vbp.cost.widths import LayerTimes, TimedUnit, TimingConditions
from vbp.method.allocation import AllowedWidths
from vbp.pruning.plan import PruningPlan, SitePlan
from vbp.pruning.surgery import prune_
from vbp.runtime.fingerprints import json_fingerprint
from vbp.runtime.forward import copy_model, evaluation_mode, hooked
from vbp.runtime.precision import Precision
from vbp.sites.site import Site, blocks_of

_SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)

# Blocks of one shape that run one after the other in a pass: in the model, too, each finds the caches full of others.
_BLOCKS = 4

# A pass of this many seconds flushes the caches by itself.
_SLOW_S = 1.0


@dataclass(frozen=True)
class Call:
    """Arguments of a module's call."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Unit:
    """Sites that lose channels together: one of an MLP, or the values, queries and keys of an attention.

    `home` is the smallest module that is called and holds all their layers, `call` how the dense model calls it.
    """

    sites: tuple[Site, ...]
    home: str
    call: Call

    @property
    def name(self) -> str:
        """Return the name of the first site, whose width stands for all."""
        return self.sites[0].name


def find_units(
    model: nn.Module, sites: Sequence[Site], images: Tensor, precision: Precision
) -> tuple[list[list[Unit]], float]:
    """Return the units of a model, those that must take the same time together, and the seconds of a dense pass."""
    members = list(blocks_of(sites))
    paths = [_common_path(group) for group in members]
    called, seconds = _calls(model, {name for path in paths for name in _upwards(path)}, images, precision)
    alike: dict[str, list[Unit]] = {}
    for group, path in zip(members, paths, strict=True):
        home = next(name for name in _upwards(path) if name in called)
        unit = Unit(group, home, called[home])
        alike.setdefault(_shape_of(model, unit), []).append(unit)
    return list(alike.values()), seconds


def disjoint(units: Sequence[Unit], most: int) -> list[Unit]:
    """Return the first units of which none has its home within another's, so that each can be timed alone."""
    chosen = list(units[:1])
    for unit in units[1:]:
        if len(chosen) < most and not any(
            within(unit.home, other.home) or within(other.home, unit.home) for other in chosen
        ):
            chosen.append(unit)
    return chosen


def within(name: str, home: str) -> bool:
    """Return whether a dotted name lies in a module."""
    return not home or name == home or name.startswith(f"{home}.")


def run_pass(modules: Sequence[tuple[nn.Module, Call]], precision: Precision) -> Callable[[], object]:
    """Return a function that calls modules one after the other."""

    def forward() -> None:
        with precision.autocast():
            for module, call in modules:
                module(*call.args, **call.kwargs)

    return forward


def _common_path(group: Sequence[Site]) -> tuple[str, ...]:
    names = [name for site in group for name in (*site.layers, *site.inner, *site.parameters)]
    steps = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return tuple(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, steps))


def _upwards(path: tuple[str, ...]) -> list[str]:
    """Return the module at a path, and those around it up to the model: not all are called, as lists of modules."""
    return [".".join(path[:length]) for length in range(len(path), -1, -1)]


def _calls(model: nn.Module, names: set[str], images: Tensor, precision: Precision) -> tuple[dict[str, Call], float]:
    """Run the model, and record the arguments of the named modules."""
    calls: dict[str, Call] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[name] = Call(args, kwargs)

    forward = run_pass([(model, Call((images,), {}))], precision)
    forward()
    with hooked(before=[(model.get_submodule(name), partial(note, name)) for name in names]):
        start = time.perf_counter()
        forward()
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        return calls, time.perf_counter() - start


def _shape_of(model: nn.Module, unit: Unit) -> str:
    """Return a fingerprint of all that a unit's time depends on."""
    home = model.get_submodule(unit.home)
    inside = len(unit.home) + 1 if unit.home else 0
    values = [*unit.call.args, *unit.call.kwargs.values()]
    return json_fingerprint([
        [[site.kind, site.hidden, site.heads, [name[inside:] for name in site.producers]] for site in unit.sites],
        [[name, type(module).__name__] for name, module in home.named_modules()],
        [[name, list(value.shape)] for name, value in home.named_parameters()],
        [list(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values],
    ])  # fmt: skip


def timing_conditions(
    model: nn.Module, sites: Sequence[Site], images: Tensor, *, precision: Precision, round_to: int = 1
) -> TimingConditions:
    """Return the conditions under which times are measured here and now."""
    shapes = [[name, list(value.shape)] for name, value in model.named_parameters()]
    return TimingConditions(
        hardware=hardware(images.device),
        threads=torch.get_num_threads() if images.device.type == "cpu" else 0,
        precision=precision_of(model, precision),
        batch=tuple(images.shape),
        torch=str(torch.__version__),
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
    counts as a part of the dense one of the same round, so that other programs disturb it little. With `round_to` 1
    odd widths are timed, as most of a plan's are then no round numbers. Three rounds are timed even beyond
    `budget_s` seconds; tests pass another `timer`.
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
    read = {label: [turn.read(conditions.clock) for turn in timed] for label, timed in turns.items()}
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
    """Return the units' modules at each width, the dense one first."""
    yield units[0].sites[0].hidden, [(model.get_submodule(unit.home), unit.call) for unit in units]
    for kept, entries in _narrower(units, round_to).items():
        # What is not pruned is shared with the model, for several copies of a large one would fill the memory.
        shared: dict[int, Any] = {
            id(value): value
            for name, value in model.named_parameters()
            if not any(within(name, unit.home) for unit in units)
        }
        trial = copy_model(model, shared)
        prune_(trial, PruningPlan(tuple(entries), 1.0, "per_layer"))
        yield kept, [(trial.get_submodule(unit.home), unit.call) for unit in units]


def _narrower(units: Sequence[Unit], round_to: int) -> dict[int, list[SitePlan]]:
    """Return the plans of all sites of the units for each width below the dense one."""
    first = units[0].sites[0]
    size = first.hidden // first.heads
    widths = {}
    for share in _SHARES:
        count = min(AllowedWidths.of(size, round_to, 0.0).counts, key=lambda count: abs(count - size * share))
        if round_to == 1 and first.kind == "mlp" and count % 2 == 0:
            count -= 1
        if count < size:
            # Queries and keys may have heads of another size than values: they keep the same share.
            widths[count * first.heads] = [
                _first_channels(site, max(1, round(count / size * site.hidden / site.heads)))
                for unit in units
                for site in unit.sites
            ]
    return widths


def _first_channels(site: Site, count: int) -> SitePlan:
    size = site.hidden // site.heads
    return SitePlan(site, tuple(head * size + index for head in range(site.heads) for index in range(count)))


def _ascending(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Order by width, and smooth out what is slower though narrower: noise, which would mislead a search."""
    from sklearn.isotonic import isotonic_regression  # slow to import

    ordered = sorted(points)
    times = isotonic_regression([ms for _, ms in ordered])
    return tuple((width, float(ms)) for (width, _), ms in zip(ordered, times, strict=True))
