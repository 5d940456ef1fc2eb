"""Trace a model with Torch-Pruning and leave it as it was; which channels a group removes, and who reads them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from jaxtyping import Int
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.dependency import index_mapping
from torch_pruning.pruner import function

from vbp.errors import InputError, first_line
from vbp.runtime.forward import evaluation_mode, run_model
from vbp.sites.cutting import keep_channels_

_log = logging.getLogger(__name__)


@contextmanager
def logged_warnings(model: nn.Module) -> Iterator[None]:
    """Send Torch-Pruning's warnings to the log."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        _log.info("Torch-Pruning on %s: %s", type(model).__name__, message)


@contextmanager
def tracing(model: nn.Module) -> Iterator[None]:
    """Prepare a model for Torch-Pruning's tracer, and leave it unchanged; its warnings go to the log.

    The tracer follows autograd, so gradients are on and frozen parameters require them meanwhile. It would leave the
    model in evaluation mode.

    Raises:
        InputError: The body failed: the model cannot be traced.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("Torch-Pruning traces gradients, got torch.inference_mode(); call this outside of it")
    frozen = [
        parameter for parameter in model.parameters() if not parameter.requires_grad and parameter.is_floating_point()
    ]
    try:
        with evaluation_mode(model), logged_warnings(model), torch.enable_grad():
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"Torch-Pruning could not trace {type(model).__name__}: {type(error).__name__}: "
            f"{first_line(error)}; the forward pass must run "
            "on example_inputs and compute tensors with gradients (no torch.no_grad inside, no torch.jit), otherwise "
            "give a forward_fn"
        ) from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def build_graph(model: nn.Module, example_inputs: Any) -> Any:
    """Return a `tp.DependencyGraph` of a model, which is left as it was; the inputs are those of `run_model`.

    Raises:
        InputError: The model cannot be traced.
    """
    with tracing(model):
        # Torch-Pruning's own call would spread a lone tensor over its batch dimension first.
        graph = tp.DependencyGraph().build_dependency(model, example_inputs, forward_fn=run_model)
        correct_graph_(graph)
    return graph


def correct_graph_(graph: Any) -> None:
    """Correct how a fresh dependency graph follows channels through reshapes and splits.

    Torch-Pruning 1.6.1 guesses from the whole model whether a reshape flattens feature maps, since it looks for sizes
    under a name that PyTorch no longer uses; on a channels-last model such as torchvision's Swin it then never comes
    to an end. Here a reshape flattens only if its own input has feature maps of that many positions. Norms keep the
    order of their channels.
    """
    _correct_layer_norms_(graph)
    for node in graph.module2node.values():
        sizes = _input_sizes(node)
        if node.type != ops.OPTYPE.RESHAPE or len(sizes) in (0, 2):
            continue
        strides = {dependency.index_mapping[0]._stride for dependency in _flattenings(node, node.inputs)}
        positions = sizes[2] * sizes[3] if len(sizes) == 4 else 0
        if positions != 1 and strides != {positions}:
            node.type = ops.OPTYPE.ELEMENTWISE
            for dependency in _flattenings(node, [*node.inputs, *node.outputs]):
                dependency.index_mapping[0] = None
    pair_gates_(graph)


class _LayerNormPruner(function.LayernormPruner):  # type: ignore[misc]
    """Keeps the order of the channels that stay.

    Torch-Pruning 1.6.1 takes them in the order of a Python set: where few are left, it permutes weight and bias.
    """

    def prune_out_channels(self, layer: nn.LayerNorm, idxs: Sequence[int]) -> nn.LayerNorm:
        removed = set(idxs)
        keep_channels_(layer, [index for index in range(layer.normalized_shape[-1]) if index not in removed])
        return layer

    prune_in_channels = prune_out_channels


def _correct_layer_norms_(graph: Any) -> None:
    """Make every later pruning of this graph's norms keep the order of their channels."""
    faulty, corrected = graph.REGISTERED_PRUNERS[ops.OPTYPE.LN], _LayerNormPruner()
    if isinstance(faulty, _LayerNormPruner):
        return
    graph.REGISTERED_PRUNERS[ops.OPTYPE.LN] = corrected
    graph._in_channel_pruning_fn.add(corrected.prune_in_channels)
    graph._out_channel_pruning_fn.add(corrected.prune_out_channels)
    replaced = {
        faulty.prune_in_channels: corrected.prune_in_channels,
        faulty.prune_out_channels: corrected.prune_out_channels,
    }
    for node in graph.module2node.values():
        for dependency in node.dependencies:
            dependency.trigger = replaced.get(dependency.trigger, dependency.trigger)
            dependency.handler = replaced.get(dependency.handler, dependency.handler)


