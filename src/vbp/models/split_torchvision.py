"""Swin of torchvision, whose attention is one function of its weights, with layers for queries, keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from vbp.models.split_attention import by_heads, split_layer_

# What two positions that the image does not hold side by side lose of their logit.
_APART = -100.0


def can_split(module: nn.Module) -> bool:
    """Return whether a module is an attention of those below."""
    return type(module) in _SPLIT


def split_(module: nn.Module) -> nn.Module:
    """Split an attention in place, and return it."""
    cosine = isinstance(module, ShiftedWindowAttentionV2)
    qkv, heads = module.get_submodule("qkv"), module.num_heads
    assert isinstance(qkv, nn.Linear)
    assert isinstance(heads, int)
    rows, bias = len(qkv.weight), qkv.bias
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    # Swin v2 ignores the bias of its keys.
    split_layer_(module, "qkv", (biases[0], None if cosine else biases[1], biases[2]))
    scale = 1.0 if cosine else (rows // 3 // heads) ** -0.5
    setattr(module, "scale", scale)  # noqa: B010
    setattr(module, "__class__", _SPLIT[type(module)])  # noqa: B010 (no assignment of a class is typed)
    return module


class SplitShiftedWindowAttention(ShiftedWindowAttention):  # type: ignore[misc]
    """Attention inside windows, which every second block shifts."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for images, channels last."""
        images, height, width = x.shape[:3]
        missing = [-extent % window for extent, window in zip((height, width), self.window_size, strict=True)]
        padded = F.pad(x, (0, 0, 0, missing[1], 0, missing[0]))
        extents = padded.shape[1:3]
        shifts = [
            0 if window >= extent else shift
            for extent, window, shift in zip(extents, self.window_size, self.shift_size, strict=True)
        ]
        windows = self._windows(padded.roll([-shift for shift in shifts], (1, 2)))
        q, k, v = (by_heads(layer(windows), self.num_heads) for layer in (self.query, self.key, self.value))
        bias = self.get_relative_position_bias()
        if any(shifts):
            apart = self._apart(extents, shifts, x.device).to(bias.dtype)
            bias = (bias + apart.unsqueeze(1)).repeat(images, 1, 1, 1)
        dropout = self.attention_dropout if self.training else 0.0
        q, k = self._compared(q, k)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.scale)
        output = F.dropout(self.proj(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)
        high, wide = self.window_size
        grid = output.reshape(images, extents[0] // high, extents[1] // wide, high, wide, -1)
        whole = grid.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll(shifts, (1, 2))
        return whole[:, :height, :width].contiguous()

    def _compared(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query, key

    def _windows(self, x: Tensor) -> Tensor:
        """Return "images height width channels" as "windows positions channels"."""
        high, wide = self.window_size
        images, height, width, channels = x.shape
        grid = x.reshape(images, height // high, high, width // wide, wide, channels)
        windows: Tensor = grid.transpose(2, 3).flatten(0, 2).flatten(1, 2)
        return windows

    def _apart(self, extents: Sequence[int], shifts: Sequence[int], device: torch.device) -> Tensor:
        """Return, for each window of an image, what is added to the logits of positions from two sides of it."""
        sides = []
        for extent, window, shift in zip(extents, self.window_size, shifts, strict=True):
            place = torch.arange(extent, device=device)
            sides.append((place >= extent - window).int() + (place >= extent - shift) if shift else 0 * place)
        region = (3 * sides[0][:, None] + sides[1])[None, :, :, None]
        window = self._windows(region).squeeze(-1)
        return _APART * (window[:, :, None] != window[:, None, :])


class SplitShiftedWindowAttentionV2(SplitShiftedWindowAttention, ShiftedWindowAttentionV2):  # type: ignore[misc]
    """The same with cosines of queries and keys."""

    def _compared(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        return F.normalize(query, dim=-1) * scale, F.normalize(key, dim=-1)


_SPLIT: dict[type[nn.Module], type[nn.Module]] = {
    ShiftedWindowAttention: SplitShiftedWindowAttention,
    ShiftedWindowAttentionV2: SplitShiftedWindowAttentionV2,
}
