"""Read a `data_path` and list its images: a folder, `hfds/...` or `wds/...` (options after a `?`)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, overload

from vbp.data.folder import (
    ImageList,
    check_folder_splits,
    class_folder_names,
    images_below,
    list_folder,
    samples_file,
)
from vbp.data.hf_dataset import check_dataset, list_rows
from vbp.data.images import SPLITS, Images, Split
from vbp.data.labels import labels_by_name
from vbp.data.shards import check_shards, list_samples
from vbp.errors import InputError
from vbp.runtime.files import check_path

_log = logging.getLogger(__name__)

# The package that each kind needs; a folder needs none.
_PACKAGES = {"hfds": "datasets", "wds": "webdataset"}
_OPTIONS = ("train", "val", "image", "label")


@dataclass(frozen=True)
class DataPath:
    """A data path, taken apart: `place` is the folder, dataset id or pattern, `options` what follows the `?`."""

    kind: Literal["folder", "hfds", "wds"]
    place: str
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, data_path: Path | str) -> DataPath:
        """Take a data path apart; a `Path` is always a folder. Stop if a package that it needs is not installed."""
        kind, slash, rest = str(data_path).partition("/")
        if isinstance(data_path, Path) or not slash or kind not in _PACKAGES:
            return cls("folder", _local(str(data_path)))
        place, _, query = rest.partition("?")
        if not place:
            raise InputError(f"data_path must say what to read after {kind}/, got {data_path!r}")
        if importlib.util.find_spec(_PACKAGES[kind]) is None:
            raise InputError(
                f"data_path {data_path} needs the package {_PACKAGES[kind]}, which is not installed; "
                "pip install 'vbp-pruning[data]'"
            )
        return cls("hfds" if kind == "hfds" else "wds", _local(place), _options(query, str(data_path)))


def _options(query: str, data_path: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in query.split("&") if query else []:
        name, _, value = part.partition("=")
        if name not in _OPTIONS or not value or name in options:
            raise InputError(
                f"the options of data_path must be {', '.join(f'{option}=...' for option in _OPTIONS)}, each once at "
                f"most and joined by &, got {part!r} in {data_path}"
            )
        options[name] = value
    return options


def _local(place: str) -> str:
    if "://" in place or place.startswith("pipe:"):
        raise InputError(f"the data must lie in local files, got {place}; copy it to a local disk first")
    if not place.endswith(".tar"):  # a pattern of shards may list many
        check_path(place, "data_path")
    return place


@overload
def list_images(
    data_path: Path, split: Split, num_classes: int, class_names: Sequence[str] | None = None
) -> ImageList: ...


@overload
def list_images(
    data_path: Path | str, split: Split, num_classes: int, class_names: Sequence[str] | None = None
) -> Images: ...


def list_images(
    data_path: Path | str, split: Split, num_classes: int, class_names: Sequence[str] | None = None
) -> Images:
    """List the images of a split, with labels as the model's head numbers them.

    Args:
        data_path: A folder with `train/<class>/` and `val/<class>/`; or `hfds/` and a Hugging Face dataset; or
            `wds/` and WebDataset shards. docs/data.md has the grammar. A `Path` is always a folder.
        split: Which of the two.
        num_classes: Outputs of the model.
        class_names: What each of them stands for, if the model says it (`Classifier.class_names`): classes of the
            data that have these names are numbered by them.

    Raises:
        InputError: The data is missing or damaged, or does not fit the model.

    Example:
        >>> train = vbp.list_images(data, "train", num_classes=7)
    """
    if split not in SPLITS:
        raise InputError(f"split must be train or val, got {split!r}")
    if num_classes < 1:
        raise InputError(f"num_classes must be 1 or more, got {num_classes}")
    if class_names is not None and len(class_names) != num_classes:
        raise InputError(f"class_names must be one for each of {num_classes} classes, got {len(class_names)}")
    own = None if class_names is None else tuple(class_names)
    path = DataPath.parse(data_path)
    images: Images
    try:
        if path.kind == "folder":
            images = list_folder(Path(path.place), split, num_classes, own)
        elif path.kind == "hfds":
            images = list_rows(path.place, path.options, split, num_classes, own)
        else:
            images = list_samples(path.place, path.options, split, num_classes)
    except OSError as error:
        raise InputError(
            f"the images of {data_path} must be readable, got {error.strerror} for {error.filename}"
        ) from error
    classes = len(set(images.labels))
    _log.info("%s: %d images of %d of the model's %d classes", split, len(images), classes, num_classes)
    return images


def check_data_path(data_path: Path | str) -> None:
    """Stop before a model is loaded unless the data of both splits is there; no image is read."""
    path = DataPath.parse(data_path)
    if path.kind == "folder":
        check_folder_splits(Path(path.place))
    elif path.kind == "hfds":
        check_dataset(path.place, path.options)
    else:
        check_shards(path.place, path.options)


def check_outside(folder: Path, data_path: Path | str) -> None:
    """Stop if a folder that is to be written lies in a split of the data, where it would be taken for a class."""
    path = DataPath.parse(data_path)
    for split in SPLITS if path.kind == "folder" else ():
        images = Path(path.place) / split
        if folder.resolve().is_relative_to(images.resolve()):
            raise InputError(
                f"save_dir must lie outside of the images, got {folder} in {images}, where each folder is a class; "
                "choose another --save_dir"
            )


def class_folders(data_path: Path | str, num_classes: int) -> list[str]:
    """Return the class folders in the order of their labels; none where the data is kept another way.

    For a model that has no names of its own.
    """
    path = DataPath.parse(data_path)
    folder = Path(path.place) / SPLITS[0]
    if path.kind != "folder" or samples_file(folder).is_file():
        return []
    names = class_folder_names(folder)
    labels = labels_by_name(names, num_classes, str(folder))
    return names if labels is None else [name for _, name in sorted(zip(labels, names, strict=True))]


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
