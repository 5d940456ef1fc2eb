"""Folders of native checkpoints, in the format of timm's or of Hugging Face's models."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from vbp.data.preprocessing import Preprocessing
from vbp.deploy.artifact_files import State, shared_names
from vbp.errors import InputError, OutputError, one_line
from vbp.models.classifier import ModelSource
from vbp.models.huggingface_processor import LOADING_ERRORS, processor_config
from vbp.runtime.decode import read_json
from vbp.runtime.files import check_path, write_json


def check_new_folder(folder: Path, what: str) -> None:
    """Raise InputError if a folder is in use, for what goes into a new or empty one."""
    check_path(folder, what)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{what} must go into a new or empty folder, got {folder}; choose another")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a temporary folder by `write`, then put it in the place of `folder`; if that fails, nothing is left."""
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:48]}."))
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        for file in temporary.iterdir():  # safetensors writes for the owner alone
            file.chmod(0o666 & ~mask)
        if folder.exists():
            folder.rmdir()
        temporary.replace(folder)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputError(f"{folder} could not be written ({error}); choose another folder") from error
        raise


def write_timm(
    folder: Path,
    native: nn.Module,
    state: State,
    source: ModelSource,
    preprocessing: Preprocessing | None,
    class_names: Sequence[str] | None,
) -> None:
    """Write a folder in the format of timm's models on the hub."""
    shared = shared_names(state)
    weights = {name: value.clone() if name in shared else value for name, value in state.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    known: Mapping[str, Any] = getattr(native, "pretrained_cfg", None) or {}
    cfg: dict[str, Any] = {
        key: known[key] for key in ("first_conv", "classifier", "fixed_input_size", "pool_size") if known.get(key)
    }
    if preprocessing is not None:
        described = preprocessing.to_dict()
        size = described.pop("img_size")
        cfg.update(described, input_size=[len(preprocessing.mean), *size], test_crop_pct=preprocessing.crop_pct)
    config = {
        "architecture": source.name,
        "num_classes": source.arguments.get("num_classes", getattr(native, "num_classes", None)),
        "num_features": getattr(native, "num_features", None),
        "model_args": {key: value for key, value in source.arguments.items() if key != "num_classes"},
        "pretrained_cfg": cfg,
        **({} if class_names is None else {"label_names": list(class_names)}),
    }
    write_json(folder / "config.json", config)


def write_huggingface(
    folder: Path, native: Any, preprocessing: Preprocessing | None, class_names: Sequence[str] | None
) -> None:
    """Write a folder in the format of Hugging Face's models."""
    if class_names is not None:
        native.config.id2label = dict(enumerate(class_names))
        native.config.label2id = {name: index for index, name in enumerate(class_names)}
    native.save_pretrained(folder)
    if preprocessing is not None:
        values = processor_config(preprocessing)
        write_json(folder / "preprocessor_config.json", values)


def load_native(folder: Path) -> nn.Module:
    """Load a native checkpoint as people without vbp do: by timm or transformers alone."""
    try:
        config = read_json(folder / "config.json")
        if "architecture" in config:  # transformers has a list of `architectures`
            import timm

            model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        else:
            from transformers import AutoModelForImageClassification

            model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
    except LOADING_ERRORS as error:
        raise InputError(
            f"the checkpoint cannot be loaded without vbp: {one_line(error)}; report this with the model's name"
        ) from error
    return model
