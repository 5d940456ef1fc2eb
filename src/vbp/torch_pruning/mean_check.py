"""Measure how far pruning moves the output mean of the layers that read the pruned channels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from vbp.method.moments import ChannelMoments, RunningMoments
from vbp.runtime.forward import evaluation_mode, hooked
from vbp.sites.layers import channel_dim
from vbp.torch_pruning.compensate import moments_without
from vbp.torch_pruning.graph import Coupling

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeanMovement:
    """How far a layer's output mean moved.

    Attributes:
        absolute: Mean over output channels of the distance, in the units of the output.
        relative: Euclidean length of the movement over that of the output's standard deviations before.
    """

    absolute: float
    relative: float


class MeanCheck:
    """Compare one forward pass before pruning with one afterwards on the same images.

    Where a BatchNorm took the shift into its running mean, the output is counted from that running mean.
    """

    def __init__(
        self, model: nn.Module, following: Mapping[nn.Module, _BatchNorm], example_inputs: Any, forward: Any
    ) -> None:
        """Watch a model; `following` is the BatchNorm that alone reads the output of a layer."""
        self._model, self._following = model, following
        self._example_inputs, self._forward = example_inputs, forward
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._before: dict[nn.Module, ChannelMoments] = {}
        self._readers: set[nn.Module] = set()
        # A handle, not `hooked`: it outlives this call, and is copied with the model.
        self._handle = model.register_forward_pre_hook(self._reference, with_kwargs=True)

    def ensure_reference(self) -> None:
        """Run the example inputs if the model was not run yet."""
        if self._call is None:
            with evaluation_mode(self._model), torch.no_grad():
                self._forward(self._model, self._example_inputs)

    def cut_(self, coupling: Coupling) -> None:
        """Follow the pruning of a group."""
        self._readers.update(edge.layer for edge in coupling.consumers)
        for edge in coupling.producers:
            if edge.layer in self._before:
                self._before[edge.layer] = moments_without(self._before[edge.layer], edge.channels)

    def finish(self, names: Mapping[nn.Module, str]) -> dict[str, MeanMovement]:
        """Run the reference again, and report the layers that lost input channels."""
        self._handle.remove()
        if self._call is None or not self._readers:
            return {}
        after = self._moments()
        report = {}
        for layer, before in self._before.items():
            if layer not in self._readers or layer not in after:
                continue
            moved = after[layer].mean - before.mean
            spread = (before.m2 / before.count).sqrt().norm()
            relative = float(moved.norm() / spread.clamp(min=torch.finfo(torch.float64).tiny))
            report[names[layer]] = MeanMovement(float(moved.abs().mean()), relative)
            _log.info(
                "output mean of %s moved by %.3g (%.3g relative)", names[layer], *vars(report[names[layer]]).values()
            )
        return report

    def _reference(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is None:
            self._handle.remove()
            self._call = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            self._before = self._moments()

    def _moments(self) -> dict[nn.Module, ChannelMoments]:
        assert self._call is not None
        seen: dict[nn.Module, RunningMoments] = {}

        def record(layer: nn.Module, args: object, output: Tensor) -> None:
            values, norm = output.movedim(channel_dim(layer), -1), self._following.get(layer)
            if layer.bias is None and norm is not None and norm.running_mean is not None:
                values = values - norm.running_mean
            seen.setdefault(layer, RunningMoments()).add_(values)

        layers = [m for m in self._model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
        args, kwargs = self._call
        with hooked((layer, record) for layer in layers), evaluation_mode(self._model), torch.no_grad():
            self._model(*args, **kwargs)
        return {layer: one.moments.to("cpu") for layer, one in seen.items() if one.moments is not None}
