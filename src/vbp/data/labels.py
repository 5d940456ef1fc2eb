"""Number classes as the model's head does: ImageNet's by name; and check that given labels are the head's."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from vbp.errors import InputError, some_of

IMAGENET_CLASSES = 1000


@functools.cache
def imagenet_labels() -> dict[str, int]:
    """Return the label of each of the 1,000 synsets of ImageNet-1k, in the order that every pretrained head uses."""
    info = _imagenet()
    return {info.index_to_label_name(label): label for label in range(IMAGENET_CLASSES)}


def are_synsets(class_names: Iterable[str], num_classes: int) -> bool:
    """Return whether the names of classes say their places in the head: all are synsets of ImageNet-1k."""
    return num_classes == IMAGENET_CLASSES and set(class_names) <= imagenet_labels().keys()


def check_labels(labels: Sequence[int], num_classes: int, name: Callable[[int], str]) -> None:
    """Refuse a label that the head does not have; `name` returns how a message calls the image at a place."""
    numbers = np.asarray(labels, dtype=np.int64)
    outside = np.flatnonzero((numbers < 0) | (numbers >= num_classes))
    if len(outside):
        first = int(outside[0])
        raise InputError(
            f"each label must be a whole number from 0 to {num_classes - 1}, as the model has {num_classes} classes, "
            f"got {numbers[first]} for {name(first)} ({len(outside)} of {len(numbers)} labels are outside); "
            "choose another model, split or label"
        )


def head_labels(class_names: Sequence[str], num_classes: int, source: str) -> list[int]:
    """Return the head's label of each class of a dataset; refuse other classes than the head's, or another order."""
    if are_synsets(class_names, num_classes):
        return [imagenet_labels()[name] for name in class_names]
    if len(class_names) != num_classes:
        raise InputError(
            f"the classes of {source} must be the model's {num_classes}, got {len(class_names)} "
            f"({some_of(class_names)}); choose a model with {len(class_names)} classes"
        )
    if num_classes == IMAGENET_CLASSES:
        for label, name in enumerate(class_names):
            # A name that the head knows must stand in its place; other names cannot be checked.
            places = _described().get(name.lower(), {label})
            if label not in places:
                raise InputError(
                    f"the classes of {source} must stand in the order of the 1000 ImageNet classes, got {name!r} "
                    f"as class {label}, which is class {min(places)} of the model; number the labels anew"
                )
    return list(range(num_classes))


@functools.cache
def _described() -> dict[str, set[int]]:
    info = _imagenet()
    places: defaultdict[str, set[int]] = defaultdict(set)
    for label in range(IMAGENET_CLASSES):
        # Two classes are called "crane".
        places[info.index_to_description(label).lower()].add(label)
        places[info.index_to_label_name(label)].add(label)
    return dict(places)


def _imagenet() -> Any:
    from timm.data.imagenet_info import ImageNetInfo  # timm takes seconds to import

    return ImageNetInfo("imagenet-1k")
