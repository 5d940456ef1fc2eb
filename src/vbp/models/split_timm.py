"""Attentions of timm that write the width of all heads into their code, with layers for queries, keys and values."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn

from vbp.models.split_attention import by_heads, split_layer_


def can_split(module: nn.Module) -> bool:
    """Return whether a module is an attention of those below."""
    return type(module) in _SPLIT


def split_(module: nn.Module) -> nn.Module:
    """Split an attention in place, and return it."""
    assert isinstance(module, BeitAttention | EvaAttention | WindowAttention)
    if isinstance(module, EvaAttention) and module.qkv is None:  # it has layers already
        for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            setattr(module, part, getattr(module, name))
            setattr(module, name, None)
    else:
        # The bias of the keys is a buffer of zeros.
        split_layer_(module, "qkv", (module.q_bias, None, module.v_bias))
        for name in ("q_bias", "k_bias", "v_bias"):
            setattr(module, name, None)
    setattr(module, "__class__", _SPLIT[type(module)])  # noqa: B010 (no assignment of a class is typed)
    return module


def _parts(module: nn.Module, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (by_heads(module.get_submodule(name)(x), heads) for name in ("query", "key", "value"))
    return query, key, value


class SplitBeitAttention(BeitAttention):
    """BEiT's attention: a bias for each pair of positions, of its own or of all blocks."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Return the output."""
        q, k, v = _parts(self, x, self.num_heads)
        biases = [] if self.relative_position_bias_table is None else [self._get_rel_pos_bias()]
        biases += [] if shared_rel_pos_bias is None else [shared_rel_pos_bias]
        bias = sum(biases[1:], biases[0]) if biases else None
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.scale)
        output: Tensor = self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        return output


class SplitEvaAttention(EvaAttention):
    """The attention of EVA and DINOv3: rotary embeddings, and norms, a gate or neither."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the output."""
        q, k, v = _parts(self, x, self.num_heads)
        q, k = (self._turned(one, rope).to(v.dtype) for one in (self.q_norm(q), self.k_norm(k)))
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
        )
        mixed = self.norm(mixed.transpose(1, 2).flatten(2))
        if self.gate is not None:
            mixed = mixed * self.get_submodule("gate")(x).sigmoid()
        output: Tensor = self.proj_drop(self.proj(mixed))
        return output

    def _turned(self, values: Tensor, rope: Tensor | None) -> Tensor:
        if rope is None:
            return values
        prefix, rest = values.tensor_split([self.num_prefix_tokens], 2)
        return torch.cat([prefix, apply_rot_embed_cat(rest, rope, half=self.rotate_half)], 2)


class SplitWindowAttention(WindowAttention):
    """Swin v2's attention in a window: cosines of queries and keys, and a bias that a small MLP computes."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the output for windows; `mask` has one entry for each window of an image."""
        q, k, v = _parts(self, x, self.num_heads)
        table = self.cpb_mlp(self.get_buffer("relative_coords_table")).view(-1, self.num_heads)
        tokens = x.shape[1]
        bias = table[self.get_buffer("relative_position_index").view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        bias = (16 * bias.sigmoid()).unsqueeze(0)
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v, attn_mask=bias, dropout_p=dropout, scale=1.0
        )
        output: Tensor = self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        return output


_SPLIT: dict[type[nn.Module], type[nn.Module]] = {
    BeitAttention: SplitBeitAttention,
    EvaAttention: SplitEvaAttention,
    WindowAttention: SplitWindowAttention,
}
