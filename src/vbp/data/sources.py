"""From `data_path` to images, whichever way they are kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import overload

from vbp.data.data_path import DataPath
from vbp.data.hugging_face import check_dataset, list_rows
from vbp.data.image_folder import class_names
from vbp.data.image_list import ImageList, check_folder_splits, list_folder
from vbp.data.images import SPLITS, Images, Split
from vbp.data.shards import check_shards, list_samples
from vbp.errors import InputError

logger = logging.getLogger(__name__)


@overload
def list_images(data_path: Path, split: Split, num_classes: int) -> ImageList: ...


@overload
def list_images(data_path: Path | str, split: Split, num_classes: int) -> Images: ...


def list_images(data_path: Path | str, split: Split, num_classes: int) -> Images:
    """List the images of a split, with labels as the model's head numbers them.

    Args:
        data_path: a folder with `train/<class>/` and `val/<class>/`; or `hfds/` and a Hugging Face dataset; or
            `wds/` and WebDataset shards. docs/data.md has the grammar. A `Path` is always a folder.
        split: which of the two.
        num_classes: outputs of the model.

    Raises:
        InputError: the data is missing or damaged, or does not fit the model.
    """
    if split not in SPLITS:
        raise InputError(f"split must be train or val, got {split!r}")
    if num_classes < 1:
        raise InputError(f"num_classes must be 1 or more, got {num_classes}")
    path = DataPath.parse(data_path)
    try:
        images = _list(path, split, num_classes)
    except OSError as error:
        raise InputError(
            f"the images of {data_path} must be readable, got {error.strerror} for {error.filename}"
        ) from error
    logger.info(
        "%s: %d images of %d of the model's %d classes",
        split,
        len(images),
        len(set(images.labels)),
        num_classes,
    )
    return images


def check_data_path(data_path: Path | str) -> None:
    """Find out before a model is loaded whether the data of both splits is there; no image is read.

    Raises:
        InputError: it is not, `data_path` does not follow the grammar, or a package is not installed.
    """
    path = DataPath.parse(data_path)
    if path.kind == "folder":
        check_folder_splits(Path(path.place))
    elif path.kind == "hfds":
        check_dataset(path.place, path.options)
    else:
        check_shards(path.place, path.options)


def class_folders(data_path: Path | str) -> list[str]:
    """The folders that name the classes, in the order of their labels; none where the data is kept another way."""
    path = DataPath.parse(data_path)
    folder = Path(path.place) / SPLITS[0]
    if path.kind != "folder" or folder.with_name(f"{SPLITS[0]}_samples.pkl").is_file():
        return []
    return class_names(folder)


def _list(path: DataPath, split: Split, num_classes: int) -> Images:
    if path.kind == "folder":
        return list_folder(Path(path.place), split, num_classes)
    if path.kind == "hfds":
        return list_rows(path.place, path.options, split, num_classes)
    return list_samples(path.place, path.options, split, num_classes)
