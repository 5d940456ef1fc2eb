"""Follow the channels of every linear layer through one forward pass.

A forward pass on an example input is the only description of a model that every library shares: timm, Hugging Face
and torchvision name and nest their layers differently, yet all compute `linear -> activation -> linear` and
`softmax(q k) v`. Beside each tensor that comes out of a linear layer runs a tensor of channel ids of the same shape.
Views are applied to it as to the tensor itself; operations on one channel's values leave it as it is; operations
that combine channels one to one couple them; all else is noted as a leak, and leaking channels are never pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from vbp.channels import Channels, columns, compact, distinct, present, respread, varying_dims
from vbp.modes import evaluation_mode
from vbp.operations import (
    ACTIVATIONS,
    ELEMENTWISE,
    POSITIONAL,
    PRODUCTS,
    QUERIES,
    REDUCTIONS,
    RESHAPES,
    SAME,
    VIEWS,
)


@dataclass(frozen=True)
class Read:
    """A linear layer's input: the channel at each of its columns."""

    layer: str
    ids: Tensor


@dataclass
class Attention:
    """One attention call: the channels of queries, keys and values, "heads head_dim" each.

    Attributes:
        implicit_scale: The softmax scale follows from the number of query channels that are left.
        value: None if the values' channels could not be followed.
    """

    query: Tensor
    key: Tensor
    implicit_scale: bool
    value: Tensor | None = None


@dataclass
class Trace:
    """What one forward pass shows."""

    channels: Channels = field(default_factory=Channels)
    reads: list[Read] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)


def is_pointwise_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear map of channels at every position: `Linear`, or an ungrouped 1x1 `Conv2d`."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def is_depthwise(module: nn.Module) -> bool:
    """Say whether a module is a convolution of every channel by itself."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def is_channel_norm(module: nn.Module) -> bool:
    """Say whether a module normalises, with a weight for each channel."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == 1
    return isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm)


def channel_dim(module: nn.Module) -> int:
    """Give the dimension of a layer's input and output that holds the channels, counted from the end."""
    return -3 if isinstance(module, nn.Conv2d) else -1


