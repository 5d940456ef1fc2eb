"""The images of a folder: which class folders there are, which label each has, which images a split holds."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from timm.data.imagenet_info import ImageNetInfo
from torchvision.datasets.folder import IMG_EXTENSIONS

from vbp.data.images import SPLITS
from vbp.data.listing_cache import Listing, Source, read_index, write_index
from vbp.data.sample_pickle import read_samples
from vbp.errors import InputError

_log = logging.getLogger(__name__)

IMAGENET_CLASSES = 1000
_SHOWN = 5  # names given in a message before "..."


def scan_split(data_path: Path, split: str, source: Source) -> Listing:
    """List `data_path/<split>/<class>/**`, classes and paths sorted, hidden entries left out.

    Raises:
        InputError: There is no such folder, no class, no image, or the classes do not fit the model.
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
    """Return the class folders of a split, sorted.

    Raises:
        InputError: It holds no folder.
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
        InputError: The folders are not the model's classes.
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
        InputError: A class is in one of the two only.
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
    """Return the label of each of the 1,000 synsets of ImageNet-1k, in the order that every pretrained head uses."""
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
        _log.warning("%d class folders of %s hold no image: %s", len(empty), folder, _some(empty))
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


@dataclass(frozen=True)
class ImageList:
    """Images of a folder and their labels, in a fixed order.

    Attributes:
        root: The data folder.
        paths: Image files, relative to `root` where they lie inside it, with forward slashes.
        labels: Index of the class in the model's output, one for each path.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.paths) != len(self.labels):
            raise InputError(
                f"an image list needs one label for each path, got {len(self.paths)} paths "
                f"and {len(self.labels)} labels"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """Return where the image lies on disk."""
        return self.root / self.paths[index]

    def name(self, index: int) -> str:
        """Return the path of the image."""
        return str(self.file(index))

    def read(self, index: int) -> BinaryIO:
        """Return the open file."""
        return self.file(index).open("rb")

    def select(self, indices: Sequence[int]) -> ImageList:
        """Return the images at these places, in this order."""
        return ImageList(self.root, tuple(self.paths[i] for i in indices), tuple(self.labels[i] for i in indices))

    def fingerprint(self) -> str:
        """Return the SHA-256 over paths and labels, in order: equal wherever the data folder lies."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            # A zero byte cannot occur in a path, so no two lists give the same bytes.
            digest.update(f"{label}\0{path}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()


def list_folder(data_path: Path, split: str, num_classes: int) -> ImageList:
    """List the images of `data_path/<split>/<class>/`, or of `data_path/<split>_samples.pkl` if there is one.

    A model with 1,000 classes and folders named by ImageNet synsets: a label is the synset's place among
    the 1,000, even where folders are missing. Otherwise there must be one folder for each class, and labels
    follow the sorted folder names, which `train` and `val` must share.

    The list is kept in `data_path/<split>_index.tsv` and made anew when the folder changes.

    Raises:
        InputError: A folder is missing or empty, the classes do not fit the model, or a samples file is bad.
    """
    listing = _listing(data_path, split, num_classes)
    return ImageList(data_path, listing.paths, listing.labels)


def check_folder_splits(data_path: Path) -> None:
    """Find out without reading a folder whether both splits are there; a list of samples needs none beside it.

    Raises:
        InputError: One is missing.
    """
    for split in SPLITS:
        if not (data_path / split).is_dir() and not (data_path / f"{split}_samples.pkl").is_file():
            missing = data_path / split if data_path.is_dir() else data_path
            raise InputError(f"data_path must hold train/<class>/ and val/<class>/, got no folder {missing}")


def _listing(data_path: Path, split: str, num_classes: int) -> Listing:
    if not data_path.is_dir():
        found = "is no folder" if data_path.exists() else "does not exist"
        raise InputError(
            f"data_path must be a folder with train/<class>/ and val/<class>/ inside, got {data_path}, which {found}"
        )
    samples = data_path / f"{split}_samples.pkl"
    source = Source.of(samples, num_classes)
    if source.samples_file is None:
        check_same_classes(data_path, num_classes)
    listing = read_index(data_path, split, source)
    if listing is None:
        _log.info("listing the images of %s", data_path / split if source.samples_file is None else samples)
        if source.samples_file is None:
            listing = scan_split(data_path, split, source)
        else:
            listing = read_samples(samples, source)
        write_index(data_path, split, listing)
    return listing
