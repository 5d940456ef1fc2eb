"""Save a pruned model so that it loads anywhere: weights, plan and how the dense model is built, in plain types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbp.data.preprocessing import Preprocessing
from vbp.deploy.artifact_files import (
    MANIFEST,
    WEIGHTS,
    model_in,
    plain_state,
    read_file,
    read_folder,
    shared_names,
    unwrapped_plan,
    write_file,
    write_folder,
)
from vbp.deploy.hub import fetch, is_reference
from vbp.errors import InputError
from vbp.models.classifier import ModelSource
from vbp.models.load import build_model
from vbp.models.split_attention import split_attention_
from vbp.models.weights import load_weights_
from vbp.pruning.plan import PruningPlan
from vbp.pruning.surgery import cut_
from vbp.runtime.decode import from_json
from vbp.runtime.files import check_path


@dataclass(frozen=True)
class PrunedArtifact:
    """The content of the file or folder of a pruned model.

    Attributes:
        plans: Applied in this order to the dense model.
        weights: State of the pruned model; tied weights are one object under several names.
        source: How the dense model is built; None for a model of the user's own.
        preprocessing: How its images are prepared, if known.
        metrics: Figures measured on the model, by name.
        class_names: What each logit stands for, if known.
        versions: Of the packages with which it was written.
        settings: How it was made, by name, if known.

    Example:
        >>> vbp.read_artifact(saved).plans[0] == plan
        True
    """

    plans: tuple[PruningPlan, ...]
    weights: Mapping[str, Tensor]
    source: ModelSource | None = None
    preprocessing: Preprocessing | None = None
    metrics: Mapping[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Description:
    """The types of what a file or folder holds beside weights."""

    source: Mapping[str, Any] | None
    preprocessing: Mapping[str, Any] | None
    metrics: Mapping[str, Any]
    class_names: tuple[str, ...] | None
    versions: Mapping[str, str]
    settings: Mapping[str, Any] | None
    plans: tuple[Mapping[str, Any], ...]


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    names = ("vbp-pruning", "torch", "torchvision", "timm", "transformers", "torch-pruning", "numpy", "pillow")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def save_pruned(
    model: nn.Module | Mapping[str, Tensor],
    path: Path | str,
    *,
    plans: PruningPlan | Sequence[PruningPlan],
    source: ModelSource | None = None,
    preprocessing: Preprocessing | None = None,
    metrics: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write what `load_pruned` reads, whole or not at all.

    Args:
        model: The pruned model, or its state; may be wrapped in DistributedDataParallel, DataParallel,
            AveragedModel or torch.compile, whole or in parts; what is saved is the model inside.
        path: A folder, which gets `model.safetensors` and a readable `vbp.json`; or one file that ends in `.pth`,
            which `torch.load(weights_only=True)` reads. An earlier model there is replaced.
        plans: The plan that was applied to the dense model, or several in their order.
        source: From `load_classifier`; without it, loading needs `model=`.
        preprocessing: From `load_classifier`.
        metrics: Plain JSON data to keep with the weights.
        class_names: What each logit stands for.
        settings: Plain JSON data that says how the model was made.

    Raises:
        InputError: The folder holds something else, or something given cannot be written in this format.
        OutputError: The disk is full or cannot be written; an earlier model there stays whole.

    Example:
        >>> vbp.save_pruned(pruned, folder / "pruned", plans=plan)
        >>> vbp.load_pruned(folder / "pruned", model=model)(images).equal(pruned(images))
        True
    """
    entries = (plans,) if isinstance(plans, PruningPlan) else tuple(plans)
    state = plain_state(model)
    manifest = {
        "source": None if source is None else source.to_dict(),
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "class_names": None if class_names is None else [str(name) for name in class_names],
        "metrics": dict(metrics or {}),
        **({} if settings is None else {"settings": dict(settings)}),
        "versions": installed_versions(),
        "plans": [unwrapped_plan(plan, state).to_dict() for plan in entries],
    }
    target = Path(path)
    write = write_file if target.suffix == ".pth" else write_folder
    write(target, manifest, state)


