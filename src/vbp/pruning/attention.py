"""Keep an attention module's own record of its heads and their channels true after pruning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

# The names under which libraries keep the number of heads, the channels of one head, and the channels of all heads.
_HEADS = ("num_heads", "num_attention_heads")
_PER_HEAD = ("head_dim", "attention_head_size", "head_size", "dim_head")
_ALL_HEADS = ("attn_dim", "all_head_size", "all_head_dim", "inner_dim")


@dataclass(frozen=True)
class HeadChange:
    """Heads and channels of each head of one attention, before and after a cut of these layers, by dotted name."""

    layers: tuple[str, ...]
    heads: int
    head_dim: int
    heads_left: int
    head_dim_left: int


def update_attributes_(model: nn.Module, change: HeadChange, *, implicit_scale: bool = False) -> None:
    """Set the numbers by which the owners of the layers that were cut reshape their tensors, where they keep them.

    With `implicit_scale` their `scale`, too: the fused kernel derives its own from the head dimension, and the
    weights are rescaled so that the effective scale stays that of the original.
    """
    before = (change.heads, change.head_dim, change.heads * change.head_dim)
    after = (change.heads_left, change.head_dim_left, change.heads_left * change.head_dim_left)
    for path in {name.rpartition(".")[0] for name in change.layers}:
        owner = model.get_submodule(path)
        for names, old, new in zip((_HEADS, _PER_HEAD, _ALL_HEADS), before, after, strict=True):
            for name in names:
                if getattr(owner, name, None) == old:
                    setattr(owner, name, new)
        scale = getattr(owner, "scale", None)
        if implicit_scale and isinstance(scale, float) and abs(scale - change.head_dim**-0.5) < 1e-9:
            owner.scale = change.head_dim_left**-0.5
