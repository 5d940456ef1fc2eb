"""Give attentions layers of their own, in place: the model computes what it did before, and each layer can be pruned.

`nn.MultiheadAttention` and some attentions of timm and torchvision hand their weights to a function, or write the
width of all heads into their code. No channel of theirs can be followed or cut. Split, they have the layers `query`,
`key` and `value`, whose heads may be of any size, and the projection that they had.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

_log = logging.getLogger(__name__)


def split_attention_(model: nn.Module, *, where: Callable[[str], bool] = lambda name: True) -> tuple[str, ...]:
    """Split the attentions of a model that cannot be pruned as they are, in place, and return their names.

    These are `nn.MultiheadAttention`, BEiT, EVA, DINOv3 and Swin v2 of timm, and Swin of torchvision. Their weights
    get other names: those of one layer each for queries, keys and values. `load_pruned` does the same by itself.

    Args:
        model: Any model; nothing else of it changes.
        where: Which of these attentions to split, by name; by default all.

    Example:
        >>> vbp.split_attention_(model)  # an attention of timm's ViT has layers already
        ()
    """
    split: dict[nn.Module, nn.Module] = {}
    names = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module not in split:
            split_ = _splitter(module) if name and where(name) else None
            if split_ is None:
                continue
            split[module] = split_(module)
            names.append(name)
        if split[module] is not module:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, split[module])
    return tuple(names)


def with_split_attention(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose attentions are split, or the model itself if there is none to split."""
    if not any(name and _splitter(module) for name, module in model.named_modules()):
        return model
    copied = copy.deepcopy(model)
    split_attention_(copied)
    return copied


def _splitter(module: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
    """Return the function that gives an attention layers, in place or in a new module; None for all else."""
    if type(module) is nn.MultiheadAttention:
        if module.bias_k is not None or module.add_zero_attn or parametrize.is_parametrized(module):
            _log.info("an attention with extra keys, or whose weights are computed, stays as it is")
            return None
        return SplitMultiheadAttention
    # What is not imported cannot be in the model.
    if "timm" in sys.modules:
        from vbp.models import split_timm

        if split_timm.can_split(module):
            return split_timm.split_
    if "torchvision.models.swin_transformer" in sys.modules:
        from vbp.models import split_torchvision

        if split_torchvision.can_split(module):
            return split_torchvision.split_
    return None


def layer_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a layer with a copy of these weights, and no random number drawn."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    learns = weight.requires_grad
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=learns)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=learns)
    return layer


def split_layer_(module: nn.Module, name: str, biases: Sequence[Tensor | None]) -> None:
    """Put the layers `query`, `key` and `value` in the place of one that has their rows, one after the other."""
    weights = module.get_submodule(name).get_parameter("weight").chunk(3)
    for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        setattr(module, part, layer_of(weight, bias))
    delattr(module, name)


def by_heads(values: Tensor, heads: int) -> Tensor:
    """Return "batch tokens channels" as "batch heads tokens size"."""
    return values.reshape(*values.shape[:-1], heads, -1).transpose(1, 2)


class SplitMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` with a layer each for queries, keys and values; called in the same way."""

    # `nn.TransformerEncoderLayer` looks at these before it takes its fused path, which reads weights of one width.
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        assert isinstance(attention, nn.MultiheadAttention)
        whole = attention.in_proj_weight
        parts = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        bias = attention.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        layers = map(layer_of, parts if whole is None else whole.chunk(3), biases)
        self.query, self.key, self.value = layers
        self.out_proj = layer_of(attention.out_proj.weight, attention.out_proj.bias)
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.scale = attention.head_dim**-0.5
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, if asked for, the weights; a causal attention needs its mask all the same."""
        single = query.ndim == 2
        given = (query, key, value)
        if single:
            given = (query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0))
        elif not self.batch_first:
            given = (query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
        layers = (self.query, self.key, self.value)
        q, k, v = (by_heads(layer(one), self.num_heads) for layer, one in zip(layers, given, strict=True))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) * self.scale
            weights = F.dropout((logits if mask is None else logits + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if single:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
        """Return what is added to the logits, or None."""
        masks = []
        if attn_mask is not None:
            mask = _added(attn_mask, query)
            masks.append(mask.reshape(-1, self.num_heads, *mask.shape[1:]) if mask.ndim == 3 else mask)
        if padding is not None:
            masks.append(_added(padding, query).reshape(-1, 1, 1, padding.shape[-1]))
        return sum(masks[1:], masks[0]) if masks else None


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as numbers to add: minus infinity in the place of True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
    return mask.to(like.dtype)
