"""The arguments of a Torch-Pruning pruner: copied, completed and checked before it takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vbp.errors import InputError

# The base class has one dict for all pruners as the default of each of these, and writes into it.
_SHARED_DEFAULTS = ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups")


def own_containers(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """Copy what the base class would share between pruners or change in the caller's hands.

    Args:
        model: The model to be pruned.
        options: The base class's arguments by name.

    Raises:
        InputError: An entry of `ignored_layers` is none of its kinds.
    """
    options.update({name: dict(options[name]) for name in _SHARED_DEFAULTS})
    unwrapped = options["unwrapped_parameters"]
    if unwrapped is not None:
        options["unwrapped_parameters"] = list(unwrapped.items() if isinstance(unwrapped, dict) else unwrapped)
    ignored: list[Any] = []
    for layer in options["ignored_layers"] or ():
        if isinstance(layer, type):
            ignored.extend(module for module in model.modules() if isinstance(module, layer))
        elif isinstance(layer, nn.Module | nn.Parameter):
            ignored.append(layer)
        elif layer is not ...:  # the placeholder of a snippet
            raise InputError(f"ignored_layers must hold modules, parameters or module types, got {layer!r}")
    options["ignored_layers"] = ignored
    return options


def check_options(options: Mapping[str, Any]) -> None:
    """Check the arguments of a pruner.

    Raises:
        InputError: One is out of range, or would do nothing.
    """
    ratio = options["pruning_ratio"] if options["ch_sparsity"] is None else options["ch_sparsity"]
    shares = {"pruning_ratio": ratio, "max_pruning_ratio": options["max_pruning_ratio"]}
    shares["head_pruning_ratio"] = options["head_pruning_ratio"]
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise InputError(f"{name} must be in [0, 1], got {share}; 0.35 removes 35 % of the channels")
    for name in ("round_to", "iterative_steps"):
        if options[name] is not None and options[name] < 1:
            raise InputError(f"{name} must be at least 1, got {options[name]}")
    if options["isomorphic"] and not options["global_pruning"]:
        raise InputError("isomorphic ranks groups of one pattern together, got global_pruning=False; set it to True")
