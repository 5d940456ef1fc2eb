"""The modules around sites that can be timed by themselves, on what the real model gives them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vbp.fingerprints import json_fingerprint
from vbp.precision import Precision
from vbp.sites import Site


@dataclass(frozen=True)
class Call:
    """What a module was given."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def shapes(self) -> list[Any]:
        """Give the shapes of its tensors, and the types of the rest."""
        values = [*self.args, *self.kwargs.values()]
        return [list(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values]


@dataclass(frozen=True)
class Unit:
    """Sites that lose channels together: one of an MLP, or the values, queries and keys of an attention.

    Attributes:
        home: The smallest module that is called and holds all their layers.
        call: What it is given.
    """

    sites: tuple[Site, ...]
    home: str
    call: Call

    @property
    def name(self) -> str:
        """Give the name of the first site, whose width stands for all."""
        return self.sites[0].name


def find_units(
    model: nn.Module, sites: Sequence[Site], images: Tensor, precision: Precision
) -> tuple[list[list[Unit]], float]:
    """Give the units of a model, those that must take the same time together, and the seconds of a dense pass."""
    members = list(_together(sites))
    paths = [_common_path(group) for group in members]
    called, seconds = _calls(model, {name for path in paths for name in _upwards(path)}, images, precision)
    alike: dict[str, list[Unit]] = {}
    for group, path in zip(members, paths, strict=True):
        home = next(name for name in _upwards(path) if name in called)
        unit = Unit(group, home, called[home])
        alike.setdefault(_shape_of(model, unit), []).append(unit)
    return list(alike.values()), seconds


def disjoint(units: Sequence[Unit], most: int) -> list[Unit]:
    """Give the first units of which none has its home within another's, so that each can be timed alone."""
    chosen = list(units[:1])
    for unit in units[1:]:
        if len(chosen) < most and not any(_overlap(unit.home, other.home) for other in chosen):
            chosen.append(unit)
    return chosen


def within(name: str, home: str) -> bool:
    """Say whether a dotted name lies in a module."""
    return not home or name == home or name.startswith(f"{home}.")


def run_pass(modules: Sequence[tuple[nn.Module, Call]], precision: Precision) -> Callable[[], object]:
    """Give what calls modules one after the other."""

    def forward() -> None:
        with precision.autocast():
            for module, call in modules:
                module(*call.args, **call.kwargs)

    return forward


def _together(sites: Sequence[Site]) -> Iterator[tuple[Site, ...]]:
    """Give each MLP site alone, and the value site of an attention with its queries and keys, which follow it."""
    for place, site in enumerate(sites):
        if site.kind == "query_key" and place and sites[place - 1].kind == "value":
            continue
        following = sites[place + 1 : place + 2]
        pair = site.kind == "value" and bool(following) and following[0].kind == "query_key"
        yield (site, following[0]) if pair else (site,)


def _common_path(group: Sequence[Site]) -> tuple[str, ...]:
    names = [
        name
        for site in group
        for name in (*site.producers, *([site.consumer] if site.consumer else []), *site.inner, *site.parameters)
    ]
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return tuple(common)


def _upwards(path: tuple[str, ...]) -> list[str]:
    """Give the module at a path, and those around it up to the model: not all are called, as lists of modules."""
    return [".".join(path[:length]) for length in range(len(path), -1, -1)]


def _overlap(one: str, other: str) -> bool:
    return within(one, other) or within(other, one)


def _calls(model: nn.Module, names: set[str], images: Tensor, precision: Precision) -> tuple[dict[str, Call], float]:
    """Run the model, and note what the named modules are given."""
    calls: dict[str, Call] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _module, args, kwargs: calls.update({name: Call(args, kwargs)})

    forward = run_pass([(model, Call((images,), {}))], precision)
    forward()
    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in names]
    start = time.perf_counter()
    try:
        forward()
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        return calls, time.perf_counter() - start
    finally:
        for hook in hooks:
            hook.remove()


def _shape_of(model: nn.Module, unit: Unit) -> str:
    """Give what decides about a unit's time."""
    home = model.get_submodule(unit.home)
    inside = len(unit.home) + 1 if unit.home else 0
    return json_fingerprint([
        [[site.kind, site.hidden, site.heads, [name[inside:] for name in site.producers]] for site in unit.sites],
        [[name, type(module).__name__] for name, module in home.named_modules()],
        [[name, list(value.shape)] for name, value in home.named_parameters()],
        unit.call.shapes,
    ])  # fmt: skip
