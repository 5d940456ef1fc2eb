"""Load batches of images: the same ones whatever the number of workers and processes, and whatever else is drawn."""

from __future__ import annotations

import atexit
import logging
import math
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader

from vbp.data.decoding import Batch, DecodedImages, Failure, Sample, collate, mixed_seed
from vbp.data.formats import MAX_PIXELS
from vbp.data.images import Images
from vbp.data.preprocessing import Transform
from vbp.errors import InputError, some_of
from vbp.runtime.signals import leave_signals_to_parent, reading_processes

_log = logging.getLogger(__name__)


def make_loader(
    images: Images,
    transform: Transform,
    *,
    batch_size: int,
    num_workers: int,
    shuffle: bool = False,
    seed: int = 0,
    pin_memory: bool = False,
    max_unreadable: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    prefetch: int = 2,
    rank: int = 0,
    world: int = 1,
) -> ImageLoader:
    """Load the images in batches, all of them or one process's share.

    Without `shuffle`, process `rank` gets batches `rank`, `rank + world`, ... of those that one process would
    get; it may get none. With `shuffle`, each batch of `batch_size * world` images is dealt out to the
    processes image by image: all get the same number of batches, and together the images that one process
    would get with that batch size. A last one with fewer than `world` images is left out.

    Args:
        images: What to load: the whole list, in every process.
        transform: Turns one RGB image into a tensor; random ones must draw from torch's default generator.
        batch_size: Images in a batch of one process; fewer in the last one.
        num_workers: Processes that decode; 0 decodes in this one. No more are started than there are cores.
        shuffle: A new order in each epoch, fixed by `seed` and the epoch. An image that cannot be read is
            replaced by the next one in the list that can; without `shuffle` its batch is smaller by one.
        seed: The random transform of an image depends on it, the epoch and the image's place in the list alone.
        pin_memory: Page-locked batches, faster to copy to a GPU; without a GPU it is not done.
        max_unreadable: Share of the whole list that may be unreadable; at least one image may be, unless it is 0.
        max_pixels: An image with more pixels counts as unreadable.
        prefetch: Batches that each worker reads ahead.
        rank: Which of the processes this is, from 0.
        world: How many processes share the images.

    Raises:
        InputError: A value is outside its range, or there is nothing to load.

    Example:
        >>> [len(labels) for _, labels in vbp.make_loader(train, transform, batch_size=8, num_workers=0)]
        [8, 6]
    """
    _check_options(len(images), batch_size, num_workers, max_unreadable, prefetch, rank, world)
    if max_pixels < 1:
        raise InputError(f"max_pixels must be 1 or more, got {max_pixels}; leave it out for {MAX_PIXELS}")
    batches = PlannedBatches(len(images), batch_size, shuffle=shuffle, seed=seed, rank=rank, world=world)
    if batches.steps == 0:
        raise InputError(
            f"there must be one image for each process at least, got {len(images)} images for {world}; "
            "give more images or start fewer processes"
        )
    # One bad file must not stop a small run, but a list of a single image has none to spare.
    spare = 1 if len(images) > 1 and max_unreadable > 0 else 0
    allowed = max(spare, math.floor(max_unreadable * len(images)))
    # One attempt more than may fail: after that many the run is over anyway.
    attempts = min(allowed + 1, len(images)) if shuffle else 1
    num_workers = _no_more_than_cores(num_workers)
    loader: DataLoader[Sample] = DataLoader(
        DecodedImages(images, transform, seed, attempts, max_pixels),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory and torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=leave_signals_to_parent,
        prefetch_factor=prefetch if num_workers > 0 else None,
        # Without its own generator each epoch would take a number from the program's random stream.
        generator=torch.Generator().manual_seed(0),
    )
    return ImageLoader(images, loader, batches, allowed)


@dataclass(eq=False)
class PlannedBatches:
    """The `(epoch, index)` keys of each batch of one process.

    In order, the batches are those of a single process, dealt out in turn. Shuffled, `world` processes share
    out each batch of `batch_size * world` images, so that all take the same number of steps.

    The `count` images are ordered by `seed` and `epoch`; the first `start` batches of an epoch are left out.
    """

    count: int
    batch_size: int
    _: KW_ONLY
    shuffle: bool
    seed: int
    rank: int = 0
    world: int = 1
    epoch: int = 0
    start: int = 0

    @property
    def steps(self) -> int:
        """Return how many batches the process with most has."""
        whole, rest = divmod(self.count, self.batch_size * self.world)
        # A process without an image would block the others: a rest too small for all is left out.
        return whole + (rest >= self.world if self.shuffle else rest > 0)

    def __len__(self) -> int:
        return (
            self.steps if self.shuffle else len(range(self.rank, math.ceil(self.count / self.batch_size), self.world))
        )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch  # an epoch under way keeps its number
        batches = range(self.start, len(self))
        if not self.shuffle:
            for batch in batches:
                first = (batch * self.world + self.rank) * self.batch_size
                yield [(epoch, index) for index in range(first, min(first + self.batch_size, self.count))]
            return
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        order = torch.randperm(self.count, generator=generator)
        together = self.batch_size * self.world
        for batch in batches:
            share: Sequence[int] = order[batch * together : (batch + 1) * together][self.rank :: self.world].tolist()
            yield [(epoch, index) for index in share]

    def global_size(self, batch: int) -> int:
        """Return how many images batch number `batch`, counted from 0, has over all processes."""
        if not 0 <= batch < self.steps:
            raise InputError(f"batch must be a number from 0 to {self.steps - 1}, got {batch}")
        together = self.batch_size * self.world
        return min(together, self.count - batch * together)