def _input_sizes(node: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in getattr(node.grad_fn, "_saved_self_sym_sizes", ()))


def _flattenings(node: Any, neighbours: Sequence[Any]) -> list[Any]:
    """Return the dependencies between a node and its neighbours that number positions of feature maps."""
    return [
        dependency
        for other in neighbours
        for source, target in ((node, other), (other, node))
        for dependency in source.dependencies
        if dependency.target is target and isinstance(dependency.index_mapping[0], index_mapping._FlattenIndexMapping)
    ]


def pair_gates_(graph: Any) -> None:
    """Correct the graph where a channel-last `chunk` or `split` splits the channels.

    Torch-Pruning follows splits of dimension 1 alone. After a packed gate (SwiGLU: one Linear whose output is split
    into gate and value along the last dimension) it takes the channel numbers of the whole for those of a part, and
    the pruned model fails. Call it again after each pruning: Torch-Pruning leaves the offsets where they were.
    """
    for node in graph.module2node.values():
        if node.type != ops.OPTYPE.SPLIT or not node.module.split_sizes:
            continue
        if None in node.module.split_sizes:
            # A split whose sizes it cannot tell, as of the queries in a rotary embedding: no channels are cut there.
            continue
        offsets = [0]
        for size in node.module.split_sizes:
            offsets.append(offsets[-1] + size)
        node.module.offsets = offsets
        if _cuts_last_of_three(node):
            for part, output in enumerate(node.outputs):
                bounds = offsets[part : part + 2]
                _map(node, output, index_mapping._SplitIndexMapping(bounds, reverse=False))
                _map(output, node, index_mapping._SplitIndexMapping(bounds, reverse=True))


def _cuts_last_of_three(node: Any) -> bool:
    sizes = _input_sizes(node)
    dim = getattr(node.grad_fn, "_saved_dim", 1)
    # Autograd keeps a negative dimension as an unsigned 64-bit number.
    last = dim in (len(sizes) - 1, 2**64 - 1, -1)
    return len(sizes) != 4 and last and len(sizes) > 2 and len(node.outputs) == len(node.module.split_sizes)


def _map(source: Any, target: Any, mapping: Any) -> None:
    for dependency in source.dependencies:
        if dependency.target is target:
            dependency.index_mapping[0] = mapping


_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True, eq=False)
class Edge:
    """Output channels (of a producer) or input channels (of a consumer) of one layer that belong to a group.

    `roots` holds for each of them the channel of the group's root that it goes with.
    """

    layer: nn.Module
    channels: Int[Tensor, "pairs"]
    roots: Int[Tensor, "pairs"]


@dataclass(frozen=True, eq=False)
class Coupling:
    """The layers that write a group's channels and those that read them; `root` is the layer that numbers them.

    Attributes:
        producers: Layers whose output channels are pruned, depthwise convolutions among them.
        consumers: `Linear` and convolution layers whose input channels are pruned.
        norms: Names of normalisations over the group's channels: behind them a constant channel is not constant.
        opaque: Names of layers that read the channels in a way that cannot be compensated.
    """

    root: nn.Module
    channels: Int[Tensor, "roots"]
    producers: tuple[Edge, ...]
    consumers: tuple[Edge, ...]
    norms: tuple[str, ...]
    opaque: tuple[str, ...]


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
    """Return whether a pruned target normalises over channels; a norm of an unknown class shows by its parameter."""
    if isinstance(target, nn.Parameter):
        owner = graph.model.get_submodule(_name(graph, target).rpartition(".")[0])
        kind = type(owner).__name__.lower()
        return "norm" in kind and owner is not graph.model
    return isinstance(target, nn.LayerNorm | nn.GroupNorm)


def canonical_roots(group: Any) -> Int[Tensor, "roots"]:
    """Return for each root channel of a whole group the lowest one that always goes with it.

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
