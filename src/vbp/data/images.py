"""Describe a source of images to the loader, and take a part of them: evenly from every class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, TypeVar

import numpy as np
import torch

from vbp.errors import InputError

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
        """Return where the images lie, for messages."""

    @property
    def labels(self) -> Sequence[int]:
        """Return the index of the class in the model's output, one for each image."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what a message calls this image."""

    def read(self, index: int) -> BinaryIO:
        """Return the image as it is stored, still encoded.

        Raises:
            OSError: It cannot be read.
        """

    def select(self: AnyImages, indices: Sequence[int]) -> AnyImages:
        """Return the images at these places, in this order."""

    def fingerprint(self) -> str:
        """Return the SHA-256 over what names the images, and their labels, in order: equal wherever the data lies."""


def balanced_subset(images: AnyImages, count: int, seed: int) -> AnyImages:
    """Draw `count` images so that the classes' shares differ by at most one image.

    All images of a class that has too few are taken, and more of the others in their place, evenly. The drawn images
    keep their order. 0, or a count not below the number of images, takes all of them.

    Raises:
        InputError: `count` is negative.

    Example:
        >>> len(vbp.balanced_subset(train, 7, seed=0))
        7
    """
    if count < 0:
        raise InputError(f"the number of images must be 0 (all of them) or more, got {count}")
    if count == 0 or count >= len(images):
        return images
    return images.select(sorted(balanced_order(images, seed)[:count]))


def balanced_order(images: Images, seed: int) -> tuple[int, ...]:
    """Order all images so that the first `count`, for every `count`, are those that `balanced_subset` draws."""
    generator = torch.Generator().manual_seed(seed)
    classes, class_of = np.unique(np.asarray(images.labels, dtype=np.int64), return_inverse=True)
    # The order of the classes decides which of them give the one image more.
    turn = torch.randperm(len(classes), generator=generator).numpy()
    drawn = torch.randperm(len(images), generator=generator).numpy()
    drawn_class = class_of[drawn]
    by_class = np.argsort(drawn_class, kind="stable")
    sizes = np.bincount(drawn_class, minlength=len(classes))
    # Which draw of its class an image is: its place among all draws of the class, counted from 0.
    rounds = np.empty(len(images), dtype=np.int64)
    rounds[by_class] = np.arange(len(images)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # By round, then by turn: each round takes one image from every class that still has one.
    order = np.lexsort((turn[drawn_class], rounds))
    return tuple(drawn[order].tolist())
