"""Observe channel moments at the inputs of some layers and at the outputs of others, in one pass over images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.modes import evaluation_mode
from vbp.moments import ChannelMoments, channel_moments
from vbp.torch_pruning.groups import channel_axis


class _Moments:
    """Running moments of one layer's values."""

    def __init__(self, layer: nn.Module, function: Callable[[Tensor], Tensor] | None = None) -> None:
        self.axis = channel_axis(layer)
        self.function = function
        self.seen: ChannelMoments | None = None

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.add(args[0] if args else next(iter(kwargs.values())))

    def after(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.add(output if self.function is None else self.function(output))

    def add(self, values: Tensor) -> None:
        batch = channel_moments(values.movedim(self.axis, -1), None if self.seen is None else self.seen.mean)
        self.seen = batch if self.seen is None else self.seen.merge(batch)


def observe(
    model: nn.Module,
    images: Iterable[Tensor],
    consumers: Iterable[nn.Module],
    outputs: Mapping[nn.Module, Callable[[Tensor], Tensor]],
    names: Mapping[nn.Module, str],
) -> tuple[dict[nn.Module, ChannelMoments], dict[nn.Module, ChannelMoments]]:
    """Give the moments at the input of each consumer, and those of a function of each named output.

    Args:
        model: Left as it was.
        images: Batches on the model's device.
        consumers: `Linear` and convolution layers.
        outputs: Layer -> function of its output.
        names: Layer -> dotted name, for messages.

    Raises:
        InputError: A layer never ran, or a value is not finite.
    """
    inputs = {layer: _Moments(layer) for layer in consumers}
    targets = {layer: _Moments(layer, function) for layer, function in outputs.items()}
    handles = [layer.register_forward_pre_hook(seen.before, with_kwargs=True) for layer, seen in inputs.items()]
    handles += [layer.register_forward_hook(seen.after) for layer, seen in targets.items()]
    try:
        with evaluation_mode(model), torch.no_grad():
            for batch in images:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return _finished(inputs, names), _finished(targets, names)


def _finished(
    observed: Mapping[nn.Module, _Moments], names: Mapping[nn.Module, str]
) -> dict[nn.Module, ChannelMoments]:
    found = {}
    for layer, running in observed.items():
        if running.seen is None:
            raise InputError(
                f"{names[layer]} was traced but never ran during calibration; the statistics of its input are missing"
            )
        moments = running.seen.to("cpu")
        bad = int((~(moments.mean.isfinite() & moments.m2.isfinite())).sum())
        if bad or moments.count < 2:
            raise InputError(
                f"activations at {names[layer]} must be finite and at least 2 samples, got {bad} channels with "
                f"NaN or infinity and {moments.count} samples; check weights and preprocessing, or give more images"
            )
        found[layer] = moments
    return found
