"""Tell layers that are what their class says from those whose weights are computed, shared or used elsewhere.

That a layer is an `nn.Linear` promises nothing about its forward pass or its weight: standardised weights, adapters,
parametrizations, masks and tied parameters all hide behind the same class. Such a layer cannot be cut or shifted by
its `weight` and `bias` alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from vbp.runtime.forward import call_values, hooked
from vbp.sites.propagation import SAME, tensors_in

_OWN = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_KERNELS = {"linear", "conv2d", "batch_norm", "layer_norm", "group_norm"}
_UNCHANGED = SAME | {"pad"}
_MAPS = (nn.Linear, nn.Conv2d)
_LAYERS = (*_MAPS, _BatchNorm, nn.LayerNorm, nn.GroupNorm)


def unusual_layer(name: str, reason: str) -> str:
    """Return the sentence about a layer that `unusual_layers` or `watching_layers` names, with the remedy."""
    return (
        f"{name} cannot be pruned by its own weight and bias: {reason}; make it a plain layer first (merge what "
        "computes its weight, untie by a copy), or leave it out"
    )


def unusual_layers(model: nn.Module) -> dict[str, str]:
    """Return, by name, the layers and bare parameters that their own `weight` and `bias` do not describe, and why."""
    owned = [(prefix, name, value) for prefix, name, value in _parameters(model)]
    owners = Counter(_place(value) for _, _, value in owned)
    reasons: dict[str, str] = {}
    for prefix, name, value in owned:
        if owners[_place(value)] > 1:
            reason = f"its {name} is also a parameter of another module"
            reasons.setdefault(prefix, reason)
            reasons[f"{prefix}.{name}".lstrip(".")] = reason
    for name, layer in model.named_modules():
        if isinstance(layer, _LAYERS):
            held = {*dict(layer.named_parameters()), *dict(layer.named_buffers())}
            if extra := sorted(held - _OWN):
                reasons[name] = f"it holds {', '.join(extra)} beside its weight and bias"
    return reasons


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Return module name, own name and value of each parameter, once for each module that holds it."""
    for prefix, module in model.named_modules():
        for name, value in module.named_parameters(recurse=False, remove_duplicate=False):
            yield prefix, name, value


def _place(value: nn.Parameter) -> tuple[str, int]:
    """Return what two parameters have in common if they are one, or views of one memory."""
    return ("memory", value.data_ptr()) if value.device.type != "meta" and value.numel() else ("object", id(value))


@contextmanager
def watching_layers(model: nn.Module) -> Iterator[dict[str, str]]:
    """Return `unusual_layers`, to which is added what forward passes of the model, run by the body, show.

    A usual layer computes one kernel, of its own input with its own parameters, and no other code reads these.
    """
    reasons = unusual_layers(model)
    watch = _Watch(model, reasons)
    modules = dict.fromkeys([model, *watch.names])
    with (
        hooked([(one, watch.leave) for one in modules], before=[(one, watch.enter) for one in modules]),
        watch,
    ):
        yield reasons


@dataclass
class _Call:
    module: nn.Module
    given: Any
    result: Any = None


class _Watch(TorchFunctionMode):
    """Sees who reads the parameters of layers, and what layers return."""

    def __init__(self, model: nn.Module, reasons: dict[str, str]) -> None:
        super().__init__()
        self.names: dict[nn.Module, str] = {
            layer: name for name, layer in model.named_modules() if isinstance(layer, _LAYERS)
        }
        self._reasons = reasons
        self._owners = {value: layer for layer in self.names for value in layer.parameters(recurse=False)}
        self._calls: list[_Call] = []  # of the model, and of the layer that runs

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append(_Call(module, next(iter(call_values(args, kwargs)), None)))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._calls.pop()
        if isinstance(module, _MAPS) and output is not call.result:
            self._note(module, "its forward pass, or a hook on it, is not that of nn.Linear or nn.Conv2d")

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._calls or not tensors_in(output):  # a shape or dtype may be read by all
            return output
        name, values, call = getattr(func, "__name__", ""), call_values(args, kwargs or {}), self._calls[-1]
        own = name in _KERNELS and (values[0] is call.given or not isinstance(call.module, _MAPS))
        if own:
            call.result = output
        elif name in _UNCHANGED and values[0] is call.given:
            call.given = output
        for value in tensors_in(values):
            layer = self._owners.get(value) if isinstance(value, nn.Parameter) else None
            if layer is None or (name in _UNCHANGED and (value is not values[0] or layer is call.module)):
                continue
            if not own or layer is not call.module:
                self._note(layer, f"{name} reads its parameters, beside its own call")
        return output

    def _note(self, layer: nn.Module, reason: str) -> None:
        self._reasons.setdefault(self.names[layer], reason)
