"""Return the names of a head's classes, where they are known for sure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vbp.data.labels import IMAGENET_CLASSES, ClassNames, labels_by_name
from vbp.errors import InputError

# What transformers calls the classes of a model that was given no names.
PLACEHOLDER = re.compile(r"LABEL_\d+")


def timm_class_names(cfg: Mapping[str, Any], num_classes: int) -> ClassNames | None:
    """Return the class names for the pretrained head of a timm model: its record's own, or ImageNet's.

    `cfg` is timm's record of the weights that were loaded; a file of other weights says nothing of its classes.
    """
    labels = cfg.get("label_names")
    if labels:
        described = cfg.get("label_descriptions") or {}
        ordered = [labels[key] for key in sorted(labels, key=int)] if isinstance(labels, Mapping) else list(labels)
        return tuple(str(described.get(name, name)) for name in ordered) if len(ordered) == num_classes else None
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset  # timm takes seconds to import

    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None or cfg.get("num_classes") != num_classes:
        return None
    return tuple(ImageNetInfo(subset).label_descriptions())


def huggingface_class_names(config: Mapping[str, Any]) -> ClassNames | None:
    """Return the class names in a transformers configuration; None where it has placeholders alone."""
    labels = {int(key): str(name) for key, name in (config.get("id2label") or {}).items()}
    if sorted(labels) != list(range(len(labels))) or all(PLACEHOLDER.fullmatch(name) for name in labels.values()):
        return None
    return tuple(labels[index] for index in range(len(labels)))


def is_imagenet(class_names: Sequence[str] | None, num_classes: int) -> bool:
    """Return whether the classes are the 1,000 of ImageNet-1k, in the order of every pretrained head."""
    if class_names is None or num_classes != IMAGENET_CLASSES:
        return False
    try:
        return labels_by_name(class_names, num_classes, "the model") == list(range(num_classes))
    except InputError:
        return False  # names of its own, some of which are ImageNet's too


def dataset_class_names(folders: Sequence[str], num_classes: int) -> ClassNames | None:
    """Return the class names for a head whose labels are the class folders of a dataset, in the order of its labels.

    ImageNet synsets and English names stand for the descriptions, and any part of them names all 1,000 classes.
    """
    if num_classes == IMAGENET_CLASSES and labels_by_name(folders, num_classes, "the data") is not None:
        from timm.data.imagenet_info import ImageNetInfo

        return tuple(ImageNetInfo("imagenet-1k").label_descriptions())
    return tuple(folders) if len(folders) == num_classes else None