def read_artifact(path: Path | str) -> PrunedArtifact:
    """Read what `save_pruned` wrote, without building a model.

    Args:
        path: A folder, that of a run which has ended, a `.pth` file, or `hf://USER/REPO` with `@REVISION` or without.

    Raises:
        InputError: It is missing, damaged, or something else.

    Example:
        >>> vbp.read_artifact(saved).metrics
        {'top1': 75.0}
    """
    check_path(path, "a pruned model")
    place = fetch(str(path), (MANIFEST, WEIGHTS)) if is_reference(path) else Path(path)
    place = model_in(place)
    if not place.is_dir() and not place.is_file():
        raise InputError(
            f"a pruned model must be an existing file or folder, got {place}; give the path of a vbp folder "
            "or .pth file"
        )
    manifest, weights = read_folder(place) if place.is_dir() else read_file(place)
    names = [field.name for field in fields(_Description)]
    missing = next((name for name in names if name not in (*manifest, "class_names", "settings")), None)
    if missing is not None:
        raise InputError(f"{place} lacks {missing!r}; make it again")
    described = from_json(_Description, {name: manifest.get(name) for name in names}, f"the description in {place}")
    source, preprocessing = described.source, described.preprocessing
    return PrunedArtifact(
        tuple(PruningPlan.from_dict(plan) for plan in described.plans),
        weights,
        None if source is None else ModelSource.from_dict(source),
        None if preprocessing is None else Preprocessing.from_dict(preprocessing),
        described.metrics,
        described.class_names,
        described.versions,
        described.settings,
    )


def load_pruned(path: Path | str, model: nn.Module | None = None) -> nn.Module:
    """Return a pruned model: its logits are bit-equal to those of the model that was saved.

    The dense architecture is built without weights, the plan is replayed, and the saved weights are loaded strictly.
    Nothing is downloaded, unless the path is `hf://...`.

    Args:
        path: A folder or file that `save_pruned` wrote, the folder of a run, or `hf://USER/REPO` with `@REVISION` or
            without.
        model: A fresh dense model of the same architecture; needed for models that neither timm nor Hugging Face
            builds. It is pruned in place and returned.

    Returns:
        The model in evaluation mode, on the CPU unless `model` lies elsewhere.

    Raises:
        InputError: The file is missing or damaged, or does not fit the model.

    Example:
        >>> vbp.load_pruned(saved, model=model)(images).equal(pruned(images))
        True
    """
    artifact = read_artifact(path)
    device = torch.device("cpu") if model is None else next(model.parameters()).device
    if model is None:
        if artifact.source is None:
            remedy = "pass it: load_pruned(path, model=fresh_dense_model)"
            raise InputError(f"{path} does not say how its dense model is built; {remedy}")
        model = build_model(artifact.source, artifact.weights)
    try:
        rebuild_(model, artifact.plans, artifact.weights)
    except RuntimeError as error:
        raise InputError(f"the weights of {path} do not fit {type(model).__name__}: {error}") from error
    return model.to(device).eval()


def rebuild_(model: nn.Module, plans: Sequence[PruningPlan], weights: Mapping[str, Tensor]) -> None:
    """Turn a dense model into the pruned one that has these weights; raise RuntimeError if they do not fit."""
    split_attention_(model, where=lambda name: f"{name}.query.weight" in weights)
    for plan in plans:
        cut_(model, plan)
    _add_missing_biases_(model, plans, weights)
    # Assigning keeps the saved type: a model that was saved in bfloat16 or float64 comes back so.
    load_weights_(model, weights, assign=True)
    _tie_(model, weights)
    types = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(types) == 1 and types != {torch.get_default_dtype()}:
        model.to(types.pop())  # buffers that are in no state dict, such as the mask of shifted windows


def _tie_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make one parameter again of each that has several names; assigning made one for each name."""
    for alias, name in shared_names(weights).items():
        parent, _, attribute = alias.rpartition(".")
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, getattr(model.get_submodule(owner), own))


def _add_missing_biases_(model: nn.Module, plans: Sequence[PruningPlan], weights: Mapping[str, Tensor]) -> None:
    """Add to readers, and to a last linear layer, the biases that they gained through compensation or a refit."""
    readers = {reader.layer for plan in plans for entry in plan.sites for reader in entry.site.readers}
    for name, layer in model.named_modules():
        bias = weights.get(f"{name}.bias")
        if bias is not None and (name in readers or isinstance(layer, nn.Linear)) and layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(bias))
