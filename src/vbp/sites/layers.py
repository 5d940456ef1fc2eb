"""What a layer does to channels: how many it reads and makes, along which dimension, mixed or one by one."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


def mixes_channels(module: nn.Module, *, convolutions: bool) -> bool:
    """Return whether a module is a linear map of all channels: `Linear`, or an ungrouped `Conv2d`.

    Without `convolutions` only 1x1 kernels count, which map every position by itself.
    """
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and (convolutions or module.kernel_size == (1, 1))
    return isinstance(module, nn.Linear)


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
    return _input_and_output_channels(layer)[1]


def input_channels(layer: nn.Module) -> int:
    """Return the number of input channels of a `Linear` or convolution."""
    return _input_and_output_channels(layer)[0]


def _input_and_output_channels(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, _ConvNd):
        return layer.in_channels, layer.out_channels
    raise TypeError(f"layer must be Linear or a convolution, got {type(layer).__name__}")


def first_tensor(output: Any) -> Tensor | None:
    """Return a module's output, or the first of several; None if that is no tensor."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def rows(values: Tensor, dim: int, images: int) -> Float[Tensor, "images positions channels"]:
    """Return values image by image, channels last."""
    return values.movedim(dim, -1).reshape(images, -1, values.shape[dim])
