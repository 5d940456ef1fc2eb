"""Move what pruned channels contributed on average into the layers that read them; estimate BatchNorm again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vbp.errors import InputError
from vbp.method.mean_shift import grouped_mean_shift
from vbp.pruning.compensate import add_in_float64_, add_to_bias_
from vbp.runtime.forward import evaluation_mode, hooked
from vbp.torch_pruning.graph import Coupling
from vbp.torch_pruning.means import ChannelMeans

_log = logging.getLogger(__name__)


def reestimate_batchnorm_(model: nn.Module, loader: Iterable[Any], device: torch.device | str | None = None) -> None:
    """Replace the running mean and variance of every BatchNorm by the average over all batches.

    Pruning changes the variance that a BatchNorm sees, which the mean shift does not mend. Nothing else of the model
    changes; dropout stays off.

    Args:
        model: A model with BatchNorm layers.
        loader: Image tensors "batch channels height width", or tuples that begin with one; each batch counts the
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
    target = torch.device(device) if device is not None else next(model.parameters()).device
    before = [
        (norm, norm.momentum, {key: value.clone() for key, value in norm.state_dict().items()}) for norm in norms
    ]
    images = 0
    try:
        with evaluation_mode(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over batches
                norm.train()
            for batch in loader:
                pixels = batch if isinstance(batch, Tensor) else batch[0]
                model(pixels.to(target, non_blocking=True))
                images += pixels.shape[0]
    finally:
        for norm, momentum, state in before:
            norm.momentum = momentum
            if not images:
                norm.load_state_dict(state)
    if not images:
        raise InputError("BatchNorm statistics need at least one image, got none; check the loader")


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
