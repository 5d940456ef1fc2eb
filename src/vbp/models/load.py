"""Load a classifier or a model without a head, with its preprocessing: timm, Hugging Face, Facebook's ConvNeXt files.

What a model name stands for, in this order: an existing folder is a local Hugging Face model; `timm/NAME` and
`hf-hub:OWNER/NAME` are timm models on the hub; another `OWNER/NAME` is a Hugging Face id; all else is a timm
name, with or without tag.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from vbp.errors import InputError
from vbp.models.classifier import Classifier, Family, Library, ModelSource, check_takes_images, hub_repository
from vbp.models.limits import ANY, Limits
from vbp.models.weights import WeightFile, check_weight_file
from vbp.runtime.choices import ModelType
from vbp.runtime.files import check_path
from vbp.runtime.log_file import told_if_slow

_log = logging.getLogger(__name__)


@told_if_slow(_log, "loading the model and its library")
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
    """Load a classifier in evaluation mode, float32, on the CPU, with every weight accounted for.

    Args:
        model_name: A folder, a hub id or a timm name: see above.
        model_type: The family that the model must belong to; `auto` checks nothing.
        checkpoint: Weights for a timm name; then nothing is downloaded. Its head sets the number of classes
            unless `model_kwargs` does.
        convnext_checkpoint: One of Facebook's original ConvNeXt files, for a timm ConvNeXt name.
        allow_random_init: A timm model without file is built from random weights, and nothing is downloaded;
            in a Hugging Face model the head alone may be missing, or in a local folder all weights.
        model_kwargs: Further arguments of `timm.create_model`, of plain JSON types.
        img_size: Edge of the square input in pixels; a timm model of fixed input size is built for it.
        crop_pct: In place of the model's own, as are the following.
        interpolation: The resampling filter.
        mean: One value for each input channel.
        std: One value for each input channel.

    Raises:
        InputError: Anything given does not exist, does not fit, or cannot be fetched.

    Example:
        >>> classifier = vbp.load_classifier("test_vit", allow_random_init=True)
    """
    kind = _check_model(model_name, model_type)
    files = (None if path is None else Path(path) for path in (checkpoint, convnext_checkpoint))
    file = _weight_file(model_name, kind, *files)
    if img_size is not None and (isinstance(img_size, bool) or not isinstance(img_size, int) or img_size < 1):
        raise InputError(f"img_size must be a positive whole number of pixels, got {img_size!r}")
    overrides = {"img_size": img_size, "crop_pct": crop_pct, "interpolation": interpolation, "mean": mean, "std": std}
    if kind == "timm":
        from vbp.models.timm_models import load_timm

        classifier = load_timm(model_name, file, allow_random_init, model_kwargs or {}, overrides, model_type)
    else:
        if model_kwargs:
            raise InputError(
                f"model arguments are for timm models, got {', '.join(model_kwargs)} with the Hugging Face model "
                f"{model_name}; change its config.json instead"
            )
        from vbp.models.huggingface import load_huggingface

        classifier = load_huggingface(model_name, allow_random_init, overrides, model_type)
    check_takes_images(classifier)
    return classifier


@told_if_slow(_log, "building the model")
def build_model(source: ModelSource, pruned_weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Build the dense architecture with random weights, in evaluation mode; loads no code and needs no network.

    With the weights of a pruned model, an architecture that is many times larger than them is refused before it is
    built.

    Raises:
        InputError: The source does more than describe an architecture, or the installed library cannot build it.

    Example:
        >>> dense = vbp.build_model(vbp.ModelSource("timm", "test_vit", {"num_classes": 7}))
    """
    # Either library takes seconds to import: only the one that is needed is.
    limits = ANY if pruned_weights is None else Limits.of_dense(pruned_weights)
    if source.library == "timm":
        from vbp.models.timm_models import build_timm

        return build_timm(source, limits)
    from vbp.models.huggingface import build_huggingface

    return build_huggingface(source, limits)


def family_of(model: nn.Module, source: ModelSource) -> Family:
    """Return the family of a model that `build_model` built."""
    if source.library == "timm":
        from vbp.models.timm_models import family_of_timm

        return family_of_timm(model)
    from vbp.models.huggingface import FAMILIES

    return FAMILIES.get(str(source.arguments.get("model_type")), "other")


def _check_model(model_name: str, model_type: str) -> Library:
    """Return the library that builds the model."""
    if model_type not in get_args(ModelType):
        raise InputError(f"model_type must be one of {', '.join(get_args(ModelType))}, got {model_type!r}")
    if not model_name.strip():
        raise InputError("model_name must be a local folder, a Hugging Face id or a timm model, got nothing")
    check_path(model_name, "model_name")
    if Path(model_name).is_dir():
        return "transformers"
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
    if kind == "transformers" or hub_repository(model_name) is not None:
        own = "the folder" if Path(model_name).is_dir() else "the hub id"
        raise InputError(
            f"a checkpoint goes with a timm name such as deit_tiny_patch16_224, got {model_name}: {own} "
            "carries its own weights; leave out the checkpoint, or give the timm name"
        )
    check_weight_file(path)
    return WeightFile(path, facebook=convnext_checkpoint is not None)
