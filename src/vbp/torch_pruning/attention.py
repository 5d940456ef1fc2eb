"""Heads: keep an attention module's own numbers true when its heads or their channels are pruned."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_HEADS = ("num_heads", "num_attention_heads")


_HEAD_DIM = ("head_dim", "attention_head_size")


_WIDTH = ("all_head_size", "attn_dim", "inner_dim", "all_head_dim")


@dataclass(frozen=True)
class HeadChange:
    """Heads and channels of each head of one attention, before and after.

    Attributes:
        layers: Dotted names of its query, key and value layers.
    """

    layers: tuple[str, ...]
    heads: int
    head_dim: int
    heads_left: int
    head_dim_left: int


def refresh_attention_(model: nn.Module, change: HeadChange) -> None:
    """Set the numbers by which the owner of the pruned layers reshapes its tensors, where it keeps them.

    The softmax scale is left alone: one that the module stores stays that of the original head.
    """
    for path in {name.rpartition(".")[0] for name in change.layers}:
        owner = model.get_submodule(path)
        before = (change.heads, change.head_dim, change.heads * change.head_dim)
        after = (change.heads_left, change.head_dim_left, change.heads_left * change.head_dim_left)
        for names, old, new in zip((_HEADS, _HEAD_DIM, _WIDTH), before, after, strict=True):
            for name in names:
                if getattr(owner, name, None) == old:
                    setattr(owner, name, new)
