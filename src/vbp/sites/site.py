"""`Site`: hidden channels that can be removed, and the weights that belong to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    (two layers, or one layer twice), queries and keys in an attention site without consumer. Several layers may read
    the channels, each at a place of its own: in a squeeze-and-excitation block one reads their means over the image,
    the consumer what is left of them behind the gate.

    Attributes:
        producers: Layers whose output rows make the channels.
        consumer: The layer whose input columns are the channels, the last of several; empty for query/key channels.
        hidden: Number of channels.
        kind: `mlp`, `value` (of an attention) or `query_key`.
        offsets: First row of the site in each producer; empty means 0 everywhere.
        inner: Norms and depthwise convolutions that the channels pass.
        parameters: Bare parameters with one element a channel.
        heads: Heads of an attention, which all keep the same number of channels; in an MLP groups of a convolution
            that makes or reads the channels, for which the same holds, else 1.
        exact: Whether the mean shift equals holding the channel at its mean. Behind a norm over channels it does not,
            for removal also changes the channels that stay; nor where a kernel meets zero padding.
        implicit_scale: Whether the softmax scale follows from the number of query channels (and must be corrected).
        rotatable: Whether any basis of a head's channels serves as well: nothing but factors and sums stands between
            their layer, or both layers of queries and keys, and what reads them.
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


@dataclass(frozen=True)
class WeightSlice:
    """The part of one weight, by its dotted name, that belongs to the channels of a site, from `first` on.

    `groups` are those of a convolution.
    """

    parameter: str
    dim: int
    first: int
    channels: int
    groups: int = 1

    def of(self, tensor: Tensor) -> Float[Tensor, "hidden rest"]:
        """Return the slice of the weight, or of a tensor of its shape, a row a channel, in float64."""
        if self.groups > 1 and self.dim == 1:
            tensor = without_groups(tensor, self.groups)
        rows = tensor.detach().narrow(self.dim, self.first, self.channels).movedim(self.dim, 0)
        return rows.reshape(self.channels, -1).double()


def weight_slices(model: nn.Module, site: Site) -> tuple[WeightSlice, ...]:
    """Return the parts of a model's weights that belong to a site's channels."""
    slices = [WeightSlice(f"{name}.weight", 0, first, site.hidden) for name, first in site.rows]
    for name, first in site.passed:
        inner = model.get_submodule(name)
        if isinstance(inner.weight, Tensor):  # a norm may have none
            dim = -1 if isinstance(inner, nn.LayerNorm) else 0
            slices.append(WeightSlice(f"{name}.weight", dim, first, site.hidden))
    for reader in site.readers:
        groups = groups_of(model.get_submodule(reader.layer))
        slices.append(WeightSlice(f"{reader.layer}.weight", 1, reader.first, site.hidden, groups))
    return tuple(slices)
