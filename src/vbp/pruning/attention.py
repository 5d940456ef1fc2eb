"""Keep an attention module's own record of its head dimension true after pruning."""

from __future__ import annotations

from torch import nn

from vbp.pruning.plan import SitePlan

# Under these names timm and Hugging Face keep the channels of one head, and of all heads.
_PER_HEAD = ("head_dim", "attention_head_size", "head_size", "dim_head")


_ALL_HEADS = ("attn_dim", "all_head_size", "inner_dim")


def update_attributes_(model: nn.Module, entry: SitePlan) -> None:
    """Set head dimension, their sum over heads and the softmax scale to what is left after a plan.

    `scale` is set only where the fused kernel derives its own from the head dimension, whose weights are rescaled so
    that the effective scale stays that of the original; elsewhere the module's scale is used and stays.

    Args:
        model: The model, already cut.
        entry: The plan of one value or query/key site.
    """
    site = entry.site
    before, after = site.hidden // site.heads, len(entry.keep) // site.heads
    layers = (*site.producers, site.consumer) if site.consumer else site.producers
    for name in {layer.rpartition(".")[0] for layer in layers}:
        module = model.get_submodule(name)
        for names, old, new in (
            (_PER_HEAD, before, after),
            (_ALL_HEADS, site.hidden, len(entry.keep)),
        ):
            for attribute in names:
                if getattr(module, attribute, None) == old:
                    setattr(module, attribute, new)
        scale = getattr(module, "scale", None)
        if site.implicit_scale and isinstance(scale, float) and abs(scale - before**-0.5) < 1e-9:
            module.scale = after**-0.5
