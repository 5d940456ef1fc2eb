"""List the images of a folder and label them by their class folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from vbp.data.images import IMAGE_EXTENSIONS, SPLITS
from vbp.data.labels import IMAGENET_CLASSES, are_synsets, imagenet_labels
from vbp.data.listing_cache import Row, read_rows, write_rows
from vbp.data.sample_pickle import read_samples
from vbp.errors import InputError, some_of
from vbp.runtime.fingerprints import text_fingerprint

_log = logging.getLogger(__name__)
_FORMAT = "vbp-image-index/2"


def scan_split(data_path: Path, split: str, num_classes: int) -> tuple[list[Row], dict[str, int]]:
    """List `data_path/<split>/<class>/**`, classes and paths sorted, hidden entries left out.

    Return label and path of each image, and the modification time in nanoseconds of each folder that was read.
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
    labels = label_classes(folder, names, num_classes)
    paths = {name: sorted(_walk(folder / name, f"{split}/{name}", frozenset(), directories)) for name in names}
    _check_empty_classes(folder, paths, num_classes)
    return [(labels[name], path) for name in names for path in paths[name]], directories


def class_names(folder: Path) -> list[str]:
    """Return the class folders of a split, sorted; there must be one."""
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
    """Number the classes as the model does, and refuse folders that are not its classes."""
    if num_classes == IMAGENET_CLASSES:
        canonical = imagenet_labels()
        strays = [name for name in names if name not in canonical]
        if not strays:
            return {name: canonical[name] for name in names}
        if len(strays) < len(names):
            raise InputError(
                f"the class folders of {folder} must all be ImageNet-1k synsets, or none of them, "
                f"got {some_of(strays)} among {len(names) - len(strays)} synsets; move the other folders away"
            )
    if len(names) != num_classes:
        raise InputError(
            f"{folder} must hold one folder for each of the model's {num_classes} classes, "
            f"found {len(names)} ({some_of(names)}); choose a model with {len(names)} classes or complete the "
            f"data (only ImageNet synset folders of a model with 1000 classes may be a part of the whole)"
        )
    return {name: label for label, name in enumerate(sorted(names))}


def check_same_classes(data_path: Path, num_classes: int) -> None:
    """Refuse a `train` and a `val` with different classes, whose labels would not mean the same.

    ImageNet synset folders are free to differ: their labels come from the name alone.
    """
    folders = [data_path / split for split in SPLITS]
    if not all(folder.is_dir() for folder in folders) or any(samples_file(folder).is_file() for folder in folders):
        return
    train, val = (set(class_names(folder)) for folder in folders)
    if train == val or are_synsets(train | val, num_classes):
        return
    raise InputError(
        f"train and val of {data_path} must hold the same class folders, "
        f"found only in train: {some_of(sorted(train - val)) or 'none'}; "
        f"only in val: {some_of(sorted(val - train)) or 'none'}"
    )


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


def _check_empty_classes(folder: Path, paths: dict[str, list[str]], num_classes: int) -> None:
    empty = [name for name, own in paths.items() if not own]
    if len(empty) == len(paths):
        raise InputError(
            f"{folder} must hold images ({', '.join(IMAGE_EXTENSIONS)}), found none in {len(paths)} class folders"
        )
    if empty and not are_synsets(paths, num_classes):
        raise InputError(
            f"each class folder of {folder} must hold images, found none in {some_of(empty)}; "
            f"add images or remove the class from the model and the data"
        )
    if empty:
        _log.warning("%d class folders of %s hold no image: %s", len(empty), folder, some_of(empty))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def samples_file(folder: Path) -> Path:
    """Return the list of samples that may stand in the place of a split's folder."""
    return folder.with_name(f"{folder.name}_samples.pkl")


@dataclass(frozen=True)
class ImageList:
    """Image files, relative to `root` where they lie inside it, with forward slashes; and the label of each."""

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
        # A zero byte cannot occur in a path, so no two lists give the same bytes.
        return text_fingerprint(f"{label}\0{path}\0" for path, label in zip(self.paths, self.labels, strict=True))


def list_folder(data_path: Path, split: str, num_classes: int) -> ImageList:
    """List the images of `data_path/<split>/<class>/`, or of `data_path/<split>_samples.pkl` if there is one.

    A model with 1,000 classes and folders named by ImageNet synsets: a label is the synset's place among
    the 1,000, even where folders are missing. Otherwise there must be one folder for each class, and labels
    follow the sorted folder names, which `train` and `val` must share.

    The list is kept in `data_path/<split>_index.jsonl` and made anew when a folder changes: its time does
    when an entry is added, removed or renamed.
    """
    if not data_path.is_dir():
        got = "is no folder" if data_path.exists() else "does not exist"
        raise InputError(
            f"data_path must be a folder with train/<class>/ and val/<class>/ inside, got {data_path}, which {got}"
        )
    samples, index = samples_file(data_path / split), data_path / f"{split}_index.jsonl"
    # The labels of one folder differ with the class count of the model.
    made_from: dict[str, Any] = {"num_classes": num_classes, "samples_file": None}
    if samples.is_file():
        status = samples.stat()
        made_from["samples_file"] = [status.st_size, status.st_mtime_ns]
    else:
        check_same_classes(data_path, num_classes)
    rows = read_rows(
        index, _FORMAT, partial(_is_row, num_classes), lambda kept: _is_current(data_path, kept, made_from)
    )
    if rows is None:
        directories: dict[str, int] = {}
        if made_from["samples_file"] is None:
            _log.info("listing the images of %s", data_path / split)
            rows, directories = scan_split(data_path, split, num_classes)
        else:
            _log.info("listing the images of %s", samples)
            rows = read_samples(samples, num_classes)
        write_rows(index, _FORMAT, {**made_from, "directories": directories}, rows)
    return ImageList(data_path, tuple(path for _, path in rows), tuple(label for label, _ in rows))


def _is_row(num_classes: int, row: Row) -> bool:
    if [*map(type, row)] != [int, str]:
        return False
    label, path = row
    return 0 <= label < num_classes and "\0" not in path


def _is_current(data_path: Path, kept: Mapping[str, Any], made_from: Mapping[str, Any]) -> bool:
    directories = kept["directories"].items()
    try:
        return kept == {**made_from, "directories": kept["directories"]} and all(
            (data_path / name).stat().st_mtime_ns == time for name, time in directories
        )
    except (OSError, ValueError):  # gone, or no possible path
        return False


def check_folder_splits(data_path: Path) -> None:
    """Stop unless both splits are there; a list of samples needs no folder beside it."""
    for split in SPLITS:
        if not (data_path / split).is_dir() and not samples_file(data_path / split).is_file():
            missing = data_path / split if data_path.is_dir() else data_path
            raise InputError(f"data_path must hold train/<class>/ and val/<class>/, got no folder {missing}")
