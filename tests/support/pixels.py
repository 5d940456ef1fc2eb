"""Images in memory that say which they are, and a loader of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vbp.data.loader import ImageLoader, make_loader


@dataclass(frozen=True)
class Pixels:
    """Images in memory, each of one pixel that says which it is; some cannot be read."""

    count: int
    bad: frozenset[int] = frozenset()
    read_so_far: list[int] = field(default_factory=list)
    root = "memory"

    @property
    def labels(self) -> Sequence[int]:
        return tuple(index % 7 for index in range(self.count))

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"pixel {index}"

    def read(self, index: int) -> BinaryIO:
        self.read_so_far.append(index)
        if index in self.bad:
            raise OSError("bad sector")
        stream = io.BytesIO()
        Image.fromarray(np.full((1, 1, 3), index, dtype=np.uint8)).save(stream, "PNG")
        stream.seek(0)
        return stream

    def select(self, indices: Sequence[int]) -> Pixels:
        raise NotImplementedError

    def fingerprint(self) -> str:
        raise NotImplementedError


def number_and_noise(image: Image.Image) -> Tensor:
    """Return which image it is, and what a random transform would draw for it."""
    return torch.cat([torch.tensor([float(image.getpixel((0, 0))[0])]), torch.rand(2)]).reshape(3, 1, 1)


def loader(
    images: Pixels, batch_size: int = 3, *, workers: int = 0, shuffle: bool = True, rank: int = 0, world: int = 1
) -> ImageLoader:
    return make_loader(
        images,
        number_and_noise,
        batch_size=batch_size,
        num_workers=workers,
        shuffle=shuffle,
        seed=4,
        max_unreadable=0.1,
        prefetch=1,
        rank=rank,
        world=world,
    )
