"""What a layer does to channels: how many it reads and makes, along which dimension, mixed or one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


def mixes_channels(module: nn.Module, *, convolutions: bool) -> bool:
    """Return whether a module is a linear map of all channels, or of each of some groups: `Linear` or `Conv2d`.

    Without `convolutions` only 1x1 kernels without groups count, which map every position by itself.
    """
    if isinstance(module, nn.Conv2d):
        if convolutions:
            return not is_depthwise(module)
        return module.groups == 1 and module.kernel_size == (1, 1)
    return isinstance(module, nn.Linear)


def maps_positions(module: nn.Module) -> bool:
    """Return whether a module is a linear map of all channels that reads one position for each that it makes."""
    if isinstance(module, nn.Conv2d) and (module.stride != (1, 1) or module.padding not in {(0, 0), "valid", "same"}):
        return False
    return mixes_channels(module, convolutions=False)


def is_depthwise(module: nn.Module) -> bool:
    """Return whether a module is a convolution of every channel by itself."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def is_channel_norm(module: nn.Module) -> bool:
    """Return whether a module normalises, with a weight for each channel."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == 1
    return isinstance(module, _BatchNorm | nn.LayerNorm)


def channel_dim(layer: nn.Module) -> int:
    """Return the dimension of a layer's input and output that holds the channels, counted from the end."""
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


def output_channels(layer: nn.Module) -> int:
    """Return the number of output channels of a `Linear` or convolution."""
    return int(getattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels"))


def input_channels(layer: nn.Module) -> int:
    """Return the number of input channels of a `Linear` or convolution."""
    return int(getattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels"))


def inner_channels(module: nn.Module) -> int:
    """Return the number of channels of a norm, or of a depthwise convolution; -1 if it has no plain number."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0] if len(module.normalized_shape) == 1 else -1
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    assert isinstance(module, _BatchNorm)
    return module.num_features


def groups_of(layer: nn.Module) -> int:
    """Return the number of groups of outputs that read a group of inputs each; 1 for all but grouped convolutions."""
    return int(getattr(layer, "groups", 1))


def silence_columns_(layer: nn.Module, columns: Sequence[int]) -> None:
    """Set the weights that read some input channels of a `Linear` or convolution to 0."""
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach().unflatten(0, (groups_of(layer), -1))  # type: ignore[no-untyped-call]
    index = torch.tensor(columns, dtype=torch.long, device=weight.device)
    weight[index // weight.shape[2], :, index % weight.shape[2]] = 0


def without_groups(
    weight: Float[Tensor, "out hidden_per_group *kernel"], groups: int
) -> Float[Tensor, "out hidden *kernel"]:
    """Return a weight with a column for every channel: 0 where an output's group does not read it."""
    if groups == 1:
        return weight
    out, width, *kernel = weight.shape
    whole = weight.new_zeros(groups, out // groups, groups, width, *kernel)
    own = torch.arange(groups, device=weight.device)
    whole[own, :, own] = weight.reshape(groups, out // groups, width, *kernel)
    return whole.reshape(out, groups * width, *kernel)


def in_groups(
    weight: Float[Tensor, "out hidden *kernel"], groups: int
) -> Float[Tensor, "out hidden_per_group *kernel"]:
    """Return the columns that each output's group reads: what `without_groups` takes."""
    if groups == 1:
        return weight
    out, hidden, *kernel = weight.shape
    own = torch.arange(groups, device=weight.device)
    parts = weight.reshape(groups, out // groups, groups, hidden // groups, *kernel)[own, :, own]
    return parts.reshape(out, hidden // groups, *kernel)


def first_tensor(output: Any) -> Tensor | None:
    """Return a module's output, or the first of several; None if that is no tensor."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def rows(values: Tensor, dim: int, images: int) -> Float[Tensor, "images positions channels"]:
    """Return values image by image, channels last."""
    return values.movedim(dim, -1).reshape(images, -1, values.shape[dim])


def reads(layer: nn.Module, values: Tensor, output: Tensor) -> Iterator[Tensor]:
    """Return what an ungrouped layer reads at each position of its output, for each offset of its kernel.

    Padding is read as the layer pads. A layer of single positions has one offset.
    """
    if not isinstance(layer, nn.Conv2d) or (layer.kernel_size == (1, 1) and layer.stride == (1, 1)):
        yield values
        return
    extents, sides = [], list[int]()
    for dim in (1, 0):
        place = dim - 2
        extent = layer.stride[dim] * (output.shape[place] - 1) + 1
        missing = extent + layer.dilation[dim] * (layer.kernel_size[dim] - 1) - values.shape[place]
        given = 0 if isinstance(layer.padding, str) else int(layer.padding[dim])
        # Without a number the layer pads as much as its output needs, at the end by one more if it is odd.
        before = given or max(0, missing) // 2
        extents.append(extent)
        sides += [before, max(0, missing - before)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(values, sides, mode=mode) if any(sides) else values
    width, height = extents
    for row in range(0, layer.kernel_size[0] * layer.dilation[0], layer.dilation[0]):
        for column in range(0, layer.kernel_size[1] * layer.dilation[1], layer.dilation[1]):
            part = padded[..., row : row + height, column : column + width]
            yield part[..., :: layer.stride[0], :: layer.stride[1]]


_OWN = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def unusual_layers(model: nn.Module) -> dict[str, str]:
    """Return the layers and bare parameters, by name, that cannot be cut by their `weight` and `bias`, and why.

    That a layer is an `nn.Linear` says nothing about its weight: it may be computed from others (a parametrization, a
    mask, quantisation), have an adapter beside it, or be the parameter of another module, too.
    """
    reasons: dict[str, str] = {}
    owned = [(name, *one) for name, module in model.named_modules() for one in module.named_parameters(recurse=False)]
    # Views of one memory are one parameter.
    places = [value.data_ptr() or id(value) for _, _, value in owned]
    owners = Counter(places)
    for (module, name, _), place in zip(owned, places, strict=True):
        if owners[place] > 1:
            reasons[module] = reasons[f"{module}.{name}".lstrip(".")] = f"its {name} is a parameter elsewhere, too"
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) or is_channel_norm(layer):
            held = {*dict(layer.named_parameters()), *dict(layer.named_buffers())}
            if extra := sorted(held - _OWN):
                reasons[name] = f"it holds {', '.join(extra)} beside its weight and bias"
            elif layer.weight is not None and type(layer.weight) is not nn.Parameter:
                reasons[name] = f"its weight is a {type(layer.weight).__name__}"
        elif type(layer).__module__.startswith("torch.ao.nn.") and {"weight", "_packed_params"} <= set(dir(layer)):
            reasons[name] = "its weight is quantised"
    return reasons


def unusual_layer(name: str, reason: str) -> str:
    """Return the sentence about a layer that is unusual, with the remedy."""
    return (
        f"{name} cannot be pruned by its own weight and bias: {reason}; make it a plain layer first (merge what "
        "computes its weight, untie by a copy), or leave it out"
    )
