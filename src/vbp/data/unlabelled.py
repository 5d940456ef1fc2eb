"""List images without labels: any folder of images, in `train` and `val` or not, or the image column of a dataset."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vbp.data.data_path import DataPath, list_images
from vbp.data.folder import ImageList, images_below, samples_file
from vbp.data.hf_dataset import list_rows
from vbp.data.images import SPLITS, Images, Split
from vbp.errors import InputError

_log = logging.getLogger(__name__)

# Where the folder has no `val`: one image in this many is for validation, the others are for calibration.
_ONE_IN: Final = 5


def has_labels(data_path: Path | str) -> bool:
    """Return whether data says of which class each image is: all but a folder of images without class folders."""
    path = DataPath.parse(data_path)
    if path.kind != "folder":
        return True
    splits = [Path(path.place) / split for split in SPLITS]
    if any(samples_file(split).is_file() for split in splits):
        return True
    return any(split.is_dir() and any(_is_class(entry) for entry in split.iterdir()) for split in splits)


def list_splits(
    data_path: Path | str, num_classes: int, class_names: Sequence[str] | None
) -> tuple[Images, Images, bool]:
    """List the images for calibration and for validation; return also whether they have labels.

    Those of a model of no classes have none, nor those of a folder without class folders.

    Raises:
        InputError: The data is missing or damaged, or does not fit the model.
    """
    labelled = num_classes > 0 and has_labels(data_path)
    if labelled:
        train, val = (list_images(data_path, split, num_classes, class_names) for split in SPLITS)
    else:
        train, val = (list_unlabelled(data_path, split) for split in SPLITS)
    return train, val, labelled


def list_unlabelled(data_path: Path | str, split: Split) -> Images:
    """List the images of a split, whatever the folders are called in which they lie; no class is asked for.

    Without `train` and `val` in the folder, every fifth of its images is for validation. Labels are those of the
    folders, by which a part is taken evenly from all of them, and mean nothing else.

    Raises:
        InputError: There is no image, only one of `train` and `val`, or the images are in WebDataset shards.
    """
    path = DataPath.parse(data_path)
    if path.kind == "wds":
        raise InputError(
            f"images without labels must lie in a folder or a Hugging Face dataset, got {data_path}; unpack shards"
        )
    try:
        if path.kind == "hfds":
            images: Images = list_rows(path.place, path.options, split, 0)
        else:
            images = _of_folder(Path(path.place), split)
    except OSError as error:
        raise InputError(
            f"the images of {data_path} must be readable, got {error.strerror} for {error.filename}"
        ) from error
    if not len(images):
        raise InputError(f"{data_path} must hold images for {split}, got none; check data_path")
    _log.info("%s: %d images, without labels", split, len(images))
    return images


def _of_folder(folder: Path, split: Split) -> ImageList:
    there = [name for name in SPLITS if (folder / name).is_dir()]
    if len(there) == 1:
        raise InputError(
            f"data_path must hold both train and val, or neither, got only {there[0]} in {folder}; make the other, "
            "or give the folder with the images itself"
        )
    if not folder.is_dir():
        raise InputError(f"data_path must be a folder with images, got {folder}, which is none")
    if there:
        return _listed(folder, images_below(folder / split))
    folder = folder if folder.name else folder.resolve()
    paths = images_below(folder)
    _log.info("%s has no train and val: one image in %d is for validation", folder, _ONE_IN)
    chosen = [path for place, path in enumerate(paths) if (place % _ONE_IN == 0) == (split == "val")]
    return _listed(folder.parent, chosen)


def _listed(root: Path, paths: list[str]) -> ImageList:
    folders = [path.rpartition("/")[0] for path in paths]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(folders))}
    return ImageList(root, tuple(paths), tuple(numbers[name] for name in folders))


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")
