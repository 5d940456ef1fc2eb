"""Number classes as the model's head does: a known name before a position; check that given labels are the head's."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from vbp.errors import InputError, some_of

_log = logging.getLogger(__name__)
ClassNames = tuple[str, ...]
IMAGENET_CLASSES = 1000
_SYNSET = re.compile(r"(?<![A-Za-z0-9])n[0-9]{8}(?![0-9])")
NUMBER = re.compile(r"[0-9]{1,9}")


@functools.cache
def imagenet_labels() -> dict[str, int]:
    """Return the label of each of the 1,000 synsets of ImageNet-1k, in the order that every pretrained head uses."""
    info = _imagenet()
    return {info.index_to_label_name(label): label for label in range(IMAGENET_CLASSES)}


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


def labels_by_name(
    class_names: Sequence[str], num_classes: int, source: str, own: ClassNames | None = None
) -> list[int] | None:
    """Return the head's label of each class by its name alone; None where the head is known by none of the names.

    The head is known by the model's own names, and with 1,000 classes by ImageNet's synsets and English names unless
    its own names contradict that order. A name is the whole one or one of those between its commas; case and
    punctuation count only where they tell two names apart.

    Raises:
        InputError: Only some names are known, one stands for several classes, or two stand for one.
    """
    tables = _tables(num_classes, own)
    places = [_places(name, tables) for name in class_names]
    known = sum(map(bool, places))
    if known == 0:
        return None
    if 2 * known > len(places) == num_classes and all(label in at or not at for label, at in enumerate(places)):
        return list(range(num_classes))
    strays = [name for name, at in zip(class_names, places, strict=True) if not at]
    if own is None and len(places) == num_classes and len(strays) > known:
        return None  # names of its own, a few of which happen to be ImageNet's
    if strays:
        raise InputError(
            f"the classes of {source} must all have names of the model's classes, or none of them, got "
            f"{some_of(strays)} among {known} of its names; rename these classes or move them away"
        )
    labels = [min(at) for at in places]
    counts = Counter(labels)
    for at in places:
        if len(at) > 1 or counts[min(at)] > 1:
            same = [other for other, label in zip(class_names, labels, strict=True) if label in at]
            raise InputError(
                f"each class of {source} must stand for one of the model's and no other for the same, got "
                f"{', '.join(map(repr, same))} for {', '.join(map(str, sorted(at)))}; rename or join these classes "
                "(of ImageNet: by synset)"
            )
    return labels


def head_labels(
    class_names: Sequence[str], num_classes: int, source: str, own: ClassNames | None = None
) -> list[int]:
    """Return the head's label of each class of a dataset.

    By name where the head is known by the names (then some may be missing); else by number where the names are 0 to
    N - 1; else in the order given, where the model has no names of its own (`own`, one for each class).

    Raises:
        InputError: The classes are not those of the head.
    """
    labels = labels_by_name(class_names, num_classes, source, own)
    if labels is not None:
        return labels
    count = len(class_names)
    if count != num_classes:
        raise InputError(
            f"the classes of {source} must be the model's {num_classes}, got {count} ({some_of(class_names)}); "
            f"choose a model with {count} classes or complete the data (only classes that have the names of the "
            "model's may be a part of the whole)"
        )
    if all(NUMBER.fullmatch(name) for name in class_names):
        numbers = [int(name) for name in class_names]
        if sorted(numbers) == list(range(count)):
            return numbers
    if own is not None:
        raise InputError(
            f"the classes of {source} must have the names of the model's classes ({some_of(own)}), or the numbers 0 "
            f"to {count - 1}, got {some_of(class_names)}; rename them"
        )
    _log.info(
        "the %d classes of %s are numbered in their order (%s): the model has no class names to compare with",
        count, source, some_of(class_names),
    )  # fmt: skip
    return list(range(count))


def label_in_path(path: str, num_classes: int, own: ClassNames | None = None) -> int | None:
    """Return the label that the path of an image names: by its folder, or by a synset; None where it names none."""
    *_, folder = ("", *path.split("/")[:-1])
    if own is not None and own.count(folder) == 1:
        return own.index(folder)
    synsets = _SYNSET.findall(path)
    if not synsets or not _is_imagenet(num_classes, own):
        return None
    return imagenet_labels().get(synsets[-1])


_Table = Mapping[str, AbstractSet[int]]


@functools.lru_cache(8)
def _tables(num_classes: int, own: tuple[str, ...] | None) -> tuple[_Table, ...]:
    """Return which labels a name stands for: four tables for each list of names, as `_spellings` makes them."""
    tables = () if own is None else _spellings(own)
    return tables + _spellings([*imagenet_labels()]) + _english() if _is_imagenet(num_classes, own) else tables


@functools.lru_cache(8)
def _is_imagenet(num_classes: int, own: tuple[str, ...] | None) -> bool:
    """Return whether the head's classes are ImageNet's 1,000 in the usual order, as far as its own names say."""
    if num_classes != IMAGENET_CLASSES:
        return False
    places = [(label, _places(name, _english())) for label, name in enumerate(own or ())]
    return sum(label in at for label, at in places) >= sum(bool(at) and label not in at for label, at in places)


@functools.cache
def _english() -> tuple[_Table, ...]:
    return _spellings([_imagenet().index_to_description(label) for label in range(IMAGENET_CLASSES)])


def _spellings(names: Sequence[str]) -> tuple[_Table, ...]:
    """Return the labels by whole name, by a part between commas, and by both without case and punctuation."""
    tables: tuple[defaultdict[str, set[int]], ...] = tuple(defaultdict(set) for _ in range(4))
    for label, name in enumerate(names):
        parts = name.split(", ")
        for table, spellings in zip(tables, ([name], parts, [_plain(name)], map(_plain, parts)), strict=True):
            for spelling in spellings:
                table[spelling].add(label)
    return tuple(dict(table) for table in tables)


def _places(name: str, tables: Sequence[_Table]) -> AbstractSet[int]:
    keys = itertools.cycle((name, name, _plain(name), _plain(name)))
    return next((table[key] for table, key in zip(tables, keys, strict=False) if key in table), frozenset())


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[\W_]+", " ", name).casefold().split())


def _imagenet() -> Any:
    from timm.data.imagenet_info import ImageNetInfo  # timm takes seconds to import

    return ImageNetInfo("imagenet-1k")
