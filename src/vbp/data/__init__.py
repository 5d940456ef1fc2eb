"""Batches of images: the same ones whatever the number of workers, and whatever else the program draws."""

from __future__ import annotations

import hashlib
import logging
import math
import struct
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vbp.data.image_list import ImageList, Split, balanced_subset, list_images
from vbp.errors import InputError
from vbp.preprocessing import Transform

__all__ = ["ImageList", "ImageLoader", "Split", "balanced_subset", "list_images", "make_loader"]

logger = logging.getLogger(__name__)

# What Pillow's decoders raise on damaged files, beside OSError.
_DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, AttributeError),
    *(struct.error, MemoryError, Image.DecompressionBombError),
)


def make_loader(
    images: ImageList,
    transform: Transform,
    *,
    batch_size: int,
    num_workers: int,
    shuffle: bool = False,
    seed: int = 0,
    pin_memory: bool = False,
    max_unreadable: float = 0.01,
    drop_last: bool = False,
) -> ImageLoader:
    """Load the images in batches.

    Args:
        images: what to load.
        transform: turns one RGB image into a tensor; random ones must draw from torch's default generator.
        batch_size: images in a batch; less in the last one, and where an image could not be read.
        num_workers: processes that decode; 0 decodes in this one.
        shuffle: a new order in each epoch, fixed by `seed` and the epoch.
        seed: the random transform of an image depends on it, the epoch and the image's place alone.
        pin_memory: page-locked batches, faster to copy to a GPU; without a GPU it is not done.
        max_unreadable: share of the images that may be unreadable; at least one may be, unless it is 0.
        drop_last: leave out a last batch that is not full.

    Raises:
        InputError: a value is outside its range, or there is nothing to load.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be 1 or more, got {batch_size}")
    if num_workers < 0:
        raise InputError(f"num_workers must be 0 (decode in the main process) or more, got {num_workers}")
    if not 0 <= max_unreadable <= 1:
        raise InputError(f"max_unreadable must be a share in [0, 1], got {max_unreadable}")
    batches = _Batches(len(images), batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
    if len(batches) == 0:
        raise InputError(
            f"there must be images for one batch at least, got {len(images)} images for a batch_size of "
            f"{batch_size}; give more images or a smaller batch_size"
        )
    loader: DataLoader[_Sample] = DataLoader(
        _Images(images, transform, seed),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory and torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        # Without its own generator each epoch would take a number from the program's random stream.
        generator=torch.Generator().manual_seed(0),
    )
    return ImageLoader(images, loader, batches, max_unreadable)


class ImageLoader:
    """Iterates over `(images, labels)` batches; made by `make_loader`.

    Attributes:
        images: what is loaded.
        batch_size: images in a full batch.
        unreadable: file to reason, for each image that could not be read so far.
    """

    def __init__(
        self, images: ImageList, loader: DataLoader[_Sample], batches: _Batches, max_unreadable: float
    ) -> None:
        self.images = images
        self.batch_size = batches.batch_size
        self.unreadable: dict[str, str] = {}
        self._loader = loader
        self._batches = batches
        # One bad file must not stop a small run, but a list of a single image has none to spare.
        spare = 1 if len(images) > 1 and max_unreadable > 0 else 0
        self._allowed = max(spare, math.floor(max_unreadable * len(images)))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the random transforms of the iterations to come; they start at epoch 0."""
        self._batches.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch; fewer come if all images of one cannot be read."""
        return len(self._batches)

    def __iter__(
        self,
    ) -> Iterator[tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]]:
        """One epoch.

        Raises:
            InputError: too many images cannot be read.
        """
        empty = True
        for batch in self._loader:
            for file, reason in batch.failures:
                self._note(file, reason)
            if batch.images is not None:
                empty = False
                yield batch.images, batch.labels
        if empty:
            raise InputError(f"no image of {self.images.root} could be read: {self._first_few()}")

    def _note(self, file: str, reason: str) -> None:
        if file in self.unreadable:
            return
        self.unreadable[file] = reason
        logger.warning("cannot read the image %s (%s); it is left out", file, reason)
        count, total = len(self.unreadable), len(self.images)
        if count > self._allowed:
            raise InputError(
                f"at most {self._allowed} of {total} images may be unreadable, got {count} so far "
                f"({count / total:.1%}): {self._first_few()}; repair or remove them, or raise max_unreadable"
            )

    def _first_few(self) -> str:
        return ", ".join(list(self.unreadable)[:3]) + (", ..." if len(self.unreadable) > 3 else "")


class _Sample(NamedTuple):
    image: Tensor | None  # None: unreadable, for the reason given
    label: int
    file: str
    reason: str


class _Batch(NamedTuple):
    images: Tensor | None
    labels: Tensor
    failures: list[tuple[str, str]]


class _Images(Dataset[_Sample]):
    def __init__(self, images: ImageList, transform: Transform, seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        # The epoch comes with the index, as a worker that lives through epochs hears of nothing else.
        epoch, index = key
        file = self.images.file(index)
        label = self.images.labels[index]
        try:
            image = _read_rgb(str(file))
        except _DECODING_ERRORS as error:
            # Told by the main process: a worker's log may go nowhere.
            return _Sample(None, label, str(file), f"{type(error).__name__}: {error}")
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would also reseed the GPUs.
            torch.default_generator.manual_seed(_mix(self.seed, epoch, index))
            return _Sample(self.transform(image), label, str(file), "")


class _Batches:
    """The `(epoch, index)` keys of each batch."""

    def __init__(self, count: int, batch_size: int, *, shuffle: bool, seed: int, drop_last: bool) -> None:
        self.count = count
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    def __len__(self) -> int:
        return self.count // self.batch_size if self.drop_last else math.ceil(self.count / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch  # an epoch under way keeps its number
        if self.shuffle:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            order: list[int] | range = torch.randperm(self.count, generator=generator).tolist()
        else:
            order = range(self.count)
        for batch in range(len(self)):
            start = batch * self.batch_size
            yield [(epoch, index) for index in order[start : start + self.batch_size]]


def _read_rgb(file: str) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns of harmless things (odd EXIF data, transparent palettes); a file that it cannot
        # decode raises, and so does one that unpacks to twice its pixel limit.
        warnings.simplefilter("ignore")
        with Image.open(file) as image:
            return image.convert("RGB")


def _collate(samples: list[_Sample]) -> _Batch:
    failures = [(sample.file, sample.reason) for sample in samples if sample.image is None]
    images = [sample.image for sample in samples if sample.image is not None]
    labels = torch.tensor([sample.label for sample in samples if sample.image is not None], dtype=torch.int64)
    return _Batch(torch.stack(images) if images else None, labels, failures)


def _mix(*numbers: int) -> int:
    # A sum would give one image in one epoch the randomness of its neighbour in the next.
    text = ",".join(map(str, numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
