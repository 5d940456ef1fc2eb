"""The errors that pruning makes at the layers that read a site, put into the dense model one site at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vbp.pruning.plan import SitePlan
from vbp.runtime.forward import Hook, hooked
from vbp.sites.layers import channel_dim, input_channels, output_channels


@contextmanager
def errors_added(
    dense: nn.Module, pruned: nn.Module, entries: Sequence[SitePlan], amplitudes: Float[Tensor, "sites"]
) -> Iterator[None]:
    """Add to the layers of the dense model that read sites the errors of the pruned model's, times the amplitudes."""
    gone: dict[str, set[int]] = defaultdict(set)
    lost: dict[str, set[int]] = defaultdict(set)
    parts: dict[str, list[_Part]] = defaultdict(list)
    for entry, amplitude in zip(entries, amplitudes, strict=True):
        for name, first in entry.site.rows:
            gone[name].update(first + row for row in entry.removed)
        for reader in entry.site.readers:
            lost[reader.layer].update(reader.first + column for column in entry.removed)
            kept = tuple(reader.first + column for column in entry.keep)
            parts[reader.layer].append(_Part(range(reader.first, reader.first + entry.site.hidden), kept, amplitude))
    hooks: list[tuple[nn.Module, Hook]] = []
    for name, read in parts.items():
        layer, small = (model.get_submodule(name) for model in (dense, pruned))
        # The layer may make the channels of another site: rows that it lost have no error of their own.
        rows = [row for row in range(output_channels(layer)) if row not in gone[name]]
        columns = [column for column in range(input_channels(layer)) if column not in lost[name]]
        hooks.append((layer, _ErrorOfLayer(small, rows, columns, read)))
    with hooked(hooks):
        yield


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
