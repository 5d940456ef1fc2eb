"""Calibration images: which of them this process reads, in which views, and the random numbers of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from vbp.data.formats import MAX_PIXELS
from vbp.data.images import Images, balanced_order
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import Preprocessing, Transform, ViewTransform, evaluation_transform
from vbp.errors import InputError
from vbp.method.sampling import RandomProbes
from vbp.runtime.fingerprints import json_fingerprint
from vbp.runtime.session import ALONE, Session
from vbp.statistics.batches import check_repeatable, part_of, pixels_of

# Views of an image for the refits after surgery, where these take seconds. On a CPU they would take a quarter of an
# hour a plan on DeiT-tiny.
_GPU_VIEWS = 4

# Least share of the image in a view: those by which networks are trained may show next to nothing.
LEAST_CROP = 0.35

# Images that go forward and backward at a time: what a batch leaves in memory for the backward pass is a hundred
# megabytes an image on a ViT-Base.
_CPU_PIECE, _GPU_PIECE = 16, 64


@dataclass(frozen=True)
class Pixels:
    """Batches of images without labels, which can be gone through again: this process's share.

    So many that follow each other as `views` says are views of one image; `probes` are their random numbers.
    """

    read: Callable[[], Iterable[Tensor]]
    probes: RandomProbes = field(default_factory=RandomProbes)
    views: int = 1

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.read())


@dataclass(frozen=True)
class CalibrationImages:
    """Labelled images, read as for evaluation, in the order of `balanced_order`, shared by the session's processes.

    The seed is that of the order and of all random numbers that belong to the images; `prefetch` the batches that
    each worker reads ahead. Every second view is mirrored with `hflip`, and shows a share of the image in
    `crop_scale`. Statistics are made of so many `views` of each image. An image with more than `max_pixels` counts as
    unreadable.
    """

    images: Images
    preprocessing: Preprocessing
    session: Session = ALONE
    seed: int = 0
    batch_size: int = 64
    num_workers: int = 0
    prefetch: int = 2
    hflip: bool = True
    crop_scale: tuple[float, float] = (LEAST_CROP, 1.0)
    max_pixels: int = MAX_PIXELS
    views: int = 1

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Return the images' places in the list, in the order in which they are read."""
        return balanced_order(self.images, self.seed)

    @cached_property
    def fingerprint(self) -> str:
        """Return a fingerprint of images and preprocessing."""
        return json_fingerprint([self.images.fingerprint(), self.preprocessing.to_dict()])

    def share(self, places: range, views: int = 1) -> ImageLoader | None:
        """Load this process's share of the images at some places of the order, with labels.

        Places beyond the last are left out. Views of an image follow each other, the same whenever they are loaded,
        and count as images.

        Returns:
            Small batches, so that every process has one; None if there are fewer images than processes.
        """
        indices = self._indices(places, views)
        size = min(self.batch_size, -(-len(indices) // self.session.processes.world))
        return self.load(indices, size, self._view(views))

    def _indices(self, places: range, views: int) -> list[int]:
        return [index for index in self.order[places.start : places.stop] for _ in range(views)]

    def _view(self, views: int) -> Transform | None:
        if views == 1:
            return None
        low, high = self.crop_scale
        scale = (min(max(low, LEAST_CROP), high), high)
        return ViewTransform(self.preprocessing, views, hflip=self.hflip, scale=scale)

    def load(self, indices: Sequence[int], size: int, transform: Transform | None = None) -> ImageLoader | None:
        """Load this process's share of some images of the list, as for evaluation by default; None if it has none."""
        loader = make_loader(
            self.images.select(indices),
            transform or evaluation_transform(self.preprocessing),
            batch_size=size,
            seed=self.seed,
            rank=self.session.processes.rank,
            world=self.session.processes.world,
            num_workers=self.num_workers,
            prefetch=self.prefetch,
            pin_memory=True,
            max_pixels=self.max_pixels,
        )
        return loader if len(loader) else None

    def first(self, count: int) -> Iterable[Any]:
        """Load the first images, the same on every process."""
        # How many are too many to be unreadable is decided by the reading itself.
        return make_loader(
            self.images.select(self.order[:count]),
            evaluation_transform(self.preprocessing),
            batch_size=count,
            num_workers=0,
            max_unreadable=1.0,
            max_pixels=self.max_pixels,
        )

    def parts(self, places: range, label: str, *, labels: bool) -> Iterable[Any] | None:
        """Load this process's share of the images at some places, in whole batches, with labels in any case.

        There are so many `views` of each, as in `share`.
        """
        loader = self.load(self._indices(places, self.views), self.batch_size, self._view(self.views))
        return None if loader is None else self.session.progress(loader, label)

    def pixels(self, places: range, label: str, views: int = 1) -> Pixels:
        """Load a share as `share` does, without labels, with a progress bar; random numbers as of one process."""
        share, processes = self.share(places, views), self.session.processes
        size = 1 if share is None else share.batch_size

        def read() -> Iterator[Tensor]:
            for pixels, _ in () if share is None else self.session.progress(share, label):
                yield pixels

        # Batch b is that of process b mod world.
        first, step = processes.rank * size, processes.world * size
        return Pixels(read, RandomProbes(seed=self.seed, first=first, step=step, block=size), views)


@dataclass(frozen=True)
class GivenImages:
    """Batches of prepared images that a caller has, with or without labels, in the order in which they come.

    They are of one process, and can be gone through several times; the seed is that of all random numbers that belong
    to the images.
    """

    batches: Iterable[Any]
    session: Session = ALONE
    seed: int = 0

    # They are numbered one by one, and a file of statistics says nothing about them.
    batch_size: ClassVar[int] = 1
    fingerprint: ClassVar[str] = ""
    views: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Raise InputError for an iterator, which can be gone through only once."""
        check_repeatable(self.batches)

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        return sum(len(pixels_of(batch)) for batch in self.batches)

    def pixels(self, places: range, label: str, views: int = 1) -> Pixels:
        """Return the images at some places, as they are; several views raise InputError."""
        if views != 1:
            raise InputError(f"views must be 1 for batches of prepared images, got {views}; pass the views as images")
        probes = RandomProbes(seed=self.seed)
        return Pixels(lambda: self.session.progress(self._between(places), label), probes)

    def first(self, count: int) -> Iterable[Any]:
        """Return the first images."""
        return self._between(range(count))

    def parts(self, places: range, label: str, *, labels: bool) -> Iterable[Any]:
        """Return the images at some places, alone or with labels."""
        batches: Iterable[Any] = self.session.progress(self._between(places, labels=labels), label)
        return batches

    def _between(self, places: range, *, labels: bool = False) -> Iterator[Any]:
        start = 0
        for batch in self.batches:
            size = len(pixels_of(batch))
            low, high = max(0, places.start - start), min(size, places.stop - start)
            start += size
            if low < high:
                yield part_of(batch, low, high, labels=labels)
            if start >= places.stop:
                return


# What refits read from.
ImageSource = CalibrationImages | GivenImages


def default_views(device: torch.device) -> int:
    """Return how many views of each image the refits after surgery read, unless told otherwise."""
    return 1 if device.type == "cpu" else _GPU_VIEWS


def in_pieces(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Cut batches to what goes forward and backward at a time."""
    for pixels in batches:
        yield from torch.split(pixels, _CPU_PIECE if device.type == "cpu" else _GPU_PIECE)
