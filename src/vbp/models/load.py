"""Load an image classifier with its preprocessing: timm, Hugging Face, Facebook's ConvNeXt files.

What a model name stands for, in this order: an existing folder is a local Hugging Face model; `timm/NAME` and
`hf-hub:OWNER/NAME` are timm models on the hub; another `OWNER/NAME` is a Hugging Face id; all else is a timm
name, with or without tag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from vbp.errors import InputError
from vbp.models.classifier import Classifier, Family, Library, ModelSource, check_takes_images
from vbp.models.weights import check_weight_file
from vbp.runtime.choices import ModelType

if TYPE_CHECKING:
    from vbp.models.timm_models import WeightFile


def load_classifier(
    model_name: str,
    *,
    model_type: ModelType = "auto",
    checkpoint: Path | str | None = None,
    convnext_checkpoint: Path | str | None = None,
    allow_random_init: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """A classifier in evaluation mode, float32, on the CPU, with every weight accounted for.

    Args:
        model_name: a folder, a hub id or a timm name: see above.
        model_type: the family that the model must belong to; `auto` checks nothing.
        checkpoint: weights for a timm name; then nothing is downloaded. Its head sets the number of classes
            unless `model_kwargs` does.
        convnext_checkpoint: one of Facebook's original ConvNeXt files, for a timm ConvNeXt name.
        allow_random_init: a timm model without file is built from random weights, and nothing is downloaded;
            in a Hugging Face model the head alone may be missing, or in a local folder all weights.
        model_kwargs: further arguments of `timm.create_model`, of plain JSON types.
        img_size: edge of the square input in pixels; a timm model of fixed input size is built for it.
        crop_pct: in place of the model's own, as are the following.
        interpolation: the resampling filter.
        mean: one value for each input channel.
        std: one value for each input channel.

    Raises:
        InputError: anything given does not exist, does not fit, or cannot be fetched.

    Example:
        >>> classifier = vbp.load_classifier("test_vit", allow_random_init=True)
    """
    kind = _check_model(model_name, model_type)
    files = (None if one is None else Path(one) for one in (checkpoint, convnext_checkpoint))
    file = _weight_file(model_name, kind, *files)
    values = (_checked_size(img_size), crop_pct, interpolation, mean, std)
    overrides = dict(zip(("img_size", "crop_pct", "interpolation", "mean", "std"), values, strict=True))
    check = partial(_check_family, model_name, model_type)
    if kind == "timm":
        from vbp.models.timm_models import load_timm

        classifier = load_timm(model_name, file, allow_random_init, model_kwargs or {}, overrides, check)
    else:
        from vbp.models.huggingface import load_huggingface

        _check_no_arguments(model_name, model_kwargs)
        classifier = load_huggingface(model_name, allow_random_init, overrides, check)
    check_takes_images(classifier)
    return classifier


def build_model(source: ModelSource) -> nn.Module:
    """The dense architecture with random weights, in evaluation mode; needs no network.

    Raises:
        InputError: the installed library cannot build it.

    Example:
        >>> dense = vbp.build_model(vbp.ModelSource("timm", "test_vit", {"num_classes": 7}))
    """
    # Each needs a library that takes seconds to load, timm with torchvision.
    if source.library == "timm":
        from vbp.models.timm_models import build_timm

        return build_timm(source)
    from vbp.models.huggingface import build_huggingface

    return build_huggingface(source)


def _check_family(model_name: str, model_type: ModelType, family: Family) -> None:
    if model_type not in ("auto", family):
        raise InputError(
            f"model_type must be auto or {family!r}, the family of {model_name}, got {model_type!r}; change the "
            "model or its type"
        )


def _check_no_arguments(model_name: str, model_kwargs: Mapping[str, Any] | None) -> None:
    if model_kwargs:
        raise InputError(
            f"model arguments are for timm models, got {', '.join(model_kwargs)} with the Hugging Face model "
            f"{model_name}; change its config.json instead"
        )


def _checked_size(img_size: int | None) -> int | None:
    if img_size is not None and (isinstance(img_size, bool) or not isinstance(img_size, int) or img_size < 1):
        raise InputError(f"img_size must be a positive whole number of pixels, got {img_size!r}")
    return img_size


def _check_model(model_name: str, model_type: str) -> Library:
    """Which library builds the model."""
    if model_type not in get_args(ModelType):
        raise InputError(f"model_type must be one of {', '.join(get_args(ModelType))}, got {model_type!r}")
    if not model_name.strip():
        raise InputError("model_name must be a local folder, a Hugging Face id or a timm model, got nothing")
    if Path(model_name).is_dir():
        return "transformers"
    from vbp.models.timm_names import hub_repository

    if hub_repository(model_name) is not None or "/" not in model_name:
        return "timm"
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model_name):
        raise InputError(
            f"{model_name} is neither an existing folder nor a Hugging Face id (OWNER/NAME); check the path"
        )
    return "transformers"


def _weight_file(
    model_name: str, kind: Library, checkpoint: Path | None, convnext_checkpoint: Path | None
) -> WeightFile | None:
    if checkpoint is not None and convnext_checkpoint is not None:
        raise InputError("--checkpoint and --convnext_checkpoint are both given; give the one to load")
    path = checkpoint or convnext_checkpoint
    if path is None:
        return None
    from vbp.models.timm_models import WeightFile
    from vbp.models.timm_names import hub_repository

    if kind == "transformers" or hub_repository(model_name) is not None:
        own = "the folder" if Path(model_name).is_dir() else "the hub id"
        raise InputError(
            f"a checkpoint goes with a timm name such as deit_tiny_patch16_224, got {model_name}: {own} "
            "carries its own weights; leave out the checkpoint, or give the timm name"
        )
    check_weight_file(path)
    return WeightFile(path, facebook=convnext_checkpoint is not None)
