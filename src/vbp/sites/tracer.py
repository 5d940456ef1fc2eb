"""Follow the channels of every linear layer through one forward pass.

A forward pass on an example input is the only description of a model that every library shares: timm, Hugging Face
and torchvision name and nest their layers differently, yet all compute `linear -> activation -> linear` and
`softmax(q k) v`. Beside each tensor that comes out of a linear layer runs a tensor of channel ids of the same shape.
Views are applied to it as to the tensor itself; operations on one channel's values leave it as it is; operations
that combine channels one to one couple them; all else is noted as a leak, and leaking channels are never pruned.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import BaseTorchDispatchMode

from vbp.errors import InputError, first_line
from vbp.runtime.forward import ExampleInputs, call_values, evaluation_mode, hooked, run_model, training_paths
from vbp.sites.channel_ids import columns, present, respread, varying_dims
from vbp.sites.layers import (
    channel_dim,
    inner_channels,
    is_channel_norm,
    is_depthwise,
    mixes_channels,
    unusual_layers,
)
from vbp.sites.propagation import QUERIES, SAME, ChannelFlow, Read, Trace, tensors_in

_log = logging.getLogger(__name__)


@dataclass
class _Call:
    """A call of a layer: what it was given, and what the kernel that it ran on it returned."""

    module: nn.Module | None
    given: Any
    result: Any = None


class _Tracer(TorchFunctionMode):
    """Shows every linear layer, every norm and every torch function that runs to a `ChannelFlow`."""

    def __init__(self, model: nn.Module, *, convolutions: bool) -> None:
        super().__init__()
        named = list(model.named_modules())
        self._linear = {module: name for name, module in named if mixes_channels(module, convolutions=convolutions)}
        self._inner = {module: name for name, module in named if is_depthwise(module) or is_channel_norm(module)}
        parameters = {parameter: name for name, parameter in model.named_parameters()}
        self._names = self._linear | self._inner
        self._owners = {parameter: module for module in self._names for parameter in module.parameters(recurse=False)}
        self.flow = ChannelFlow(parameters)
        self.trace = self.flow.trace
        self.trace.unusual = unusual_layers(model)

    def run(self, model: nn.Module, inputs: ExampleInputs) -> None:
        hooks = hooked(
            [(one, self._leave) for one in self._names], before=[(one, self._enter) for one in self._names]
        )
        self._calls: list[_Call] = []
        # The dispatch mode repeats what runs outside of Python, such as TorchScript, where this mode sees it.
        with hooks, torch.no_grad(), self, BaseTorchDispatchMode():  # type: ignore[no-untyped-call]
            for leaf in tensors_in(inputs):
                self.flow.from_image[leaf] = True
            output = run_model(model, inputs)
        self.flow.leak(tensors_in(output), "the model's output")

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values, name = call_values(args, kwargs), self._names[module]
        self._calls.append(_Call(module, next(iter(values), None)))
        self.trace.calls[name] = self.trace.calls.get(name, 0) + 1
        if module in self._linear and values and isinstance(values[0], Tensor):
            self._read(module, values[0], self._linear[module])

    def _read(self, module: nn.Module, values: Tensor, name: str) -> None:
        if values in self.flow.mixtures:
            self.flow.leak([values], name)
        if values not in self.flow.ids:
            return
        channels = columns(self.flow.ids[values], channel_dim(module))
        if channels is None:
            self.flow.leak([values], f"{name}, along another dimension")
            return
        self.trace.reads.append(Read(name, channels))
        for identity in present(channels):
            self.trace.channels.readers.setdefault(identity, set()).add(name)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._calls.pop().result is not output and module in self._linear:
            self.trace.unusual.setdefault(
                self._names[module], "its forward pass, or a hook on it, is not that of nn.Linear or nn.Conv2d"
            )
        if not isinstance(output, Tensor):
            return
        if module in self._inner:
            self._pass_inner(module, args, output)
        # Tables of positions, masks and the like run through layers too; their channels are not image features.
        elif output in self.flow.from_image:
            dim = channel_dim(module)
            ids = self.trace.channels.add("layer", self._linear[module], output.shape[dim])
            shape = [1] * output.ndim
            shape[dim] = -1
            self.flow.ids[output] = ids.reshape(shape).expand(output.shape)

    def _pass_inner(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Couple a norm's or depthwise convolution's own channels with those that pass through it."""
        if not args or not isinstance(args[0], Tensor):
            return
        name = self._names[module]
        if args[0] not in self.flow.ids:
            self.flow.leak([args[0]], name)
            return
        ids = self.flow.ids[args[0]]
        varying, after = varying_dims(ids), respread(ids, tuple(output.shape))
        own = columns(ids, varying[0]) if len(varying) == 1 else None
        if own is None or after is None or own.numel() != inner_channels(module):
            self.flow.leak([args[0]], name)
            return
        channels = self.trace.channels
        channels.couple(own, channels.add("inner", name, own.numel()))
        if any(not isinstance(child, nn.Identity) for child in module.children()):
            channels.activated.update(present(own))  # timm's norms may hold their activation
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            channels.mixed.update(present(own))
        self.flow.ids[output] = after

    def _watch(self, name: str, values: tuple[Any, ...], output: Any) -> None:
        """Note a layer whose parameters are read by anything but the one kernel that it runs on its own input."""
        call, first = (self._calls or [_Call(None, None)])[-1], next(iter(values), None)
        own = name in _KERNELS and (first is call.given or call.module not in self._linear)
        if own:
            call.result = output
        elif name in _UNCHANGED and first is call.given:
            call.given = output
        for value in tensors_in(values):
            layer = self._owners.get(value) if isinstance(value, nn.Parameter) else None
            cast = name in _UNCHANGED and (value is not first or layer is call.module)
            if layer is not None and not cast and not (own and layer is call.module):
                self.trace.unusual.setdefault(self._names[layer], f"{name} reads its parameters, beside its own call")

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "").partition(".")[0]
        tensors = tensors_in(output)
        if not tensors and (name in QUERIES or name == "__get__"):
            return output
        operands = tensors_in((args, kwargs))
        if any(operand in self.flow.from_image for operand in operands):
            for leaf in tensors:
                self.flow.from_image[leaf] = True
        if tensors:
            self._watch(name, call_values(args, kwargs), output)
        if not self._calls:
            self.flow.follow(func, name, args, kwargs, operands, output)
        return output


