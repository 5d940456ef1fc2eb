"""What the loader knows of a source of images, wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, TypeVar

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

AnyImages = TypeVar("AnyImages", bound="Images")


class Images(Protocol):
    """Labelled images in a fixed order, each of which can be read alone.

    It is sent to the loader's workers, so it can be pickled, and opens a file only to read one image: no
    handle is shared between processes.
    """

    @property
    def root(self) -> Path | str:
        """Where the images lie, for messages."""

    @property
    def labels(self) -> Sequence[int]:
        """Index of the class in the model's output, one for each image."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """How a message calls this image."""

    def read(self, index: int) -> BinaryIO:
        """The image as it is stored, still encoded.

        Raises:
            OSError: it cannot be read.
        """

    def select(self: AnyImages, indices: Sequence[int]) -> AnyImages:
        """The images at these places, in this order."""

    def fingerprint(self) -> str:
        """SHA-256 over what names the images, and their labels, in order: equal wherever the data lies."""
