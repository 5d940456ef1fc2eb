"""Which images to take if not all are: evenly from every class."""

from __future__ import annotations

import numpy as np
import torch

from vbp.data.images import AnyImages, Images
from vbp.errors import InputError


def balanced_subset(images: AnyImages, count: int, seed: int) -> AnyImages:
    """Draw `count` images so that the classes' shares differ by at most one image.

    A class that has too few gives all it has, and the others fill its place evenly. The drawn images keep
    their order. 0, or a count not below the number of images, gives all of them.

    Raises:
        InputError: `count` is negative.
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
