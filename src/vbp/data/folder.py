"""List the images of a folder and label them by their class folders."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from vbp.data.formats import IMAGE_EXTENSIONS
from vbp.data.images import SPLITS
from vbp.data.labels import NUMBER, ClassNames, head_labels, labels_by_name
from vbp.data.listing_cache import Row, read_rows, write_rows
from vbp.data.sample_pickle import read_samples
from vbp.errors import InputError, check_printable, some_of
from vbp.runtime.files import open_regular
from vbp.runtime.fingerprints import text_fingerprint

_log = logging.getLogger(__name__)
_FORMAT = "vbp-image-index/3"

# Folders that network disks and archivers make beside a user's own, with small copies of the images in them.
_FOREIGN = ("@eaDir", "#recycle", "__MACOSX")


@dataclass
class _Scan:
    """What a listing comes by: each folder's modification time in nanoseconds, and how much is left out, by kind."""

    times: dict[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def walk(self, folder: Path, relative: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        """Return the images below a folder, by their paths from `relative` on; `above` identifies those around it."""
        status = folder.stat()
        self.times[relative] = status.st_mtime_ns
        above |= {(status.st_dev, status.st_ino)}
        with os.scandir(folder) as entries:
            for entry in entries:
                if reason := _reason_to_leave(entry, above):
                    self.left_out[reason] += 1
                elif entry.is_dir():
                    yield from self.walk(folder / entry.name, f"{relative}/{entry.name}", above)
                else:
                    yield f"{relative}/{entry.name}"


def scan_split(folder: Path, labels: Mapping[str, int], named: bool) -> tuple[list[Row], _Scan]:
    """List the images of class folders, in the order of these, with sorted paths and the label of each.

    Args:
        folder: Of the split.
        labels: Class folder -> label.
        named: Whether the labels come from the names, so that a class without images is no error.
    """
    # Taken before the folder is read: a change in between makes the kept list stale, never wrong.
    scan = _Scan({folder.name: folder.stat().st_mtime_ns})
    above = _around(folder)
    with os.scandir(folder) as entries:
        others = [entry for entry in entries if entry.name not in labels]
    scan.left_out.update(_reason_to_leave(entry, above) or "images beside the class folders" for entry in others)
    paths = {name: sorted(scan.walk(folder / name, f"{folder.name}/{name}", above)) for name in labels}
    _check_empty_classes(folder, paths, named)
    return [(label, path) for name, label in labels.items() for path in paths[name]], scan


def images_below(folder: Path) -> list[str]:
    """Return the images in a folder and those below it, sorted, by their paths from the folder's own name on."""
    return sorted(_Scan().walk(folder, folder.name, _around(folder)))


def _around(folder: Path) -> frozenset[tuple[int, int]]:
    resolved = folder.resolve()
    return frozenset(
        (status.st_dev, status.st_ino) for status in (each.stat() for each in (resolved, *resolved.parents))
    )


def _reason_to_leave(entry: os.DirEntry[str], above: frozenset[tuple[int, int]]) -> str:
    """Return why an entry of a folder is neither an image nor a folder of images; nothing if it is one."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        if entry.name in _FOREIGN:
            return entry.name
        status = entry.stat()
        # Following a link to a folder above it would take other classes' images into this one, or never end.
        return "links to a folder above" if (status.st_dev, status.st_ino) in above else ""
    extension = Path(entry.name).suffix.lower()
    return "" if extension in IMAGE_EXTENSIONS else f"{extension or 'without extension'} (not read)"


def class_folder_names(folder: Path) -> list[str]:
    """Return the class folders of a split, sorted, numbers as such; there must be one."""
    if not folder.is_dir():
        raise InputError(
            f"the data must hold a folder {folder} with one folder of images for each class, found none; "
            f"check data_path"
        )
    above = _around(folder)
    with os.scandir(folder) as scanned:
        entries = [entry for entry in scanned if not _reason_to_leave(entry, above)]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise InputError(
            f"{folder} must hold one folder of images for each class, found none"
            + (f" but {len(entries)} images; move each into the folder of its class" if entries else "")
        )
    check_printable(names, "the names of class folders", str(folder))
    return sorted(names, key=int) if all(NUMBER.fullmatch(name) for name in names) else names


def _check_same_classes(data_path: Path, num_classes: int, own: ClassNames | None) -> None:
    """Refuse a `train` and a `val` with different classes, whose labels would not mean the same.

    Folders with the names of the head's classes are free to differ: their labels come from the name alone.
    """
    folders = [data_path / split for split in SPLITS]
    if not all(folder.is_dir() for folder in folders) or any(samples_file(folder).is_file() for folder in folders):
        return
    train, val = (set(class_folder_names(folder)) for folder in folders)
    if train == val or labels_by_name(sorted(train | val), num_classes, str(data_path), own) is not None:
        return
    raise InputError(
        f"train and val of {data_path} must hold the same class folders, "
        f"found only in train: {some_of(sorted(train - val)) or 'none'}; "
        f"only in val: {some_of(sorted(val - train)) or 'none'}"
    )


def _check_empty_classes(folder: Path, paths: Mapping[str, list[str]], named: bool) -> None:
    empty = [name for name, own in paths.items() if not own]
    if len(empty) == len(paths):
        raise InputError(
            f"{folder} must hold images ({', '.join(IMAGE_EXTENSIONS)}), found none in {len(paths)} class folders"
        )
    if empty and not named:
        raise InputError(
            f"each class folder of {folder} must hold images, found none in {some_of(empty)}; "
            f"add images or remove the class from the model and the data"
        )
    if empty:
        _log.warning("%d class folders of %s hold no image: %s", len(empty), folder, some_of(empty))


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
        """Return the open file; an OSError says that it is none, or a pipe or device, which is not opened."""
        return open_regular(self.file(index))

    def select(self, indices: Sequence[int]) -> ImageList:
        """Return the images at these places, in this order."""
        return ImageList(self.root, tuple(self.paths[i] for i in indices), tuple(self.labels[i] for i in indices))

    def fingerprint(self) -> str:
        """Return the SHA-256 over paths and labels, in order: equal wherever the data folder lies."""
        # A zero byte cannot occur in a path, so no two lists give the same bytes.
        return text_fingerprint(f"{label}\0{path}\0" for path, label in zip(self.paths, self.labels, strict=True))


def list_folder(data_path: Path, split: str, num_classes: int, own: ClassNames | None = None) -> ImageList:
    """List the images of `data_path/<split>/<class>/`, or of `data_path/<split>_samples.pkl` if there is one.

    `head_labels` says how the class folders are numbered; `own` names the model's classes. Folders with such names
    may be missing; otherwise `train` and `val` must share theirs.

    The list is kept in `data_path/<split>_index.jsonl` and made anew when a folder changes: its time does
    when an entry is added, removed or renamed.
    """
    if not data_path.is_dir():
        got = "is no folder" if data_path.exists() else "does not exist"
        raise InputError(
            f"data_path must be a folder with train/<class>/ and val/<class>/ inside, got {data_path}, which {got}"
        )
    folder, index = data_path / split, data_path / f"{split}_index.jsonl"
    samples, labels = samples_file(folder), {}
    made_from: dict[str, Any]
    if samples.is_file():
        status = samples.stat()
        made_from = {"samples_file": [status.st_size, status.st_mtime_ns], "num_classes": num_classes}
        made_from["own"] = None if own is None else list(own)
    else:
        _check_same_classes(data_path, num_classes, own)
        names = class_folder_names(folder)
        labels = dict(zip(names, head_labels(names, num_classes, str(folder), own), strict=True))
        made_from = {"labels": labels}
    kept = read_rows(
        index, _FORMAT, partial(_is_row, num_classes), lambda kept: _is_current(data_path, kept, made_from)
    )
    if kept is None:
        _log.info("listing the images of %s", samples if samples.is_file() else folder)
        if samples.is_file():
            rows, scan = read_samples(samples, num_classes, own), _Scan()
        else:
            named = labels_by_name([*labels], num_classes, str(folder), own) is not None
            rows, scan = scan_split(folder, labels, named)
        made_from |= {"directories": scan.times, "left_out": scan.left_out}
        write_rows(index, _FORMAT, made_from, rows)
    else:
        made_from, rows = kept
    if made_from["left_out"]:
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(made_from["left_out"].items()))
        _log.info("left out of %s: %s", folder, left_out)
    return ImageList(data_path, tuple(path for _, path in rows), tuple(label for label, _ in rows))


def _is_row(num_classes: int, row: Row) -> bool:
    if [*map(type, row)] != [int, str]:
        return False
    label, path = row
    return 0 <= label < num_classes and "\0" not in path


def _is_current(data_path: Path, kept: Mapping[str, Any], made_from: Mapping[str, Any]) -> bool:
    directories = kept["directories"].items()
    try:
        found = {name: kept[name] for name in ("directories", "left_out")}
        return kept == {**made_from, **found} and all(
            (data_path / name).stat().st_mtime_ns == time for name, time in directories
        )
    except (OSError, ValueError):  # gone, or no possible path
        return False


def _has_images(folder: Path) -> bool:
    """Return whether images lie in a folder itself; false for what is no folder."""
    return folder.is_dir() and any(entry.suffix.lower() in IMAGE_EXTENSIONS for entry in folder.iterdir())


def check_folder_splits(data_path: Path) -> None:
    """Stop unless both splits are there, or images without any; a list of samples needs no folder beside it."""
    for split in SPLITS:
        if samples_file(data_path / split).is_file():
            continue
        if (data_path / split).is_dir():
            if not _has_images(data_path / split):  # without labels, for a model or a run that needs none
                class_folder_names(data_path / split)
        elif not any((data_path / each).is_dir() for each in SPLITS) and _has_images(data_path):
            return
        else:
            missing = data_path / split if data_path.is_dir() else data_path
            raise InputError(f"data_path must hold train/<class>/ and val/<class>/, got no folder {missing}")
