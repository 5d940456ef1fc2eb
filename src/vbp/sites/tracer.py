"""Follow the channels of every linear layer through one forward pass.

A forward pass on an example input is the only description of a model that every library shares: timm, Hugging Face
and torchvision name and nest their layers differently, yet all compute `linear -> activation -> linear` and
`softmax(q k) v`. Beside each tensor that comes out of a linear layer runs a tensor of channel ids of the same shape.
Views are applied to it as to the tensor itself; operations on one channel's values leave it as it is; operations
that combine channels one to one couple them; all else is noted as a leak, and leaking channels are never pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vbp.runtime.forward import evaluation_mode, hooked
from vbp.sites.channel_ids import columns, present, respread, varying_dims
from vbp.sites.layers import channel_dim, is_channel_norm, is_depthwise, mixes_channels
from vbp.sites.propagation import QUERIES, ChannelFlow, Read, Trace


class _Tracer(TorchFunctionMode):
    """Shows every linear layer, every norm and every torch function that runs to a `ChannelFlow`."""

    def __init__(self, model: nn.Module, *, convolutions: bool) -> None:
        super().__init__()
        named = list(model.named_modules())
        self._linear = {module: name for name, module in named if mixes_channels(module, convolutions=convolutions)}
        self._inner = {module: name for name, module in named if is_depthwise(module) or is_channel_norm(module)}
        parameters = {parameter: name for name, parameter in model.named_parameters()}
        self._inside = 0
        self.flow = ChannelFlow(parameters)
        self.trace = self.flow.trace

    # Modules

    def attached(self) -> AbstractContextManager[None]:
        modules = (*self._linear, *self._inner)
        return hooked([(one, self._leave) for one in modules], before=[(one, self._enter) for one in modules])

    def mark_input(self, inputs: Iterable[Any]) -> None:
        for leaf in tree_leaves(list(inputs)):
            if isinstance(leaf, Tensor):
                self.flow.from_image[leaf] = True

    def close(self, output: Any) -> None:
        """Count a tensor with channels among the model's outputs as a use of them."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.flow.leak([leaf], "the model's output")

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside += 1
        name = self._linear.get(module) or self._inner.get(module, "")
        self.trace.calls[name] = self.trace.calls.get(name, 0) + 1
        if module in self._linear and args and isinstance(args[0], Tensor):
            self._read(module, args[0], self._linear[module])

    def _read(self, module: nn.Module, values: Tensor, name: str) -> None:
        if values in self.flow.mixtures:
            self.flow.leak([values], name)
        if values not in self.flow.ids:
            return
        found = columns(self.flow.ids[values], channel_dim(module))
        if found is None:
            self.flow.leak([values], f"{name}, along another dimension")
            return
        self.trace.reads.append(Read(name, found))
        for identity in present(found):
            self.trace.channels.readers.setdefault(identity, set()).add(name)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside -= 1
        if not isinstance(output, Tensor):
            return
        if module in self._inner:
            self._pass_inner(module, args, output)
        # Tables of positions, masks and the like run through layers too; their channels are not image features.
        elif output in self.flow.from_image:
            dim = channel_dim(module)
            owner = self.trace.channels.add("layer", self._linear[module], output.shape[dim])
            ids = torch.arange(owner.first, owner.first + owner.channels, dtype=torch.int32)
            shape = [1] * output.ndim
            shape[dim] = -1
            self.flow.ids[output] = ids.reshape(shape).expand(output.shape)

    def _pass_inner(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Couple a norm's or depthwise convolution's own channels with those that pass through it."""
        if not args or not isinstance(args[0], Tensor) or args[0] not in self.flow.ids:
            if args and isinstance(args[0], Tensor):
                self.flow.leak([args[0]], self._inner[module])
            return
        ids, name = self.flow.ids[args[0]], self._inner[module]
        varying, after = varying_dims(ids), respread(ids, tuple(output.shape))
        found = columns(ids, varying[0]) if len(varying) == 1 else None
        if found is None or after is None or found.numel() != _own_channels(module):
            self.flow.leak([args[0]], name)
            return
        owner = self.trace.channels.add("inner", name, found.numel())
        self.trace.channels.couple(found, torch.arange(owner.first, owner.first + owner.channels, dtype=torch.int32))
        if any(not isinstance(child, nn.Identity) for child in module.children()):
            self.trace.channels.activated.update(present(found))  # timm's norms may hold their activation
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            self.trace.channels.mixed.update(present(found))
        self.flow.ids[output] = after

    # Functions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not tensors and (name in QUERIES or name == "__get__"):
            return output
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(operand in self.flow.from_image for operand in operands):
            for leaf in tensors:
                self.flow.from_image[leaf] = True
        if not self._inside:
            self.flow.follow(func, name, args, kwargs, operands, output)
        return output


def _own_channels(module: nn.Module) -> int:
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0] if len(module.normalized_shape) == 1 else -1
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    return module.num_features


def trace_model(model: nn.Module, example_inputs: Tensor | tuple[Any, ...], *, convolutions: bool = False) -> Trace:
    """Run one forward pass in evaluation mode and report where each linear layer's channels go.

    Args:
        model: Left as it was: its training flags are restored and no hook stays behind.
        example_inputs: A tensor, or the positional arguments of `model.forward`, on the model's device.
        convolutions: Follow the channels of convolutions with kernels of any size too.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    tracer = _Tracer(model, convolutions=convolutions)
    with tracer.attached(), evaluation_mode(model), torch.no_grad(), tracer:
        tracer.mark_input(inputs)
        output = model(*inputs)
    tracer.close(output)
    return tracer.trace
