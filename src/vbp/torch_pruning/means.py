"""The means that compensation needs, keyed by layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.method.moments import ChannelMoments
from vbp.sites.layers import input_channels
from vbp.torch_pruning.graph import Coupling, Edge


class ChannelMeans(dict[nn.Module, Tensor]):
    """Mean of each output channel by producer, as it reaches the layers that read it.

    A plain dict of that form serves as well; it lacks `inputs`, which differ from it where several consumers read
    a channel at different places, or one reads it at several positions (flatten).

    Attributes:
        inputs: Mean of each input channel by consumer.
    """

    def __init__(
        self, producers: Mapping[nn.Module, Tensor], inputs: Mapping[nn.Module, Tensor] | None = None
    ) -> None:
        super().__init__(producers)
        self.inputs: dict[nn.Module, Tensor] = dict(inputs or {})

    @staticmethod
    def copy_of(means: Mapping[nn.Module, Tensor]) -> ChannelMeans:
        """Copy a mapping, with its `inputs` if it has them; the tensors are shared."""
        return ChannelMeans(means, getattr(means, "inputs", None))

    def at(self, edge: Edge, coupling: Coupling, name: str) -> Float[Tensor, "hidden"]:
        """Return the mean of each input channel of one of a group's consumers; those outside the edge are 0.

        Raises:
            InputError: There is no mean, or it has another width.
        """
        means = torch.zeros(input_channels(edge.layer), dtype=torch.float64)
        values = self.inputs.get(edge.layer)
        if values is None:
            means[edge.channels] = self._from_producers(edge, coupling, name)
            return means
        if len(edge.channels) and int(edge.channels.max()) >= len(values):
            raise InputError(
                f"means at the input of {name} must cover {len(means)} channels, got {len(values)}; they were "
                "collected on a model of another width: collect them again"
            )
        means[edge.channels] = values.double().cpu()[edge.channels]
        return means

    def _from_producers(self, edge: Edge, coupling: Coupling, name: str) -> Tensor:
        for producer in coupling.producers:
            values = self.get(producer.layer)
            if values is None or not len(producer.channels) or int(producer.channels.max()) >= len(values):
                continue
            size = 1 + max(int(edge.roots.max()), int(producer.roots.max()))
            by_root = torch.zeros(size, dtype=torch.float64)
            by_root[producer.roots] = values.double().cpu()[producer.channels]
            return by_root[edge.roots]
        raise InputError(
            f"mean_dict must hold the producer of every pruned channel, got none for the input of {name}; give "
            "imp.means of an importance that collected its statistics on this very model object"
        )

    def cut_(self, coupling: Coupling) -> None:
        """Drop the channels of a group that is about to be pruned."""
        for entries, edges in ((self, coupling.producers), (self.inputs, coupling.consumers)):
            for edge in edges:
                if edge.layer in entries:
                    entries[edge.layer] = without(entries[edge.layer], edge.channels)


def moments_without(moments: ChannelMoments, removed: Tensor) -> ChannelMoments:
    """Return the moments of the channels that stay."""
    return ChannelMoments(moments.count, without(moments.mean, removed), without(moments.m2, removed))


def without(values: Float[Tensor, "channels"], removed: Tensor) -> Float[Tensor, "kept"]:
    """Return a vector without some of its entries."""
    keep = torch.ones(len(values), dtype=torch.bool, device=values.device)
    keep[removed.to(values.device)] = False
    return values[keep]
