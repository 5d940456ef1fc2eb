"""Try on a copy of the model whether it still runs as it should with fewer channels in its sites.

Code may write a width down where no look at the layers shows it: in a reshape, in the sizes of a split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vbp.errors import first_line
from vbp.runtime.forward import ExampleInputs, copy_model, evaluation_mode, run_model
from vbp.sites.cutting import cut_sites_
from vbp.sites.layers import silence_columns_
from vbp.sites.propagation import tensors_in
from vbp.sites.site import Site

# Share of an output that rounding may change.
_ROUNDING = 2e-3

# What a model raises whose tensors do not fit together.
ERRORS = (RuntimeError, ValueError, IndexError, AssertionError, AttributeError, TypeError)


def working_sites(
    model: nn.Module, sites: Sequence[Site], example_inputs: ExampleInputs
) -> tuple[tuple[Site, ...], dict[str, str]]:
    """Return the sites with fewer channels in which the model runs, and by name why the others are none."""
    if not sites or (reason := why_broken(model, sites, example_inputs)) is None:
        return tuple(sites), {}
    if len(sites) == 1:
        return (), {sites[0].name: reason}
    working: list[Site] = []
    reasons: dict[str, str] = {}
    for part in (sites[: len(sites) // 2], sites[len(sites) // 2 :]):
        there, why = working_sites(model, part, example_inputs)
        working += there
        reasons |= why
    if why_broken(model, working, example_inputs) is None:
        return tuple(working), reasons
    # Some break only together: the first of them stay.
    kept: list[Site] = []
    for site in working:
        if (reason := why_broken(model, [*kept, site], example_inputs)) is None:
            kept.append(site)
        else:
            reasons[site.name] = reason
    return tuple(kept), reasons


def why_broken(model: nn.Module, sites: Sequence[Site], example_inputs: ExampleInputs) -> str | None:
    """Return what goes wrong where channels of all these sites are removed from a copy, if anything does.

    Neighbours lose different shares, for code may want two widths to be equal; values, queries and keys the same.
    """
    cuts = [
        (site, some_of_each_head(site, 2 if site.kind != "mlp" else 2 + place % 2))
        for place, site in enumerate(sites)
    ]
    trial = copy_model(model)
    try:
        cut_sites_(trial, cuts)
        with evaluation_mode(trial), torch.no_grad():
            pruned = run_model(trial, example_inputs)
    except ERRORS as error:
        return f"its code needs that width: {first_line(error)}"
    del trial  # large models are copied one at a time
    if not all(site.exact for site in sites) or any(one.is_meta for one in tensors_in(pruned)):
        return None
    outputs = (pruned, *_silenced(model, cuts, example_inputs))
    found, expected, dense = (tensors_in(one)[0].double() for one in outputs)
    difference, cut, size = (float(one.norm()) for one in (found - expected, expected - dense, expected))
    rounding = max(_ROUNDING, 10 * torch.finfo(tensors_in(pruned)[0].dtype).eps) * size
    if not difference > 0.05 * cut + rounding:
        return None
    return f"its code needs that width: the output is off by {difference / max(size, 1e-12):.2g} of its size"


def some_of_each_head(site: Site, step: int) -> list[int]:
    """Return the channels of each head without the first of every `step`: code that means the first ones shows."""
    size = site.hidden // site.heads
    kept = [index for index in range(size) if index % step] or [0]
    return [head * size + index for head in range(site.heads) for index in kept]


def _silenced(
    model: nn.Module, cuts: Sequence[tuple[Site, Sequence[int]]], example_inputs: ExampleInputs
) -> tuple[Any, Any]:
    """Return what the model returns if nothing reads the channels that go, and as it is."""
    silent = copy_model(model)
    with evaluation_mode(model), evaluation_mode(silent), torch.no_grad():
        for site, kept in cuts:
            removed = [channel for channel in range(site.hidden) if channel not in {*kept}]
            for reader in site.readers:
                silence_columns_(silent.get_submodule(reader.layer), [reader.first + channel for channel in removed])
            if not site.readers:
                for name, first in site.rows:
                    layer = silent.get_submodule(name)
                    for parameter in (layer.weight, layer.bias):
                        if isinstance(parameter, Tensor):
                            parameter[[first + channel for channel in removed]] = 0
        return run_model(silent, example_inputs), run_model(model, example_inputs)