_KERNELS = frozenset("linear conv2d batch_norm layer_norm group_norm".split())
_UNCHANGED = SAME | {"pad"}


def trace_model(model: nn.Module, example_inputs: ExampleInputs, *, convolutions: bool = False) -> Trace:
    """Run the model in evaluation and in training mode, and return where each linear layer's channels go.

    What only training does with the channels, as an auxiliary head, is added to what evaluation shows. With
    `convolutions` the channels of convolutions with kernels of any size are followed too.
    """
    tracer = _Tracer(model, convolutions=convolutions)
    with evaluation_mode(model):
        try:
            tracer.run(model, example_inputs)
        except InputError:
            raise
        except (RuntimeError, NotImplementedError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise InputError(
                f"the model must run on example_inputs, got {type(error).__name__} in {type(model).__name__}: "
                f"{first_line(error)}; give an input as in use, on the device of the model, and whole weights"
            ) from error
    trace = dataclasses.replace(tracer.trace, reads=[*tracer.trace.reads], attentions=[*tracer.trace.attentions])
    trace.calls, tracer.trace.calls = tracer.trace.calls, {}
    try:
        with training_paths(model):
            tracer.run(model, example_inputs)
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError) as error:
        _log.warning(
            "%s does not run in training mode on the example (%s): what only training does with its channels is not "
            "seen", type(model).__name__, first_line(error),
        )  # fmt: skip
    trace.calls.update({name: count for name, count in tracer.trace.calls.items() if count > 1})
    return trace
