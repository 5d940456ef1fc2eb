"""Move what pruned channels contributed on average into the layers that read them, and the means for it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vbp.errors import InputError, some_of
from vbp.method.mean_shift import grouped_mean_shift
from vbp.method.moments import ChannelMoments
from vbp.pruning.compensate import add_in_float64_, add_to_bias_
from vbp.runtime.forward import evaluation_mode, hooked
from vbp.sites.layers import input_channels
from vbp.statistics.batches import images_for
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
    def of(means: Mapping[Any, Tensor], model: nn.Module) -> ChannelMeans:
        """Return a copy by the layers of a model, of means by layer or by dotted name."""
        return ChannelMeans(by_layer(means, model), by_layer(getattr(means, "inputs", {}), model))

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


def by_layer(values: Mapping[Any, Tensor], model: nn.Module) -> dict[nn.Module, Tensor]:
    """Return a copy of what is keyed by layers, or by their dotted names, keyed by the layers of a model.

    Raises:
        InputError: A name is none of the model's.
    """
    names = [key for key in values if isinstance(key, str)]
    layers = dict(model.named_modules()) if names else {}
    unknown = [name for name in names if name not in layers]
    if unknown:
        raise InputError(
            f"statistics must fit {type(model).__name__}, got those of layers that it lacks: {some_of(unknown)}; "
            "give what was collected on a model of this structure"
        )
    return {layers[key] if isinstance(key, str) else key: value for key, value in values.items()}


def compensate_(
    coupling: Coupling, means: ChannelMeans, following: Mapping[nn.Module, _BatchNorm], names: Mapping[nn.Module, str]
) -> None:
    """Add the mean shift of a group's channels to each consumer, before the channels are removed.

    The shift goes into the bias. Of a consumer without bias whose output goes into a BatchNorm alone (`following`) it
    goes into the running mean: the same function in evaluation; in training the batch mean takes a constant away
    either way, and the running mean fits what it will see. Any other consumer without bias gets one.

    Raises:
        InputError: A mean is missing or of the wrong width; nothing is changed then.

    Source: VBP paper, section 3.3.
    """
    shifts: list[tuple[nn.Module, Tensor]] = []
    for edge in coupling.consumers:
        layer = edge.layer
        if getattr(layer, "transposed", False):
            continue
        assert isinstance(layer.weight, Tensor)
        mean = means.at(edge, coupling, names[layer]).to(layer.weight.device)
        groups = layer.groups if isinstance(layer, nn.modules.conv._ConvNd) else 1
        shifts.append((layer, grouped_mean_shift(layer.weight, mean, edge.channels.to(mean.device), groups)))
    for layer, shift in shifts:
        norm = following.get(layer)
        if layer.bias is None and norm is not None:
            if norm.running_mean is not None:
                add_in_float64_(norm.running_mean, -shift)
        else:
            add_to_bias_(layer, shift)


@contextmanager
def watching_norms(model: nn.Module) -> Iterator[dict[nn.Module, _BatchNorm]]:
    """Record, while the body runs the model, which BatchNorm reads the output of which layer as it is.

    The dict is filled when the body is done. A layer or norm that runs more than once is left out.
    """
    written: dict[int, tuple[nn.Module, Tensor]] = {}
    readers: dict[nn.Module, _BatchNorm] = {}
    calls: dict[nn.Module, int] = {}
    following: dict[nn.Module, _BatchNorm] = {}

    def wrote(module: nn.Module, args: object, output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        written[id(output)] = (module, output)  # the tensor is kept alive, so that its id is its own

    def reads(module: nn.Module, args: tuple[Tensor, ...], kwargs: object) -> None:
        calls[module] = calls.get(module, 0) + 1
        if args and id(args[0]) in written and isinstance(module, _BatchNorm):
            readers[written[id(args[0])][0]] = module

    layers = [(layer, wrote) for layer in model.modules() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)]
    norms = [(norm, reads) for norm in model.modules() if isinstance(norm, _BatchNorm)]
    with hooked(layers, before=norms):
        yield following
    following.update({layer: norm for layer, norm in readers.items() if calls[layer] == calls[norm] == 1})


def reestimate_batchnorm_(model: nn.Module, loader: Iterable[Any], device: torch.device | str | None = None) -> None:
    """Replace the running mean and variance of every BatchNorm by the average over all batches.

    Pruning changes the variance that a BatchNorm sees, which the mean shift does not restore. Nothing else of the
    model changes; dropout stays off.

    Args:
        model: A model with BatchNorm layers.
        loader: Images, with labels or without, as `pixels_of` takes them; each batch counts the
            same, so give batches of one size, as large as the memory allows.
        device: Where the images go; by default where the model is.

    Raises:
        InputError: The model has no BatchNorm with running statistics, or there is no image; nothing changes then.
    """
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None]
    if not norms:
        raise InputError(
            f"{type(model).__name__} has no BatchNorm with running statistics; there is none to estimate"
        )
    before = [(norm, norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    images = 0
    try:
        with evaluation_mode(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over batches
                norm.train()
            for pixels in images_for(model, loader, device):
                model(pixels)
                images += pixels.shape[0]
    finally:
        for norm, momentum, state in before:
            norm.momentum = momentum
            if not images:
                norm.load_state_dict(state)
    if not images:
        raise InputError("BatchNorm statistics need at least one image, got none; check the loader")


def moments_without(moments: ChannelMoments, removed: Tensor) -> ChannelMoments:
    """Return the moments of the channels that stay."""
    return ChannelMoments(moments.count, without(moments.mean, removed), without(moments.m2, removed))


def without(values: Float[Tensor, "channels"], removed: Tensor) -> Float[Tensor, "kept"]:
    """Return a vector without some of its entries."""
    keep = torch.ones(len(values), dtype=torch.bool, device=values.device)
    keep[removed.to(values.device)] = False
    return values[keep]
