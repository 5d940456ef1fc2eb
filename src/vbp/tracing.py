"""Follow the output channels of linear layers through one forward pass.

A forward pass on an example input is the only description of a model that every library shares: timm,
Hugging Face and torchvision name and nest their layers differently, yet all of them compute
`linear -> activation -> linear`. The tracer tags the output of each linear layer with the layer's name, carries
the tag through operations that treat every channel by itself, and notes which layer reads it in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from vbp.modes import evaluation_mode

# Functions of one channel's value alone, by the name that Python, torch and torch.nn.functional share.
ACTIVATIONS = frozenset(
    "celu elu elu_ erf exp gelu hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ leaky_relu "
    "leaky_relu_ logsigmoid mish relu relu_ relu6 selu selu_ sigmoid sigmoid_ silu silu_ softplus softsign "
    "square tanh tanh_ pow pow_ clamp clamp_".split()
)
ELEMENTWISE = ACTIVATIONS | frozenset(
    "add add_ alpha_dropout clone contiguous div div_ double dropout dropout_ feature_alpha_dropout float half "
    "bfloat16 identity mul mul_ neg rsub sub sub_ to true_divide type_as".split()
)
# Questions about a tensor: they read no values.
QUERIES = frozenset(
    "__get__ __len__ dim size stride numel nelement is_contiguous is_floating_point is_complex element_size "
    "type get_device data_ptr ndimension requires_grad_ __hash__ __repr__ __bool__ is_same_size".split()
)


@dataclass
class Flow:
    """What became of one layer's output channels during the traced forward pass."""

    producer: str
    consumers: list[str] = field(default_factory=list)
    activated: bool = False
    leaks: list[str] = field(default_factory=list)  # operations that use the channels in another way


@dataclass(frozen=True)
class Trace:
    """The flows of a model, in the order in which the layers ran, and how often each layer ran."""

    flows: tuple[Flow, ...]
    calls: dict[str, int]


def is_pointwise_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear map of channels at every position: `Linear`, or an ungrouped 1x1 `Conv2d`."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def channel_dim(module: nn.Module) -> int:
    """Give the dimension of a layer's input and output that holds the channels, counted from the end."""
    return -3 if isinstance(module, nn.Conv2d) else -1


class _FlowTracer(TorchFunctionMode):
    """Tags the outputs of linear layers and watches each torch function that receives a tagged tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules() if is_pointwise_linear(module)}
        self._tags = WeakIdKeyDictionary()  # tensor -> (flow, channel dimension)
        self._from_image = WeakIdKeyDictionary()  # tensors computed from the input
        self._inside_layer = 0
        self.flows: list[Flow] = []
        self.calls: dict[str, int] = {}

    def attach(self) -> list[RemovableHandle]:
        handles: list[RemovableHandle] = []
        for module in self._names:
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave))
        return handles

    def mark_input(self, inputs: Iterable[Any]) -> None:
        for leaf in tree_leaves(list(inputs)):
            if isinstance(leaf, Tensor):
                self._from_image[leaf] = True

    def close(self, output: Any) -> None:
        """Count a tagged tensor among the model's outputs as a use of its channels."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf in self._tags:
                self._tags[leaf][0].leaks.append("model output")

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self._names[module]
        self.calls[name] = self.calls.get(name, 0) + 1
        if args and isinstance(args[0], Tensor) and args[0] in self._tags:
            flow, dim = self._tags[args[0]]
            if dim == channel_dim(module):
                flow.consumers.append(name)
            else:
                flow.leaks.append(f"{name} reads another dimension")
        self._inside_layer += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside_layer -= 1
        # Tables of positions, masks and the like run through layers too; their channels are not image features.
        if isinstance(output, Tensor) and output in self._from_image:
            flow = Flow(self._names[module])
            self.flows.append(flow)
            self._tags[output] = (flow, channel_dim(module))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in QUERIES:
            return output
        operands = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if any(operand in self._from_image for operand in operands):
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor):
                    self._from_image[leaf] = True
        if not self._inside_layer:
            self._follow(name, operands, output)
        return output

    def _follow(self, name: str, operands: list[Tensor], output: Any) -> None:
        tags = [self._tags[operand] for operand in operands if operand in self._tags]
        if not tags:
            return
        flow, dim = tags[0]
        same = all(tag[0] is flow and tag[1] == dim for tag in tags)
        others_are_scalars = all(operand in self._tags or operand.numel() == 1 for operand in operands)
        if name in ELEMENTWISE and same and others_are_scalars and isinstance(output, Tensor):
            flow.activated = flow.activated or name in ACTIVATIONS
            self._tags[output] = (flow, dim)
            return
        for tag in tags:
            tag[0].leaks.append(name or "an unnamed operation")


def trace_flows(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> Trace:
    """Run one forward pass in evaluation mode and report where each linear layer's output channels go.

    Args:
        model: Left as it was: its training flag is restored and no hook stays behind.
        example_inputs: A tensor, or the positional arguments of `model.forward`, on the model's device.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    tracer = _FlowTracer(model)
    handles = tracer.attach()
    try:
        with evaluation_mode(model), torch.no_grad(), tracer:
            tracer.mark_input(inputs)
            output = model(*inputs)
        tracer.close(output)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(tuple(tracer.flows), tracer.calls)
