"""Put the errors of a pruned model's parts into the dense model, each with an amplitude of its own.

The error of an MLP is that of the layers which read it, where they read the channels of the dense model that stay.
The error of an attention is that of the smallest module around all of its layers, for its channels have another basis
after surgery; so is that of a branch that is gone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vbp.pruning.plan import PruningPlan, SitePlan
from vbp.runtime.forward import Hook, hooked
from vbp.sites.branches import home_of
from vbp.sites.layers import channel_dim, input_channels, output_channels
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
) -> Iterator[set[str]]:
    """Add to the dense model the errors of the pruned model's `erring_units`, times the amplitudes.

    Yields the names of the attentions and removed branches whose error was added: the code of a model may take the
    layers of a module, and never call the module itself.
    """
    reached: set[str] = set()
    gone: dict[str, set[int]] = defaultdict(set)
    lost: dict[str, set[int]] = defaultdict(set)
    for entry in plan.sites:
        for name, places in entry.site.places:
            gone[name].update(places[row] for row in entry.removed)
        for reader in entry.site.readers:
            lost[reader.layer].update(reader.first + column for column in entry.removed)
    after: list[tuple[nn.Module, Hook]] = []
    before: list[tuple[nn.Module, Hook]] = []
    parts: dict[str, list[_Part]] = defaultdict(list)
    for unit, amplitude in zip(erring_units(plan), amplitudes, strict=True):
        if unit[0].site.kind != "mlp" or not unit[0].keep:
            home = home_of(dense, [entry.site for entry in unit])
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            before.append((dense.get_submodule(home), partial(_note, calls, reached, unit[0].site.name)))
            small = pruned.get_submodule(home)
            after.append((dense.get_submodule(home), partial(_add_module, small, calls, amplitude)))
            continue
        (entry,) = unit
        for reader in entry.site.readers:
            kept = tuple(reader.first + column for column in entry.keep)
            parts[reader.layer].append(_Part(range(reader.first, reader.first + entry.site.hidden), kept, amplitude))
    for name, read in parts.items():
        layer, small = (model.get_submodule(name) for model in (dense, pruned))
        # The layer may make the channels of another site: rows that it lost have no error of their own.
        rows = [row for row in range(output_channels(layer)) if row not in gone[name]]
        columns = [column for column in range(input_channels(layer)) if column not in lost[name]]
        after.append((layer, _ErrorOfLayer(small, rows, columns, read)))
    with hooked(after, before=before):
        yield reached


def _note(
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
    reached: set[str],
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    calls.append((args, kwargs))
    reached.add(name)


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


@dataclass(frozen=True)
class _Part:
    """Hold the columns of a layer that read one site, those of them that stay, and the amplitude of its error."""

    columns: range
    kept: tuple[int, ...]
    amplitude: Tensor


@dataclass(frozen=True)
class _ErrorOfLayer:
    """Add the error of a pruned layer to what the dense one returns: a hook after it.

    `rows` and `columns` are those of the dense layer that the pruned one has. Where several sites meet in a layer,
    each has the error of its own columns about its mean; the mean of the whole error is divided evenly.
    """

    small: nn.Module
    rows: Sequence[int]
    columns: Sequence[int]
    parts: Sequence[_Part]

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        read, dim, place = args[0], output.ndim + channel_dim(layer), args[0].ndim + channel_dim(layer)
        rows, columns = (torch.tensor(places, device=read.device) for places in (self.rows, self.columns))
        error: Tensor = self.small(read.index_select(place, columns))
        error = error - output.index_select(dim, rows)
        if len(self.parts) == 1:
            return output.index_add(dim, rows, self.parts[0].amplitude.to(output.dtype) * error)
        positions = [axis for axis in range(error.ndim) if axis != dim]
        total = torch.zeros_like(error)
        for part in self.parts:
            own = self._of(layer, read, part, place)
            own = own - own.mean(positions, keepdim=True) + error.mean(positions, keepdim=True) / len(self.parts)
            total = total + part.amplitude.to(output.dtype) * own
        return output.index_add(dim, rows, total)

    def _of(self, layer: nn.Module, read: Tensor, part: _Part, place: int) -> Tensor:
        """Return what the columns of one site in the pruned layer return, less what those in the dense one do."""
        position = {column: index for index, column in enumerate(self.columns)}
        results = []
        for module, used, at, rows in (
            (self.small, part.kept, [position[column] for column in part.kept], slice(None)),
            (layer, part.columns, list(part.columns), list(self.rows)),
        ):
            assert isinstance(module.weight, Tensor)
            weight = module.weight[rows][:, at]
            values = read.index_select(place, torch.tensor(list(used), device=read.device))
            if isinstance(module, nn.Conv2d):
                results.append(module._conv_forward(values, weight, None))
            else:
                results.append(F.linear(values, weight))
        difference: Tensor = results[0] - results[1]
        return difference
