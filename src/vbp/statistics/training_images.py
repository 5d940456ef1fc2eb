"""Read calibration images for training without labels: random crops, one in two a mixture, newly drawn each epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vbp.data.decoding import DecodedOnce, decoded, mixed_seed
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import Transform, training_transform
from vbp.runtime.memory import available_memory
from vbp.statistics.batches import pixels_of
from vbp.statistics.images import LEAST_CROP, CalibrationImages, GivenImages, ImageSource

_log = logging.getLogger(__name__)

# Share of the free main memory that decoded images may take, over all processes of a machine.
_SHARE: Final = 0.25

# Least and greatest width / height of a crop, as of `training_transform`.
_RATIO: Final = (3 / 4, 4 / 3)


# Share of the images that are mixtures: by mixtures alone a model learns what plain images do not ask of it.
_MIXED: Final = 0.5


class UnlabelledLoader(Protocol):
    """Batches of images for training, with None in the place of labels: this process's share."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose order and crops of an epoch, and leave out its first `start` batches."""

    def global_size(self, batch: int) -> int:
        """Return the images of batch number `batch`, counted from 0, over all processes."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, None]]: ...


def training_images(images: ImageSource, places: range, batch_size: int) -> UnlabelledLoader:
    """Load the images at some places in batches of so many for each process.

    Each is a random crop, one in two mixed with that of another image by Mixup or CutMix. What is drawn depends on
    the seed, the epoch and the image alone, so that the images of a step are the same for any number of processes.

    Images from files are decoded once, and kept in main memory as far as a quarter of it has space; the log says
    how many bytes they take. Prepared images are cropped as they are, and not mirrored.
    """
    if isinstance(images, GivenImages):
        return _PreparedImages(images, places, batch_size)
    return _FromFiles(_load(images, places, batch_size))


def _load(images: CalibrationImages, places: range, batch_size: int) -> ImageLoader:
    chosen = images.images.select(images.order[places.start : places.stop])
    processes, low, high = images.session.processes, *images.crop_scale
    at_most = int(_SHARE * available_memory() / processes.local_world)
    bar = images.session.progress(range(len(chosen)), "decoding")
    kept = DecodedOnce.keep(chosen, at_most, images.max_pixels, bar)
    size = f"{kept.size / 2**20:.1f} MiB"
    _log.info("%d of %d images are kept decoded in memory: %s", kept.kept, len(chosen), size)
    scale = (min(max(low, LEAST_CROP), high), high)
    crop = training_transform(images.preprocessing, hflip=images.hflip, scale=scale)
    return make_loader(
        kept,
        _Mixing(kept, crop, images.max_pixels),
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
class _Mixing:
    """Turns an image into a random crop, or a mixture of its own and that of another image of the source.

    It draws from torch's default generator. Where the other image cannot be read, nothing is mixed in.
    """

    images: DecodedOnce
    crop: Transform
    max_pixels: int

    def __call__(self, image: Image.Image, /) -> Float[Tensor, "channels height width"]:
        own = self.crop(image)
        if torch.rand(()) >= _MIXED:
            return own
        other = decoded(self.images, int(torch.randint(len(self.images), ())), self.max_pixels)
        return own if other is None else _mixed(own, self.crop(other))


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


class _PreparedImages:
    """Random crops, and mixtures of them, of prepared images of one process, resized to the size of each."""

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
        generator = torch.Generator().manual_seed(mixed_seed(self._seed, self._epoch))
        order = torch.randperm(len(self._images), generator=generator).tolist()
        for batch in range(self._start, len(self)):
            places = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            yield torch.stack([self._mixture(place) for place in places]), None

    def _mixture(self, place: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(self._seed, self._epoch, place))
            own = _crop(self._images[place])
            if torch.rand(()) >= _MIXED:
                return own
            other = self._images[int(torch.randint(len(self._images), ()))]
            return _mixed(own, _crop(other)) if other.shape == own.shape else own


def _crop(image: Tensor) -> Float[Tensor, "channels height width"]:
    """Return a random part of an image, resized to the whole; what has other dimensions stays as it is."""
    if image.ndim != 3:
        return image
    share, shape, top, left = torch.rand(4, dtype=torch.float64).tolist()
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


def _mixed(own: Tensor, other: Tensor) -> Tensor:
    """Mix another image in: one time in two a rectangle of it, else all of it, in any share.

    Source: Zhang et al. (2018), equation 2, and Yun et al. (2019), equation 1, both with alpha 1.
    """
    cut, share, top, left = torch.rand(4, dtype=torch.float64).tolist()
    if cut < 0.5 or own.ndim != 3:
        return own.lerp(other, share)
    height, width = own.shape[1:]
    rows, columns = round(height * math.sqrt(share)), round(width * math.sqrt(share))
    first, start = int(top * (height - rows + 1)), int(left * (width - columns + 1))
    mixed = own.clone()
    place = (slice(None), slice(first, first + rows), slice(start, start + columns))
    mixed[place] = other[place]
    return mixed
