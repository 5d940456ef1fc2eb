"""Read calibration images as training does: random crops without labels, in a new order in each epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vbp.data.decoding import DecodedOnce, mixed_seed
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import training_transform
from vbp.runtime.memory import available_memory
from vbp.statistics.batches import pixels_of
from vbp.statistics.images import LEAST_CROP, CalibrationImages, GivenImages, ImageSource

_log = logging.getLogger(__name__)

# Share of the free main memory that decoded images may take, over all processes of a machine.
_SHARE: Final = 0.25

# Least and greatest width / height of a crop, as of `training_transform`.
_RATIO: Final = (3 / 4, 4 / 3)


class UnlabelledLoader(Protocol):
    """Batches of images for training, with None in the place of labels: this process's share."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose order and crops of an epoch, and leave out its first `start` batches."""

    def global_size(self, batch: int) -> int:
        """Return the images of batch number `batch`, counted from 0, over all processes."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, None]]: ...


def training_images(images: ImageSource, places: range, batch_size: int) -> UnlabelledLoader:
    """Load the images at some places in batches of so many for each process, in random crops.

    Images from files are decoded once, and kept in main memory as far as a quarter of it has space; the log says
    how many bytes they take. Prepared images are cropped as they are, and not mirrored.
    """
    if isinstance(images, GivenImages):
        return _PreparedCrops(images, places, batch_size)
    return _FromFiles(_load(images, places, batch_size))


def _load(images: CalibrationImages, places: range, batch_size: int) -> ImageLoader:
    chosen = images.images.select(images.order[places.start : places.stop])
    processes, low, high = images.session.processes, *images.crop_scale
    at_most = int(_SHARE * available_memory() / processes.local_world)
    bar = images.session.progress(range(len(chosen)), "decoding")
    decoded = DecodedOnce.keep(chosen, at_most, images.max_pixels, bar)
    size = f"{decoded.size / 2**20:.1f} MiB"
    _log.info("%d of %d images are kept decoded in memory: %s", decoded.kept, len(chosen), size)
    return make_loader(
        decoded,
        training_transform(images.preprocessing, hflip=images.hflip, scale=(min(max(low, LEAST_CROP), high), high)),
        batch_size=batch_size,
        shuffle=True,
        seed=images.seed,
        rank=processes.rank,
        world=processes.world,
        num_workers=images.num_workers,
        prefetch=images.prefetch,
        pin_memory=True,
        max_pixels=images.max_pixels,
    )


@dataclass(frozen=True)
class _FromFiles:
    """A loader of labelled images, without their labels."""

    loader: ImageLoader

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.loader.set_epoch(epoch, start)

    def global_size(self, batch: int) -> int:
        return self.loader.global_size(batch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        return ((pixels, None) for pixels, _ in self.loader)


class _PreparedCrops:
    """Random crops of prepared images of one process, resized to the size of each."""

    def __init__(self, images: GivenImages, places: range, batch_size: int) -> None:
        batches = images.parts(places, "tuning", labels=False)
        self._images = [image.detach() for batch in batches for image in pixels_of(batch)]
        self._seed, self._batch_size = images.seed, batch_size
        self._epoch = self._start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self._epoch, self._start = epoch, start

    def global_size(self, batch: int) -> int:
        return min(self._batch_size, len(self._images) - batch * self._batch_size)

    def __len__(self) -> int:
        return math.ceil(len(self._images) / self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        order = torch.randperm(len(self._images), generator=_generator(self._seed, self._epoch)).tolist()
        for batch in range(self._start, len(self)):
            places = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            crops = [_crop(self._images[place], _generator(self._seed, self._epoch, place)) for place in places]
            yield torch.stack(crops), None


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(mixed_seed(*numbers))


def _crop(image: Tensor, generator: torch.Generator) -> Float[Tensor, "channels height width"]:
    """Return a random part of an image, resized to the whole; what has other dimensions stays as it is."""
    if image.ndim != 3:
        return image
    share, shape, top, left = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    area = LEAST_CROP + (1 - LEAST_CROP) * share
    ratio = math.exp(math.log(_RATIO[0]) + shape * math.log(_RATIO[1] / _RATIO[0]))
    height, width = image.shape[1:]
    rows = min(height, max(1, round(height * math.sqrt(area / ratio))))
    columns = min(width, max(1, round(width * math.sqrt(area * ratio))))
    first, start = int(top * (height - rows + 1)), int(left * (width - columns + 1))
    part = image[None, :, first : first + rows, start : start + columns]
    exact = part if part.dtype == torch.float64 else part.float()
    resized = F.interpolate(exact, (height, width), mode="bilinear", antialias=True)
    return resized[0].to(image.dtype)
