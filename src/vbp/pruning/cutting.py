"""Cut channels out of one layer, in place: its parameters, their gradients, and the widths that it records."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def keep_rows_(layer: nn.Module, kept: Sequence[int]) -> None:
    """Keep some output channels, ascending, of a `Linear` or an ungrouped convolution."""
    keep_entries_(layer, "weight", kept, 0)
    keep_entries_(layer, "bias", kept, 0)
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(kept))


def keep_columns_(layer: nn.Module, kept: Sequence[int]) -> None:
    """Keep some input channels, ascending, of a `Linear` or an ungrouped convolution."""
    keep_entries_(layer, "weight", kept, 1)
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(kept))


def keep_channels_(module: nn.Module, kept: Sequence[int]) -> None:
    """Keep some channels, ascending, of a layer with as many outputs as inputs: a norm, or a depthwise convolution.

    A `LayerNorm` loses channels of its last dimension.
    """
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(module, name, None) is not None:
            keep_entries_(module, name, kept, -1 if isinstance(module, nn.LayerNorm) else 0)
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (*module.normalized_shape[:-1], len(kept))
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(kept)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = len(kept)
    else:
        assert isinstance(module, nn.modules.conv._ConvNd)
        module.in_channels = module.out_channels = module.groups = len(kept)


def keep_entries_(owner: nn.Module, name: str, kept: Sequence[int], dim: int) -> None:
    """Keep some entries of a module's parameter or buffer along one dimension; one that is None stays so."""
    whole = getattr(owner, name)
    if whole is None:
        return
    index = torch.tensor(kept, dtype=torch.long, device=whole.device)
    part: Tensor = whole.detach().index_select(dim, index)
    if isinstance(whole, nn.Parameter):
        part = nn.Parameter(part, requires_grad=whole.requires_grad)
        if whole.grad is not None:
            part.grad = whole.grad.index_select(dim, index)
    setattr(owner, name, part)