class _Tracer(TorchFunctionMode):
    """Keeps ids beside tensors, and watches each torch function that receives such a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        named = list(model.named_modules())
        self._linear = {module: name for name, module in named if is_pointwise_linear(module)}
        self._inner = {module: name for name, module in named if is_depthwise(module) or is_channel_norm(module)}
        self._parameters = {parameter: name for name, parameter in model.named_parameters()}
        self._ids: Any = WeakIdKeyDictionary()  # tensor -> ids of the same shape
        self._mixtures: Any = WeakIdKeyDictionary()  # tensor computed across channels -> set of those channels
        self._from_image: Any = WeakIdKeyDictionary()  # tensors computed from the input
        self._inside = 0
        self.trace = Trace()

    # Modules

    def attach(self) -> list[RemovableHandle]:
        handles: list[RemovableHandle] = []
        for module in (*self._linear, *self._inner):
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave))
        return handles

    def mark_input(self, inputs: Iterable[Any]) -> None:
        for leaf in tree_leaves(list(inputs)):
            if isinstance(leaf, Tensor):
                self._from_image[leaf] = True

    def close(self, output: Any) -> None:
        """Count a tensor with channels among the model's outputs as a use of them."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._leak([leaf], "the model's output")

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inside += 1
        name = self._linear.get(module) or self._inner.get(module, "")
        self.trace.calls[name] = self.trace.calls.get(name, 0) + 1
        if module in self._linear and args and isinstance(args[0], Tensor):
            self._read(module, args[0], self._linear[module])

    def _read(self, module: nn.Module, values: Tensor, name: str) -> None:
        if values in self._mixtures:
            self._leak([values], name)
        if values not in self._ids:
            return
        found = columns(self._ids[values], channel_dim(module))
        if found is None:
            self._leak([values], f"{name}, along another dimension")
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
        elif output in self._from_image:
            dim = channel_dim(module)
            owner = self.trace.channels.add("layer", self._linear[module], output.shape[dim])
            ids = torch.arange(owner.first, owner.first + owner.channels, dtype=torch.int32)
            shape = [1] * output.ndim
            shape[dim] = -1
            self._ids[output] = ids.reshape(shape).expand(output.shape)

    def _pass_inner(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Couple a norm's or depthwise convolution's own channels with those that pass through it."""
        if not args or not isinstance(args[0], Tensor) or args[0] not in self._ids:
            if args and isinstance(args[0], Tensor):
                self._leak([args[0]], self._inner[module])
            return
        ids, name = self._ids[args[0]], self._inner[module]
        varying, after = varying_dims(ids), respread(ids, tuple(output.shape))
        found = columns(ids, varying[0]) if len(varying) == 1 else None
        if found is None or after is None or found.numel() != _own_channels(module):
            self._leak([args[0]], name)
            return
        owner = self.trace.channels.add("inner", name, found.numel())
        self.trace.channels.couple(found, torch.arange(owner.first, owner.first + owner.channels, dtype=torch.int32))
        if any(not isinstance(child, nn.Identity) for child in module.children()):
            self.trace.channels.activated.update(present(found))  # timm's norms may hold their activation
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            self.trace.channels.mixed.update(present(found))
        self._ids[output] = after

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
        if any(operand in self._from_image for operand in operands):
            for leaf in tensors:
                self._from_image[leaf] = True
        if not self._inside:
            if any(operand in self._ids for operand in operands):
                if not self._follow(func, name, args, kwargs, operands, output):
                    self._leak(operands, name or "an unnamed operation")
            elif any(operand in self._mixtures for operand in operands):
                self._follow_mixture(name, operands, tensors)
        return output

    def _follow(
        self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, operands: list[Tensor], output: Any
    ) -> bool:
        """Give the output its ids; False if the operation is none that keeps channels apart."""
        if name in PRODUCTS:
            return self._follow_product(name, args, kwargs, output)
        if name in VIEWS or name == "__get__":
            return self._follow_view(func, args, kwargs, output)
        if not isinstance(output, Tensor):
            return False
        tagged = [operand for operand in operands if operand in self._ids]
        ids = self._ids[tagged[0]]
        if name in RESHAPES:
            self._ids[output] = compact(ids.reshape(output.shape))
            return True
        if name in SAME and len(tagged) == 1:
            self._ids[output] = ids
            return True
        if name in POSITIONAL and len(tagged) == 1:
            after = respread(ids, tuple(output.shape))
            if after is not None:
                self._ids[output] = after
            return after is not None
        if name in REDUCTIONS and len(tagged) == 1:
            return self._follow_reduction(ids, args, kwargs, output)
        return name in ELEMENTWISE and self._follow_elementwise(name, operands, output)

    def _follow_view(self, func: Callable[..., Any], args: Any, kwargs: Any, output: Any) -> bool:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(leaf not in self._ids and leaf in self._from_image for leaf in leaves):
            return False

        def swap(leaf: Any) -> Any:
            return self._ids[leaf] if isinstance(leaf, Tensor) and leaf in self._ids else leaf

        try:
            views = func(*tree_map(swap, args), **tree_map(swap, kwargs))
        except (RuntimeError, TypeError):
            return False
        for leaf, ids in zip(tree_leaves(output), tree_leaves(views), strict=True):
            if isinstance(leaf, Tensor):
                if not isinstance(ids, Tensor) or ids.shape != leaf.shape or ids.dtype != torch.int32:
                    return False
                self._ids[leaf] = compact(ids)
        return True

    def _follow_reduction(self, ids: Tensor, args: Any, kwargs: Any, output: Tensor) -> bool:
        """Reduce over positions, or, across channels, to a mixture that must come back to the same channels."""
        after = respread(ids, tuple(output.shape))
        if after is None and output.ndim < ids.ndim:
            kept = [dim for dim in range(ids.ndim) if dim not in _reduced_dims(args, kwargs, ids.ndim)]
            if set(varying_dims(ids)) <= set(kept):
                narrow = distinct(ids)
                after = narrow.reshape([narrow.shape[dim] for dim in kept]).expand(output.shape)
        if after is not None:
            self._ids[output] = after
        else:
            self._mixtures[output] = set(present(ids))
        return True

    def _follow_elementwise(self, name: str, operands: list[Tensor], output: Tensor) -> bool:
        channels = self.trace.channels
        with_ids = [self._ids[operand] for operand in operands if operand in self._ids]
        if any(ids.ndim != output.ndim for ids in with_ids):
            return False
        main = max(with_ids, key=lambda ids: distinct(ids).numel())
        spread = respread(main, tuple(output.shape))
        if spread is None:
            return False
        for operand in operands:
            if operand in self._ids:
                ids = self._ids[operand]
                if bool((distinct(ids) != distinct(main)).any()):
                    # A product of two layers' channels is a gate: they stay or go together. A sum is a residual.
                    if name not in ("mul", "mul_", "multiply"):
                        return False
                    channels.couple(ids, main)
            elif operand in self._mixtures:
                if not self._mixtures[operand] <= set(present(main)):
                    return False
                channels.mixed.update(self._mixtures[operand])
            elif not self._neutral(operand, main):
                return False
        if name in ACTIVATIONS:
            channels.activated.update(present(main))
        self._ids[output] = spread
        return True

    def _neutral(self, operand: Tensor, ids: Tensor) -> bool:
        """Say whether an operand treats all channels alike, or is a parameter with one element a channel."""
        if operand.numel() == 1:
            return True
        aligned = operand.reshape((1,) * (ids.ndim - operand.ndim) + tuple(operand.shape))
        varying = varying_dims(ids)
        if all(aligned.shape[dim] == 1 for dim in varying):
            return True
        source = operand if operand in self._parameters else getattr(operand, "_base", None)
        name = self._parameters.get(source) if isinstance(source, nn.Parameter) else None
        if name is None or len(varying) != 1 or operand.numel() != ids.shape[varying[0]]:
            return False
        found = columns(ids, varying[0])
        if found is None:
            return False
        owner = self.trace.channels.add("parameter", name, operand.numel())
        self.trace.channels.couple(found, torch.arange(owner.first, owner.first + owner.channels, dtype=torch.int32))
        return True

    def _follow_product(self, name: str, args: Any, kwargs: Any, output: Any) -> bool:
        """Note `softmax(q k) v`, whether fused or written out as two products."""
        if name == "scaled_dot_product_attention":
            given = (*args, *(kwargs[key] for key in ("query", "key", "value") if key in kwargs))[:3]
            query, key, value = (self._ids.get(tensor) for tensor in given)
            if query is None or key is None or value is None:
                return False
            noted = self._note_attention(query, key.transpose(-2, -1), implicit_scale=kwargs.get("scale") is None)
            return noted and self._mix_positions(value, output)
        left, right = (self._ids.get(tensor) for tensor in args[:2])
        if left is not None and right is not None:
            return self._note_attention(left, right, implicit_scale=False)
        if right is not None and right.ndim == output.ndim:
            return self._mix_positions(right, output)
        return False

    def _mix_positions(self, value: Tensor, output: Tensor) -> bool:
        """The weights of attention mix positions; the channels of the values stay apart."""
        after = respread(value, tuple(output.shape))
        if after is None or value.ndim - 2 in varying_dims(value):
            return False
        self._ids[output] = after
        heads = self._heads(value)
        if self.trace.attentions and self.trace.attentions[-1].value is None:
            self.trace.attentions[-1].value = heads
        return True

    def _note_attention(self, query: Tensor, key: Tensor, *, implicit_scale: bool) -> bool:
        queries, keys = self._heads(query), self._heads(key.transpose(-2, -1))
        if queries is None or keys is None or queries.shape != keys.shape:
            return False
        self.trace.channels.couple(queries, keys)
        self.trace.attentions.append(Attention(queries, keys, implicit_scale))
        return True

    def _heads(self, ids: Tensor) -> Tensor | None:
        """Give the channels of "batch heads tokens head_dim" as "heads head_dim", if they are so."""
        if ids.ndim != 4 or not set(varying_dims(ids)) <= {1, 3}:
            return None
        return ids[0, :, 0, :]

    def _follow_mixture(self, name: str, operands: list[Tensor], outputs: list[Tensor]) -> None:
        mixed: set[int] = set().union(*(self._mixtures.get(operand, set()) for operand in operands))
        if name in ELEMENTWISE | RESHAPES | REDUCTIONS | SAME:
            for output in outputs:
                self._mixtures[output] = mixed
        else:
            self._leak(operands, name)

    def _leak(self, tensors: Iterable[Tensor], reason: str) -> None:
        for tensor in tensors:
            if tensor in self._ids:
                self.trace.channels.leak(self._ids[tensor], reason)
            for identity in self._mixtures.get(tensor, ()):
                self.trace.channels.leaks.setdefault(identity, reason)


def _own_channels(module: nn.Module) -> int:
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0] if len(module.normalized_shape) == 1 else -1
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    return module.num_features


def _reduced_dims(args: Any, kwargs: Any, ndim: int) -> set[int]:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dims is None:
        return set(range(ndim))
    return {dim % ndim for dim in (dims if isinstance(dims, tuple | list) else (dims,))}


def trace_model(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> Trace:
    """Run one forward pass in evaluation mode and report where each linear layer's channels go.

    Args:
        model: Left as it was: its training flags are restored and no hook stays behind.
        example_inputs: A tensor, or the positional arguments of `model.forward`, on the model's device.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    tracer = _Tracer(model)
    handles = tracer.attach()
    try:
        with evaluation_mode(model), torch.no_grad(), tracer:
            tracer.mark_input(inputs)
            output = model(*inputs)
        tracer.close(output)
    finally:
        for handle in handles:
            handle.remove()
    return tracer.trace
