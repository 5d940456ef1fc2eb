"""Facebook's original ConvNeXt files: which preprocessing belongs to them, and whether a file is one."""

from __future__ import annotations

import logging
from pathlib import Path

import timm
from timm.models import convnext
from torch import nn

from vbp.errors import InputError
from vbp.models.timm_names import check_known
from vbp.models.weights import StateDict

_log = logging.getLogger(__name__)
IMAGENET_22K_CLASSES = 21841


def with_facebook_tag(model_name: str, path: Path) -> str:
    """Return the tag that holds the preprocessing of a Facebook file.

    The official names tell the training data (`22k_1k` or `1k`) and the size (`224` or `384`). At 224 both
    tags prepare images alike, so that a renamed file is not worse off. A tag that is given stays.

    Raises:
        InputError: There are no such files for the model.
    """
    if "." in model_name:
        return model_name
    check_known(model_name)
    size = "_384" if "384" in path.stem else ""
    tags = [f"fb_in22k_ft_in1k{size}", f"fb_in1k{size}", "fb_in22k_ft_in1k"]
    if "22k" not in path.stem:
        tags.insert(0, f"fb_in1k{size}")
    known = timm.list_models(f"{model_name}.*", include_tags=True)
    for tag in tags:
        if f"{model_name}.{tag}" in known:
            _log.info("%s is prepared as timm's %s.%s", path, model_name, tag)
            return f"{model_name}.{tag}"
    raise InputError(
        "--convnext_checkpoint takes Facebook's files for convnext_tiny, convnext_small, convnext_base and "
        f"convnext_large, got the model name {model_name!r}; give other weights by --checkpoint"
    )


def check_facebook_layout(model: nn.Module, name: str, weights: StateDict, path: Path) -> None:
    """Stop if a file cannot be one of Facebook's ConvNeXt classifiers for ImageNet-1k or a fine-tuned one.

    Raises:
        InputError: The model is no ConvNeXt, or the file has another layout or the head of ImageNet-22k.
    """
    if not isinstance(model, convnext.ConvNeXt):
        raise InputError(f"--convnext_checkpoint needs a ConvNeXt, got {name}; use --checkpoint")
    if not any(key.startswith("downsample_layers.") for key in weights):
        raise InputError(
            f"{path} is not in the layout of Facebook's ConvNeXt files (no downsample_layers.*); give a file "
            "in timm's layout by --checkpoint"
        )
    head = weights.get("head.weight")
    if head is not None and head.shape[0] == IMAGENET_22K_CLASSES:
        raise InputError(
            f"{path} has the head of ImageNet-22k ({IMAGENET_22K_CLASSES} classes), which is not fine-tuned "
            "for ImageNet-1k; use the 22k_1k or the 1k file"
        )
