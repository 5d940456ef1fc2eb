"""Class folders: which there are, which label each has, which images lie in them."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from timm.data.imagenet_info import ImageNetInfo
from torchvision.datasets.folder import IMG_EXTENSIONS

from vbp.data.image_index import Listing, Source
from vbp.errors import InputError

logger = logging.getLogger(__name__)

IMAGENET_CLASSES = 1000
_SHOWN = 5  # names given in a message before "..."


def scan_split(data_path: Path, split: str, source: Source) -> Listing:
    """List `data_path/<split>/<class>/**`, classes and paths sorted, hidden entries left out.

    Raises:
        InputError: there is no such folder, no class, no image, or the classes do not fit the model.
    """
    folder = data_path / split
    if not folder.is_dir():
        raise InputError(
            f"the data must hold a folder {folder} with one folder of images for each class, found none; "
            f"check data_path"
        )
    # Taken before the folder is read: a change in between makes the kept list stale, never wrong.
    directories = {split: folder.stat().st_mtime_ns}
    names = class_names(folder)
    labels = label_classes(folder, names, source.num_classes)
    found = {name: sorted(_walk(folder / name, f"{split}/{name}", frozenset(), directories)) for name in names}
    _check_empty_classes(folder, found, source.num_classes)
    return Listing(
        tuple(path for name in names for path in found[name]),
        tuple(labels[name] for name in names for _ in found[name]),
        dataclasses.replace(source, directories=directories),
    )


def class_names(folder: Path) -> list[str]:
    """The class folders of a split, sorted.

    Raises:
        InputError: it holds no folder.
    """
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        loose = sum(_is_image(entry.name) for entry in entries)
        raise InputError(
            f"{folder} must hold one folder of images for each class, found none"
            + (f" but {loose} images; move each into the folder of its class" if loose else "")
        )
    return names


def label_classes(folder: Path, names: list[str], num_classes: int) -> dict[str, int]:
    """Number the classes as the model does.

    Raises:
        InputError: the folders are not the model's classes.
    """
    if num_classes == IMAGENET_CLASSES:
        canonical = imagenet_labels()
        strays = [name for name in names if name not in canonical]
        if not strays:
            return {name: canonical[name] for name in names}
        if len(strays) < len(names):
            raise InputError(
                f"the class folders of {folder} must all be ImageNet-1k synsets, or none of them, "
                f"got {_some(strays)} among {len(names) - len(strays)} synsets; move the other folders away"
            )
    if len(names) != num_classes:
        raise InputError(
            f"{folder} must hold one folder for each of the model's {num_classes} classes, "
            f"found {len(names)} ({_some(names)}); choose a model with {len(names)} classes or complete the "
            f"data (only ImageNet synset folders of a model with 1000 classes may be a part of the whole)"
        )
    return {name: label for label, name in enumerate(sorted(names))}


def check_same_classes(data_path: Path, num_classes: int) -> None:
    """Refuse a `train` and a `val` with different classes, whose labels would not mean the same.

    ImageNet synset folders are free to differ: their labels come from the name alone.

    Raises:
        InputError: a class is in one of the two only.
    """
    folders = [data_path / split for split in ("train", "val")]
    if not all(folder.is_dir() for folder in folders):
        return
    if any((data_path / f"{folder.name}_samples.pkl").is_file() for folder in folders):
        return
    train, val = (set(class_names(folder)) for folder in folders)
    if train == val:
        return
    if num_classes == IMAGENET_CLASSES and (train | val) <= imagenet_labels().keys():
        return
    raise InputError(
        f"train and val of {data_path} must hold the same class folders, "
        f"found only in train: {_some(sorted(train - val)) or 'none'}; "
        f"only in val: {_some(sorted(val - train)) or 'none'}"
    )


@functools.cache
def imagenet_labels() -> dict[str, int]:
    """Synset to label for the 1,000 classes of ImageNet-1k, in the order that every pretrained head uses."""
    info = ImageNetInfo("imagenet-1k")
    return {info.index_to_label_name(label): label for label in range(IMAGENET_CLASSES)}


def _walk(
    folder: Path, relative: str, above: frozenset[tuple[int, int]], directories: dict[str, int]
) -> Iterator[str]:
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link to a folder above it: following it would never end
        return
    directories[relative] = status.st_mtime_ns
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{relative}/{entry.name}"
            if entry.is_dir():
                yield from _walk(folder / entry.name, path, above | {identity}, directories)
            elif _is_image(entry.name):
                yield path


def _check_empty_classes(folder: Path, found: dict[str, list[str]], num_classes: int) -> None:
    empty = [name for name, paths in found.items() if not paths]
    if len(empty) == len(found):
        raise InputError(
            f"{folder} must hold images ({', '.join(IMG_EXTENSIONS)}), found none in {len(found)} class folders"
        )
    if not empty:
        return
    if num_classes == IMAGENET_CLASSES and found.keys() <= imagenet_labels().keys():
        logger.warning("%d class folders of %s hold no image: %s", len(empty), folder, _some(empty))
        return
    raise InputError(
        f"each class folder of {folder} must hold images, found none in {_some(empty)}; "
        f"add images or remove the class from the model and the data"
    )


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "")
