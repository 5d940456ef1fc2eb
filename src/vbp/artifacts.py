"""Save a pruned model so that it loads anywhere: weights, plan and what model they belong to, in plain types."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.files import write_atomically
from vbp.models import build_model
from vbp.models.checkpoints import one_line
from vbp.models.classifier import ModelSource
from vbp.plan import PruningPlan
from vbp.preprocessing import Preprocessing
from vbp.surgery import prune_

_FORMAT = "vbp-pruned/1"


@dataclass(frozen=True)
class PrunedArtifact:
    """What a file of a pruned model holds.

    Attributes:
        plans: Applied in this order to the dense model.
        weights: State of the pruned model.
        source: How the dense model is built; None for a model of the user's own.
        preprocessing: How its images are prepared, if known.
        metrics: Figures measured on the model, by name.
    """

    plans: tuple[PruningPlan, ...]
    weights: Mapping[str, Tensor]
    source: ModelSource | None = None
    preprocessing: Preprocessing | None = None
    metrics: Mapping[str, Any] | None = None


def installed_versions() -> dict[str, str]:
    """Give the versions of the packages that a result depends on."""
    names = ("vbp-pruning", "torch", "torchvision", "timm", "transformers", "torch-pruning", "numpy", "pillow")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def save_pruned(
    model: nn.Module | Mapping[str, Tensor],
    path: Path | str,
    *,
    plans: PruningPlan | Sequence[PruningPlan],
    source: ModelSource | None = None,
    preprocessing: Preprocessing | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write a file that `load_pruned` and `torch.load(weights_only=True)` read, whole or not at all.

    Args:
        model: The pruned model, or its state.
        path: Usually ends in `.pth`.
        plans: The plan that was applied to the dense model, or several in their order.
        source: From `load_classifier`; without it, loading needs `model=`.
        preprocessing: From `load_classifier`.
        metrics: Plain JSON data to keep with the weights.

    Raises:
        OutputError: The file could not be written; an earlier one of that name stays whole.
    """
    entries = (plans,) if isinstance(plans, PruningPlan) else tuple(plans)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    content = {
        "format": _FORMAT,
        "source": None if source is None else source.to_dict(),
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "plans": [plan.to_dict() for plan in entries],
        "metrics": dict(metrics or {}),
        "versions": installed_versions(),
        # A plain dictionary of tensors of their own: no class and no view of a larger storage is stored.
        "state_dict": {name: value.detach().cpu().clone() for name, value in state.items()},
    }
    write_atomically(Path(path), lambda file: torch.save(content, file))


def read_artifact(path: Path | str) -> PrunedArtifact:
    """Read a file that `save_pruned` wrote, without building a model.

    Raises:
        InputError: The file is missing, damaged, or something else.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"a pruned model must be an existing file, got {file}; give the path of a vbp .pth file")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise InputError(
            f"{file} is damaged or no file of a pruned model ({one_line(error)}); copy or make it again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{file} must have format {_FORMAT}, got {found!r}; use the vbp version that wrote it")
    try:
        source, preprocessing = content["source"], content["preprocessing"]
        return PrunedArtifact(
            tuple(PruningPlan.from_dict(plan) for plan in content["plans"]),
            content["state_dict"],
            None if source is None else ModelSource.from_dict(source),
            None if preprocessing is None else Preprocessing.from_dict(preprocessing),
            content["metrics"],
        )
    except KeyError as error:
        raise InputError(f"{file} lacks {error}; make it again") from error


def load_pruned(path: Path | str, model: nn.Module | None = None) -> nn.Module:
    """Give a pruned model back: its logits are bit-equal to those of the model that was saved.

    Nothing is downloaded: the dense architecture is built without weights, the plan is replayed, and the saved
    weights are loaded strictly.

    Args:
        path: A file that `save_pruned` wrote.
        model: A fresh dense model of the same architecture; needed for models that neither timm nor Hugging Face
            builds. It is pruned in place and returned.

    Returns:
        The model in evaluation mode, on the CPU unless `model` lies elsewhere.

    Raises:
        InputError: The file is missing or damaged, or does not fit the model.
    """
    artifact = read_artifact(path)
    if model is None and artifact.source is None:
        raise InputError(
            f"{path} does not say how its dense model is built; pass it: load_pruned(path, model=fresh_dense_model)"
        )
    device = next(model.parameters()).device if model is not None else torch.device("cpu")
    pruned = model if model is not None else build_model(_known(artifact.source))
    try:
        rebuild_(pruned, artifact.plans, artifact.weights)
    except RuntimeError as error:
        raise InputError(f"the weights of {path} do not fit {type(pruned).__name__}: {error}") from error
    return pruned.to(device).eval()


def rebuild_(model: nn.Module, plans: Sequence[PruningPlan], weights: Mapping[str, Tensor]) -> None:
    """Turn a dense model into the pruned one whose weights these are.

    Raises:
        RuntimeError: The weights do not fit.
    """
    for plan in plans:
        prune_(model, plan)
    _add_missing_biases_(model, plans, weights)
    # Assigning keeps the saved type: a model that was saved in bfloat16 or float64 comes back so.
    model.load_state_dict(dict(weights), strict=True, assign=True)


def _known(source: ModelSource | None) -> ModelSource:
    assert source is not None
    return source


def _add_missing_biases_(model: nn.Module, plans: Sequence[PruningPlan], weights: Mapping[str, Tensor]) -> None:
    """Give consumers the biases that they gained through compensation."""
    for plan in plans:
        for entry in plan.sites:
            if not entry.site.consumer:
                continue
            consumer = model.get_submodule(entry.site.consumer)
            bias = weights.get(f"{entry.site.consumer}.bias")
            if consumer.bias is None and bias is not None:
                consumer.bias = nn.Parameter(torch.zeros_like(bias))
