"""Put the errors of a pruned model's parts into the dense model, each with an amplitude of its own.

The error of an MLP is that of its consumer, where it reads the channels of the dense model that stay. The error of an
attention is that of the smallest module around all of its layers, for its channels have another basis after surgery;
so is that of a branch that is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vbp.pruning.plan import PruningPlan, SitePlan
from vbp.runtime.forward import Hook, hooked
from vbp.sites.branches import home_of
from vbp.sites.layers import channel_dim, output_channels
from vbp.sites.site import blocks_of

Unit = tuple[SitePlan, ...]


def erring_units(plan: PruningPlan) -> list[Unit]:
    """Return the MLP sites of a plan, and, values with queries and keys, each attention that loses something."""
    entries = {entry.site: entry for entry in plan.sites}
    units = [tuple(entries[site] for site in unit) for unit in blocks_of([entry.site for entry in plan.sites])]
    return [unit for unit in units if unit[0].site.kind == "mlp" or any(entry.removed for entry in unit)]


@contextmanager
def errors_added(
    dense: nn.Module, pruned: nn.Module, plan: PruningPlan, amplitudes: Float[Tensor, "units"]
) -> Iterator[None]:
    """Add to the dense model the errors of the pruned model's `erring_units`, times the amplitudes."""
    units = erring_units(plan)
    gone = {(name, rows[row]) for entry in plan.sites for name, rows in entry.site.places for row in entry.removed}
    after: list[tuple[nn.Module, Hook]] = []
    before: list[tuple[nn.Module, Hook]] = []
    for unit, amplitude in zip(units, amplitudes, strict=True):
        if unit[0].site.kind != "mlp" or not unit[0].keep:
            home = home_of(dense, [entry.site for entry in unit])
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            before.append((dense.get_submodule(home), partial(_note, calls)))
            small = pruned.get_submodule(home)
            after.append((dense.get_submodule(home), partial(_add_module, small, calls, amplitude)))
            continue
        (entry,) = unit
        name = entry.site.consumer
        dense_layer, small = (model.get_submodule(name) for model in (dense, pruned))
        # The consumer may make the channels of the next site: rows that it lost have no error of their own.
        rows = [row for row in range(output_channels(dense_layer)) if (name, row) not in gone]
        keep, left = (
            torch.tensor(places, dtype=torch.long, device=amplitudes.device) for places in (entry.keep, rows)
        )
        after.append((dense_layer, partial(_add_consumer, small, keep, left, amplitude)))
    with hooked(after, before=before):
        yield


def _add_consumer(
    small: nn.Module,
    keep: Tensor,
    rows: Tensor,
    amplitude: Tensor,
    module: nn.Module,
    args: tuple[Any, ...],
    output: Tensor,
) -> Tensor:
    dim = output.ndim + channel_dim(module)
    error: Tensor = small(args[0].index_select(args[0].ndim + channel_dim(module), keep))
    error = error - output.index_select(dim, rows)
    return output.index_add(dim, rows, amplitude.to(output.dtype) * error)


def _note(
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    calls.append((args, kwargs))


def _add_module(
    small: nn.Module,
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
    amplitude: Tensor,
    module: nn.Module,
    values: tuple[Any, ...],
    output: Any,
) -> Any:
    args, kwargs = calls.pop()
    whole, structure = tree_flatten(output)
    parts, _ = tree_flatten(small(*args, **kwargs))
    # An attention may return its weights besides, of the same shape; nothing reads them.
    added = [
        one + amplitude.to(one.dtype) * (other - one)
        if isinstance(one, Tensor) and one.is_floating_point() and one.shape == other.shape
        else one
        for one, other in zip(whole, parts, strict=True)
    ]
    return tree_unflatten(added, structure)
