"""The images of a folder: which a split holds and which class each belongs to."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vbp.data.image_folder import check_same_classes, scan_split
from vbp.data.image_index import Listing, Source, read_index, write_index
from vbp.data.images import SPLITS
from vbp.data.sample_pickle import read_samples
from vbp.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageList:
    """Images of a folder and their labels, in a fixed order.

    Attributes:
        root: the data folder.
        paths: image files, relative to `root` where they lie inside it, with forward slashes.
        labels: index of the class in the model's output, one for each path.
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
        """Where the image lies on disk."""
        return self.root / self.paths[index]

    def name(self, index: int) -> str:
        """The path of the image."""
        return str(self.file(index))

    def read(self, index: int) -> BinaryIO:
        """The open file."""
        return self.file(index).open("rb")

    def select(self, indices: Sequence[int]) -> ImageList:
        """The images at these places, in this order."""
        return ImageList(self.root, tuple(self.paths[i] for i in indices), tuple(self.labels[i] for i in indices))

    def fingerprint(self) -> str:
        """SHA-256 over paths and labels, in order: equal wherever the data folder lies."""
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
        InputError: a folder is missing or empty, the classes do not fit the model, or a samples file is bad.
    """
    listing = _listing(data_path, split, num_classes)
    return ImageList(data_path, listing.paths, listing.labels)


def check_folder_splits(data_path: Path) -> None:
    """Find out without reading a folder whether both splits are there; a list of samples needs none beside it.

    Raises:
        InputError: one is missing.
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
        logger.info("listing the images of %s", data_path / split if source.samples_file is None else samples)
        if source.samples_file is None:
            listing = scan_split(data_path, split, source)
        else:
            listing = read_samples(samples, source)
        write_index(data_path, split, listing)
    return listing
