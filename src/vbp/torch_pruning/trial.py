"""Try a pruning on a copy of the model before the model itself is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vbp.errors import InputError, first_line
from vbp.runtime.forward import copy_model
from vbp.sites.cutting import HeadChange, update_attributes_
from vbp.sites.propagation import tensors_in
from vbp.torch_pruning.graph import logged_warnings


@dataclass(frozen=True, eq=False)
class Removal:
    """Channels of one group that are to be removed, ascending: output channels of `root`, pruned by `handler`."""

    root: nn.Module
    handler: Any
    channels: list[int] = field(default_factory=list)
    attention: HeadChange | None = None


def check_removals(graph: Any, removals: Sequence[Removal], example_inputs: Any, forward: Any) -> None:
    """Prune a copy of the graph's model and run it; for a moment the copy takes as much memory again.

    Raises:
        InputError: The pruned copy fails, or returns outputs of another shape.
    """
    failure = _failure(graph, removals, example_inputs, forward)
    if failure is None:
        return
    culprits = [one for one in removals if _failure(graph, [one], example_inputs, forward) is not None]
    named = ", ".join(graph._module2name[one.root] for one in culprits) or "several layers together"
    raise InputError(
        f"pruning {named} must leave a {type(graph.model).__name__} that runs, got {failure}; Torch-Pruning follows "
        "these channels wrongly, or the model keeps their number elsewhere: put the layers into ignored_layers, or "
        "give num_heads for an attention (nothing was modified)"
    )


def _failure(graph: Any, removals: Sequence[Removal], example_inputs: Any, forward: Any) -> str | None:
    trial = copy_model(graph.model).eval()
    try:
        with torch.no_grad():
            expected = _shapes(forward(trial, example_inputs)) if len(removals) > 1 else None
            prune_copy_(trial, graph, removals)
            shapes = _shapes(forward(trial, example_inputs))
    except Exception as error:  # noqa: BLE001  whatever a broken model raises
        return f"{type(error).__name__}: {first_line(error)}"
    return None if expected in (None, shapes) else f"outputs of shape {shapes} in place of {expected}"


def _shapes(output: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors_in(output)]


def prune_copy_(trial: nn.Module, graph: Any, removals: Sequence[Removal]) -> None:
    """Apply removals to a copy of the graph's model, all at once; the graph stays as it was."""
    gone: dict[tuple[str, str], tuple[Any, Any, set[int]]] = {}
    for removal in removals:
        with logged_warnings(trial):
            group = graph.get_pruning_group(removal.root, removal.handler, removal.channels)
        for dependency, indices in group.items:
            target = dependency.target
            name = graph._param_to_name.get(target.module) if isinstance(target.module, nn.Parameter) else None
            name = name or graph._module2name.get(target.module)
            if name is None:
                continue  # an operation, not a layer
            key = (name, getattr(dependency.handler, "__qualname__", str(dependency.handler)))
            gone.setdefault(key, (dependency, target, set()))[2].update(indices)
    for (name, _), (dependency, target, indices) in gone.items():
        owner_name, _, attribute = name.rpartition(".")
        dependency.handler.__self__.pruning_dim = target.pruning_dim
        if isinstance(target.module, nn.Parameter):
            owner = trial.get_submodule(owner_name)
            setattr(owner, attribute, dependency.handler(getattr(owner, attribute), sorted(indices)))
        else:
            dependency.handler(trial.get_submodule(name), sorted(indices))
    for removal in removals:
        if removal.attention is not None:
            update_attributes_(trial, removal.attention)
