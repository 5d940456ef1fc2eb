"""A small transformer whose attention keeps its widths under names of one's choice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Per head and of all heads, as timm and Hugging Face name them.
ATTENTION_NAMES = [
    ("head_dim", "all_head_dim"),
    ("dim_head", "inner_dim"),
    ("attention_head_size", "all_head_size"),
    ("head_size", "attn_dim"),
]


class NamedAttention(nn.Module):
    """Self-attention that reshapes by the widths that it keeps."""

    def __init__(self, per_head: str, all_heads: str, dim: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.names = heads, (per_head, all_heads)
        setattr(self, per_head, dim // heads)
        setattr(self, all_heads, dim)
        self.scale = (dim // heads) ** -0.5
        self.query, self.key, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix the tokens."""
        size, width = (getattr(self, name) for name in self.names)
        query, key, value = (
            layer(tokens).reshape(*tokens.shape[:2], self.num_heads, size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = (query @ key.transpose(-2, -1) * self.scale).softmax(-1) @ value
        return self.proj(mixed.transpose(1, 2).reshape(*tokens.shape[:2], width))  # type: ignore[no-any-return]


class NamedTransformer(nn.Module):
    """One block of attention between a layer of patches and a head."""

    def __init__(self, per_head: str, all_heads: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 24), nn.Linear(24, 5)
        self.attn = NamedAttention(per_head, all_heads)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images, a token a pixel."""
        tokens = self.embed(images.flatten(2).transpose(1, 2))
        return self.head((tokens + self.attn(tokens)).mean(1))  # type: ignore[no-any-return]


def named_transformer(names: tuple[str, str]) -> tuple[NamedTransformer, Tensor]:
    """Return such a model in float64, and images."""
    torch.manual_seed(0)
    return NamedTransformer(*names).double().eval(), torch.randn(4, 3, 4, 4, dtype=torch.float64)
