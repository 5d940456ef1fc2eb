"""Small attentions, each written as some library writes it, and a classifier around one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SIZE = 12, 2, 6


class Interleaved(nn.Module):
    """Queries, keys and values of one layer, head by head; `separate` with sizes of their own."""

    def __init__(self, *, value_size: int = SIZE, separate: bool = False, convolution: bool = False) -> None:
        super().__init__()
        rows = HEADS * (2 * SIZE + value_size)
        self.num_heads, self.key_dim, self.val_dim, self.separate = HEADS, SIZE, value_size, separate
        self.scale = SIZE**-0.5
        self.qkv: nn.Module = nn.Conv2d(WIDTH, rows, 1) if convolution else nn.Linear(WIDTH, rows)
        self.proj: nn.Module = (
            nn.Conv2d(HEADS * value_size, WIDTH, 1) if convolution else nn.Linear(HEADS * value_size, WIDTH)
        )
        self.bias = nn.Parameter(torch.randn(HEADS, 9, 9))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.qkv, nn.Conv2d):
            image = x.transpose(1, 2).unflatten(2, (3, 3))
            qkv = self.qkv(image).view(x.shape[0], self.num_heads, -1, 9)
            q, k, v = self._parts(qkv, 2)
            weights = (q.transpose(-2, -1) @ k * self.scale + self.bias).softmax(-1)
            mixed = (v @ weights.transpose(-2, -1)).reshape(x.shape[0], -1, 3, 3)
            return self.proj(mixed).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]
        q, k, v = self._parts(self.qkv(x).view(x.shape[0], 9, self.num_heads, -1).transpose(1, 2), 3)
        weights = (q @ k.transpose(-2, -1) * self.scale + self.bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(x.shape[0], 9, -1))  # type: ignore[no-any-return]

    def _parts(self, qkv: Tensor, dim: int) -> tuple[Tensor, ...]:
        return qkv.split([self.key_dim, self.key_dim, self.val_dim], dim) if self.separate else qkv.chunk(3, dim)


class Separate(nn.Module):
    """A layer each for keys, queries and values, run in this order, and a function on queries and keys."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.clone) -> None:
        super().__init__()
        self.k, self.q, self.v = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(3))
        self.proj = nn.Linear(HEADS * SIZE, WIDTH)
        self.between, self.scale = between, SIZE**-0.5

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.k, self.q, self.v))
        mixed = F.scaled_dot_product_attention(self.between(q).type_as(v), self.between(k), v, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def rotary(x: Tensor) -> Tensor:
    """Turn the two channels of each frequency by an angle that grows with the position."""
    angles = torch.arange(x.shape[-2])[:, None] / 10 ** torch.arange(x.shape[-1] // 2)
    cos, sin = (part.repeat_interleave(2, -1).to(x) for part in (angles.cos(), angles.sin()))
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


def cosine(x: Tensor) -> Tensor:
    """Return vectors of length 1."""
    return F.normalize(x, dim=-1)


class Classifier(nn.Module):
    """One attention in a residual branch, and a linear head over the mean of the tokens."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, WIDTH, 2, 2), nn.LayerNorm(WIDTH)
        self.attn, self.head = attention, nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = x + self.attn(self.norm(x))
        return self.head(x.mean(1))  # type: ignore[no-any-return]
