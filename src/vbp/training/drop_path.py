"""Leave out residual branches at random while a model is trained (stochastic depth)."""

from __future__ import annotations

from typing import cast

from torch import nn

from vbp.errors import InputError


def check_drop_path(rate: float, model: nn.Module | None = None) -> None:
    """Raise InputError if residual branches cannot be left out at this rate, of a model if given."""
    if not 0 <= rate < 1:
        raise InputError(f"drop_path must be in [0, 1), got {rate}; 0.1 is usual")
    if rate > 0 and model is not None and not _places(model):
        raise InputError(
            f"drop_path needs a model whose residual branches have a place for it, got {type(model).__name__}, in "
            "which there is none; leave --drop_path out"
        )


def set_drop_path_(model: nn.Module, rate: float) -> None:
    """Leave out the residual branches of a block at a rate that rises from 0 in the first to `rate` in the last one.

    The model has other modules in the places that its library keeps for this, and no other weights; in evaluation
    mode it computes what it did.

    Raises:
        InputError: The model has no such place, or the rate is out of range.

    Source: Huang et al. (2016), Deep Networks with Stochastic Depth, section 3, with the rates of timm.
    """
    check_drop_path(rate, model)
    from timm.layers.drop import DropPath, calculate_drop_path_rates  # timm takes seconds to import

    blocks = list(_places(model).values())
    rates = cast(list[float], calculate_drop_path_rates(rate, len(blocks)))
    for (block, names), share in zip(blocks, rates, strict=True):
        for name in names:
            module = DropPath(share) if share > 0 else nn.Identity()
            setattr(block, name, module.train(block.training))


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, list[str]]]:
    """Return the blocks that have places for it by name, in the order of the forward pass.

    timm and transformers both name them drop_path, with a number where a block has several.
    """
    found = {}
    for name, block in model.named_modules():
        names = [child for child, _ in block.named_children() if child.rstrip("0123456789") == "drop_path"]
        if names:
            found[name] = (block, names)
    return found