# What the processes that read images belong to: loaders, and iterations that have begun.
_loaders: WeakSet[ImageLoader] = WeakSet()
_iterations: WeakSet[Generator[object]] = WeakSet()


@atexit.register
def _end_readers() -> None:
    """End the processes that read images, as PyTorch does for a loader that nothing refers to.

    Python would send them SIGTERM, which they leave to this process (`leave_signals_to_parent`), and wait for ever.
    """
    for iteration in [*_iterations]:
        iteration.close()
    for loader in [*_loaders]:
        del loader._loader


class ImageLoader:
    """Iterates over `(images, labels)` batches; made by `make_loader`.

    `unreadable` holds name and reason of each image that this process could not read so far.
    """

    def __init__(self, images: Images, loader: DataLoader[Sample], batches: PlannedBatches, allowed: int) -> None:
        self.images = images
        self.batch_size = batches.batch_size
        self.unreadable: dict[str, str] = {}
        self._loader = loader
        self._batches = batches
        self._allowed = allowed
        _loaders.add(self)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order and the random transforms of the iterations to come; they start at epoch 0.

        The first `start` batches of the epoch are left out, without being read.
        """
        if not 0 <= start <= len(self):
            raise InputError(f"start must be a number of batches from 0 to {len(self)}, got {start}")
        self._batches.epoch = epoch
        self._batches.start = start

    def global_size(self, batch: int) -> int:
        """Return how many images batch number `batch` of an epoch, counted from 0, has over all processes.

        Exact with `shuffle`; without it, images that cannot be read are counted too.
        """
        return self._batches.global_size(batch)

    def __len__(self) -> int:
        """Return the batches of this process in a whole epoch; fewer come if all images of one cannot be read."""
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]]:
        """Yield one epoch, from the batch on that `set_epoch` chose; stop if too many images cannot be read."""
        iteration = self._read()
        _iterations.add(iteration)
        return iteration

    def _read(self) -> Generator[tuple[Tensor, Tensor]]:
        # All images of a small share may be unreadable, those of the whole list may not.
        whole = self._batches.world == 1 and self._batches.start == 0
        empty = True
        batch: Batch
        with reading_processes():
            for batch in self._loader:
                for failure in batch.failures:
                    self._note(failure)
                if batch.images is not None:
                    empty = False
                    yield batch.images, batch.labels
        if empty and (whole or len(self.unreadable) == len(self.images)):
            raise InputError(f"no image of {self.images.root} could be read: {some_of([*self.unreadable], 3)}")

    def take_over(self, unreadable: Mapping[str, str]) -> None:
        """Count what another process could not read, as if it had been this one."""
        for name, reason in unreadable.items():
            self._note(Failure(name, reason))

    def _note(self, failure: Failure) -> None:
        if failure.name in self.unreadable:
            return
        self.unreadable[failure.name] = failure.reason
        done = "the next readable one takes its place" if self._batches.shuffle else "it is left out"
        _log.warning("cannot read the image %s (%s); %s", *failure, done)
        count, total = len(self.unreadable), len(self.images)
        if count > self._allowed:
            raise InputError(
                f"at most {self._allowed} of {total} images may be unreadable, got {count} so far "
                f"({count / total:.1%}): {some_of([*self.unreadable], 3)}; repair them, or "
                "move them out of the data"
            )


def _no_more_than_cores(num_workers: int) -> int:
    """Return how many processes read images: as many as were asked for, or as this process has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")  # processes of the job that share the cores
    share = max(1, cores // max(1, int(here) if here.isdecimal() else 1))
    if num_workers > share:
        _tell_cores(num_workers, share)
    return min(num_workers, share)


@cache  # a job makes several loaders
def _tell_cores(num_workers: int, share: int) -> None:
    _log.info("num_workers %d is more than the cores here: %d for each process of the job", num_workers, share)


def _check_options(
    count: int, batch_size: int, num_workers: int, max_unreadable: float, prefetch: int, rank: int, world: int
) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size must be 1 or more, got {batch_size}")
    if num_workers < 0:
        raise InputError(f"num_workers must be 0 (decode in the main process) or more, got {num_workers}")
    if not 0 <= max_unreadable <= 1:
        raise InputError(f"max_unreadable must be a share in [0, 1], got {max_unreadable}")
    if prefetch < 1:
        raise InputError(f"prefetch must be 1 batch or more, got {prefetch}")
    if not 0 <= rank < world:
        raise InputError(f"rank must be a number from 0 to world - 1, got rank {rank} of world {world}")
    if count == 0:
        raise InputError("there must be images to load, got 0 images; check the data and the limits set on it")
