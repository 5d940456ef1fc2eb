"""`Site`: hidden channels that can be removed, and the weights that belong to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.sites.layers import groups_of, without_groups

# Between the name of a site and that of a layer, beside the consumer, that reads its channels.
READ = "#read:"

SiteKind = Literal["mlp", "value", "query_key"]


@dataclass(frozen=True)
class Site:
    """Hidden channels `h`, made by the producers and read by the consumer, by dotted module names.

    Channel `j` is row `offsets[i] + j` of producer `i`: one producer in an MLP, a gate and its value in a gated one
    (two layers, or one layer twice), queries and keys in an attention site without consumer. Where a layer makes
    queries, keys and values head by head, the channels of a head begin `strides[i]` rows after those of the last one.
    Several layers may read the channels, each at a place of its own: in a squeeze-and-excitation block one reads
    their means over the image, the consumer what is left of them behind the gate.

    Attributes:
        producers: Layers whose output rows make the channels.
        consumer: The layer whose input columns are the channels, the last of several; empty for query/key channels.
        hidden: Number of channels.
        kind: `mlp`, `value` (of an attention) or `query_key`.
        offsets: First row of the site in each producer; empty means 0 everywhere.
        strides: Rows from each head to the next in each producer; empty means that its heads follow each other.
        inner: Norms and depthwise convolutions that the channels pass.
        parameters: Bare parameters with one element a channel.
        heads: Heads of an attention, which all keep the same number of channels; in an MLP groups of a convolution
            that makes or reads the channels, for which the same holds, else 1.
        exact: Whether the mean shift equals holding the channel at its mean. Behind a norm over channels it does not,
            for removal also changes the channels that stay; nor where a kernel meets zero padding.
        implicit_scale: Whether the softmax scale follows from the number of query channels (and must be corrected).
        branch: The module that returns what the consumer returns, and nothing else: it is replaced by a constant
            where no channel stays. Empty where there is none.
        rotatable: Whether any basis of a head's channels serves as well: nothing but factors and sums stands between
            their layer, or both layers of queries and keys, and what reads them.
        separate: Whether the values of this attention may keep another number of channels than its queries and keys.
        others: The other layers that read the channels.
        columns: First column of the site in the consumer, and in each of the others, where the channels are but a
            part of what these read, as in a concatenation; empty if they are all of it.
        inner_offsets: First channel of the site in each of `inner`, likewise.

    Source: VBP paper (arXiv 2507.12988), section 3.

    Example:
        >>> sites[0].producers, sites[0].consumer, sites[0].hidden
        (('blocks.0.mlp.fc1',), 'blocks.0.mlp.fc2', 128)
    """

    producers: tuple[str, ...]
    consumer: str
    hidden: int
    kind: SiteKind = "mlp"
    offsets: tuple[int, ...] = ()
    inner: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    heads: int = 1
    exact: bool = True
    implicit_scale: bool = False
    rotatable: bool = False
    others: tuple[str, ...] = ()
    columns: tuple[int, ...] = ()
    inner_offsets: tuple[int, ...] = ()
    separate: bool = False
    strides: tuple[int, ...] = ()
    branch: str = ""

    @property
    def name(self) -> str:
        """Return the key of this site in statistics, plans and reports.

        The layer whose outputs are pruned, with the first row of a site that does not begin with the layer; for an
        attention's values, whose layer often makes queries and keys too, the layer that reads them.
        """
        if self.kind == "value":
            return self.consumer
        first = self.offsets[0] if self.offsets and self.kind == "mlp" else 0
        return f"{self.producers[0]}#{first}" if first else self.producers[0]

    @property
    def rows(self) -> tuple[tuple[str, int], ...]:
        """Return each producer with the site's first row in it."""
        return tuple(zip(self.producers, self.offsets or (0,) * len(self.producers), strict=True))

    @property
    def places(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return each producer with the row of each channel in it."""
        size = self.hidden // self.heads
        strides = self.strides or (size,) * len(self.producers)
        return tuple(
            (name, tuple(first + head * stride + index for head in range(self.heads) for index in range(size)))
            for (name, first), stride in zip(self.rows, strides, strict=True)
        )

    @property
    def readers(self) -> tuple[Reader, ...]:
        """Return the layers that read the channels, the consumer first; none for query/key channels."""
        layers = (self.consumer, *self.others) if self.consumer else ()
        firsts = self.columns or (0,) * len(layers)
        return tuple(
            Reader(f"{self.name}{READ}{layer}" if place else self.name, layer, first)
            for place, (layer, first) in enumerate(zip(layers, firsts, strict=True))
        )

    @property
    def passed(self) -> tuple[tuple[str, int], ...]:
        """Return each norm and depthwise convolution that the channels pass, with the site's first channel in it."""
        return tuple(zip(self.inner, self.inner_offsets or (0,) * len(self.inner), strict=True))

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the layers that make or read the channels, each once."""
        return tuple(dict.fromkeys((*self.producers, *(reader.layer for reader in self.readers))))


@dataclass(frozen=True)
class Reader:
    """A layer that reads a site's channels from column `first` on; `key` names what it reads in statistics."""

    key: str
    layer: str
    first: int


def units_of(sites: Sequence[Site]) -> Iterator[tuple[Site, ...]]:
    """Return what keeps as many channels: each MLP site, and an attention's values with its queries and keys.

    Where values may have another width than queries and keys each is a unit.
    """
    for group in blocks_of(sites):
        yield from ((site,) for site in group) if group[0].separate else (group,)


def blocks_of(sites: Sequence[Site]) -> Iterator[tuple[Site, ...]]:
    """Return each MLP site, and the value site of each attention with that of its queries and keys."""
    for place, site in enumerate(sites):
        if site.kind == "query_key" and place and sites[place - 1].kind == "value":
            continue
        following = sites[place + 1 : place + 2]
        pair = site.kind == "value" and bool(following) and following[0].kind == "query_key"
        yield (site, following[0]) if pair else (site,)


@dataclass(frozen=True)
class WeightSlice:
    """The part of one weight, by its dotted name, that belongs to the channels of a site, at these places.

    `groups` are those of a convolution.
    """

    parameter: str
    dim: int
    places: tuple[int, ...]
    groups: int = 1

    def of(self, tensor: Tensor) -> Float[Tensor, "hidden rest"]:
        """Return the slice of the weight, or of a tensor of its shape, a row a channel, in float64."""
        if self.groups > 1 and self.dim == 1:
            tensor = without_groups(tensor, self.groups)
        rows = select(tensor.detach(), self.dim, self.places).movedim(self.dim, 0)
        return rows.reshape(len(self.places), -1).double()


def select(values: Tensor, dim: int, places: Sequence[int]) -> Tensor:
    """Return the values at some places of a dimension, as a view where they follow each other."""
    if tuple(places) == tuple(range(places[0], places[0] + len(places))):
        return values.narrow(dim, places[0], len(places))
    return values.index_select(dim, torch.tensor(places, device=values.device))


def weight_slices(model: nn.Module, site: Site) -> tuple[WeightSlice, ...]:
    """Return the parts of a model's weights that belong to a site's channels."""
    slices = [WeightSlice(f"{name}.weight", 0, rows) for name, rows in site.places]
    for name, first in site.passed:
        inner = model.get_submodule(name)
        if isinstance(inner.weight, Tensor):  # a norm may have none
            dim = -1 if isinstance(inner, nn.LayerNorm) else 0
            slices.append(WeightSlice(f"{name}.weight", dim, tuple(range(first, first + site.hidden))))
    for reader in site.readers:
        groups = groups_of(model.get_submodule(reader.layer))
        columns = tuple(range(reader.first, reader.first + site.hidden))
        slices.append(WeightSlice(f"{reader.layer}.weight", 1, columns, groups))
    return tuple(slices)
