"""What a Torch-Pruning group means: which channels of which layers go together, and who reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch_pruning import ops

from vbp.errors import InputError

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True, eq=False)
class Edge:
    """Channels of one layer that belong to a group.

    Attributes:
        layer: The layer.
        channels: Its output channels (a producer) or input channels (a consumer).
        roots: For each of them, the channel of the group's root that it goes with.
    """

    layer: nn.Module
    channels: Int[Tensor, "pairs"]
    roots: Int[Tensor, "pairs"]


@dataclass(frozen=True, eq=False)
class Coupling:
    """A group, read: the layers that write its channels and those that read them.

    Attributes:
        root: The layer by whose channels the group is counted.
        channels: The root's channels in the group.
        producers: Layers whose output channels are pruned, depthwise convolutions among them.
        consumers: `Linear` and convolution layers whose input channels are pruned.
        norms: Names of normalisations over the group's channels: behind them a constant channel is none.
        opaque: Names of layers that read the channels in a way that cannot be compensated.
    """

    root: nn.Module
    channels: Int[Tensor, "roots"]
    producers: tuple[Edge, ...]
    consumers: tuple[Edge, ...]
    norms: tuple[str, ...]
    opaque: tuple[str, ...]


def input_width(layer: nn.Module) -> int:
    """Give the number of input channels of a `Linear` or a convolution."""
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)  # type: ignore[arg-type]


def channel_axis(layer: nn.Module) -> int:
    """Give the dimension of the channels in the input and output of a `Linear` or a convolution, from the end."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)  # type: ignore[arg-type]


def read_group(group: Any) -> Coupling:
    """Read a `tp.dependency.Group`, whole or cut down to some channels."""
    graph = group._DG
    producers, consumers, norms, opaque = [], [], [], []
    for item in group.items:
        layer, handler = item.dep.target.module, item.dep.handler
        writes, reads = graph.is_out_channel_pruning_fn(handler), graph.is_in_channel_pruning_fn(handler)
        name = _name(graph, layer)
        if _mixes_channels(graph, layer):
            norms.append(name)
        if not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            if reads and not writes:
                opaque.append(name)
        elif writes:
            producers.append(_edge(layer, item))
        else:
            consumers.append(_edge(layer, item))
            if getattr(layer, "transposed", False):
                opaque.append(name)
    roots = torch.tensor(list(dict.fromkeys(group[0].root_idxs)))
    return Coupling(
        group[0].dep.target.module, roots, tuple(producers), tuple(consumers), tuple(norms), tuple(opaque)
    )


def _edge(layer: nn.Module, item: Any) -> Edge:
    pairs = [(index, root) for index, root in zip(item.idxs, item.root_idxs, strict=True) if root is not None]
    channels, roots = zip(*pairs, strict=True) if pairs else ((), ())
    return Edge(layer, torch.tensor(channels, dtype=torch.long), torch.tensor(roots, dtype=torch.long))


def _name(graph: Any, target: Any) -> str:
    if isinstance(target, nn.Parameter):
        return str(graph._param_to_name.get(target, "a parameter"))
    return str(graph._module2name.get(target, type(target).__name__))


def _mixes_channels(graph: Any, target: Any) -> bool:
    """Say whether a pruned target normalises over channels; a norm of an unknown class shows by its parameter."""
    if isinstance(target, nn.Parameter):
        owner = graph.model.get_submodule(_name(graph, target).rpartition(".")[0])
        kind = type(owner).__name__.lower()
        return "norm" in kind and owner is not graph.model
    return isinstance(target, nn.LayerNorm | nn.GroupNorm)


def canonical_roots(group: Any) -> Int[Tensor, "roots"]:
    """Give for each root channel of a whole group the lowest one that always goes with it.

    They differ from the channel itself behind a packed gate alone, where channel `j` of the gate goes with channel
    `j` of the value.
    """
    width = len(group[0].idxs)
    canonical = torch.arange(width)
    splits = [item.dep.target for item in group.items if item.dep.target.type == ops.OPTYPE.SPLIT]
    if not splits:
        return canonical
    parts = max(len(node.outputs) for node in splits)
    root = group[0].dep
    probe = group._DG.get_pruning_group(root.target.module, root.handler, list(range(width // max(parts, 1))))
    canonical[probe[0].idxs] = torch.tensor(probe[0].root_idxs)
    return canonical


def check_indices(group: Any) -> None:
    """Refuse a group whose channel numbers do not fit its layers.

    Raises:
        InputError: Torch-Pruning follows the channels wrongly through this model.
    """
    graph = group._DG
    for item in group.items:
        target = item.dep.target
        if not isinstance(target.module, _LAYERS):
            continue
        reads = not graph.is_out_channel_pruning_fn(item.dep.handler)
        width = (graph.get_in_channels if reads else graph.get_out_channels)(target)
        if width is not None and item.idxs and max(item.idxs) >= width:
            raise InputError(
                f"Torch-Pruning follows {len(group[0].idxs)} channels of {_name(graph, group[0].dep.target.module)} "
                f"into {_name(graph, target.module)}, which has {width}, got channel {max(item.idxs)}: the operation "
                "between them is one it does not know; put the first layer into ignored_layers"
            )
