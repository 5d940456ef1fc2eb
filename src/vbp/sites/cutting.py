"""Cut channels out of layers, in place: parameters, their gradients, and the widths that modules record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vbp.sites.layers import groups_of, in_groups, inner_channels, input_channels, output_channels, without_groups
from vbp.sites.site import Site

HeadPart = Literal["all", "mlp", "value", "query_key"]

# The names under which libraries keep the number of heads, the channels of one head, and the channels of all heads;
# the last two also of values, or of queries and keys, alone.
_HEADS = ("num_heads", "num_attention_heads")
_PER_HEAD = ("head_dim", "attention_head_size", "head_size", "dim_head")
_ALL_HEADS = ("attn_dim", "all_head_size", "all_head_dim", "inner_dim")
_OF_VALUES = (("val_dim", "value_head_dim"), ("val_attn_dim", "out_dim"))
_OF_KEYS = (("key_dim", "key_head_dim"), ("key_attn_dim",))


def keep_rows_(layer: nn.Module, kept: Sequence[int]) -> None:
    """Keep some output channels, ascending, of a `Linear` or a convolution; as many in each of its groups."""
    keep_entries_(layer, "weight", kept, 0)
    keep_entries_(layer, "bias", kept, 0)
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(kept))


def keep_columns_(layer: nn.Module, kept: Sequence[int]) -> None:
    """Keep some input channels, ascending, of a `Linear` or a convolution; as many in each of its groups."""
    groups = groups_of(layer)
    if groups == 1:
        keep_entries_(layer, "weight", kept, 1)
    else:
        whole = layer.weight
        assert isinstance(whole, nn.Parameter)
        index = torch.tensor(kept, dtype=torch.long, device=whole.device)

        def part(values: Tensor) -> Tensor:
            return in_groups(without_groups(values, groups).index_select(1, index), groups)

        layer.weight = nn.Parameter(part(whole.detach()), requires_grad=whole.requires_grad)
        if whole.grad is not None:
            layer.weight.grad = part(whole.grad)
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
    if whole.ndim == 4 and whole.is_contiguous(memory_format=torch.channels_last):
        part = part.contiguous(memory_format=torch.channels_last)
    if isinstance(whole, nn.Parameter):
        part = nn.Parameter(part, requires_grad=whole.requires_grad)
        if whole.grad is not None:
            part.grad = whole.grad.index_select(dim, index)
    setattr(owner, name, part)


@dataclass(frozen=True)
class HeadChange:
    """Hold heads and channels of each head of one attention, before and after some of its layers were cut.

    The `part` is what was cut: values, queries and keys, or all of them.
    """

    layers: tuple[str, ...]
    heads: int
    head_dim: int
    heads_left: int
    head_dim_left: int
    part: HeadPart = "all"


def update_attributes_(model: nn.Module, change: HeadChange, *, implicit_scale: bool = False) -> None:
    """Set the numbers by which the owners of the layers that were cut reshape their tensors, where they keep them.

    With `implicit_scale` their `scale`, too: the fused kernel derives its own from the head dimension, and the
    weights are rescaled so that the effective scale stays that of the original.
    """
    before = (change.heads, change.head_dim, change.heads * change.head_dim)
    after = (change.heads_left, change.head_dim_left, change.heads_left * change.head_dim_left)
    for path in {name.rpartition(".")[0] for name in change.layers}:
        owner = model.get_submodule(path)
        for names, old, new in zip((_HEADS, *_names(change.part)), before, after, strict=True):
            for name in names:
                if getattr(owner, name, None) == old:
                    setattr(owner, name, new)
        scale = getattr(owner, "scale", None)
        if implicit_scale and isinstance(scale, float) and abs(scale - change.head_dim**-0.5) < 1e-9:
            owner.scale = change.head_dim_left**-0.5


def _names(part: HeadPart) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the channels of one head, and of all, that a cut of a part concerns."""
    per_head: tuple[str, ...] = _PER_HEAD
    all_heads: tuple[str, ...] = _ALL_HEADS
    for parts, (one, every) in ((("value", "all"), _OF_VALUES), (("query_key", "all"), _OF_KEYS)):
        if part in parts:
            per_head, all_heads = per_head + one, all_heads + every
    return per_head, all_heads


def cut_sites_(model: nn.Module, cuts: Sequence[tuple[Site, Sequence[int]]]) -> None:
    """Keep some channels, ascending, of each site, and the scale of every softmax.

    All rows of a layer are cut at once, and all columns: one layer may make, or read, the channels of several sites.
    """
    rows: dict[str, set[int]] = defaultdict(set)
    for site, kept in cuts:
        if site.implicit_scale:
            _scale_queries_(model, site, (len(kept) / site.hidden) ** 0.5)
        for name, places in site.places:
            rows[name].update(places[index] for index in set(range(site.hidden)) - set(kept))
    for name, gone in rows.items():
        layer = model.get_submodule(name)
        keep_rows_(layer, [row for row in range(output_channels(layer)) if row not in gone])
    for name, channels in removed_from_inner(cuts).items():
        inner = model.get_submodule(name)
        keep_channels_(inner, [channel for channel in range(inner_channels(inner)) if channel not in channels])
    columns: dict[str, set[int]] = defaultdict(set)
    for site, kept in cuts:
        removed = set(range(site.hidden)) - set(kept)
        for name in site.parameters:
            owner, _, attribute = name.rpartition(".")
            dim = model.get_parameter(name).shape.index(site.hidden)
            keep_entries_(model.get_submodule(owner), attribute, kept, dim)
        for reader in site.readers:
            columns[reader.layer].update(reader.first + index for index in removed)
    for name, gone in columns.items():
        layer = model.get_submodule(name)
        keep_columns_(layer, [column for column in range(input_channels(layer)) if column not in gone])
    for site, kept in cuts:
        if site.kind != "mlp":
            layers = (*site.producers, site.consumer) if site.consumer else site.producers
            dims = (site.hidden // site.heads, len(kept) // site.heads)
            change = HeadChange(layers, site.heads, dims[0], site.heads, dims[1], site.kind)
            update_attributes_(model, change, implicit_scale=site.implicit_scale)


def removed_from_inner(cuts: Iterable[tuple[Site, Sequence[int]]]) -> dict[str, set[int]]:
    """Return the channels that norms and depthwise convolutions lose where each site keeps some, by their names."""
    removed: dict[str, set[int]] = defaultdict(set)
    for site, kept in cuts:
        for name, first in site.passed:
            removed[name].update(first + index for index in set(range(site.hidden)) - set(kept))
    return removed


def _scale_queries_(model: nn.Module, site: Site, factor: float) -> None:
    """Scale the queries, so that a softmax whose scale follows from their number keeps that of the dense model."""
    name, places = site.places[0]
    layer = model.get_submodule(name)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            if isinstance(parameter, Tensor):
                parameter[list(places)] *= factor
