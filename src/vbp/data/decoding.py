"""Decode images and transform them to tensors, in a worker of the loader or in the main process."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from vbp.data.formats import IMAGE_FORMATS, MAX_PIXELS
from vbp.data.images import Images
from vbp.data.preprocessing import Transform
from vbp.errors import InputError
from vbp.runtime.files import open_regular

# The bytes that a pixel takes at most where nothing is compressed: four colours of 16 bits.
_LARGEST_PIXEL = 8

# A 16-bit image all below this, a quarter of white, may hold 10, 12 or 14 bits.
_DARK = 2**14


class Failure(NamedTuple):
    """An image that could not be read, and why."""

    name: str
    reason: str


class Sample(NamedTuple):
    """One image of a batch, after those in its place that could not be read."""

    image: Tensor | None  # None: no attempt gave an image
    label: int
    failures: tuple[Failure, ...]


class Batch(NamedTuple):
    """Images and labels of one batch, and those that could not be read."""

    images: Tensor | None
    labels: Tensor
    failures: tuple[Failure, ...]


@dataclass(frozen=True, eq=False)
class DecodedImages(Dataset[Sample]):
    """Samples by `(epoch, index)`: a worker that serves several epochs gets its whole state from the key.

    The seed, the epoch and the index decide what `transform` draws from torch's default generator. As many images
    are tried as there are `attempts`, from the index on and around the list's end, until one can be read; one with
    more than `max_pixels` cannot.
    """

    images: Images
    transform: Transform
    seed: int
    attempts: int
    max_pixels: int

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, first = key
        failures: list[Failure] = []
        for attempt in range(self.attempts):
            index = (first + attempt) % len(self.images)
            try:
                with self.images.read(index) as stream:
                    image = _rgb(stream, self.max_pixels)
            except Exception as error:  # noqa: BLE001 (decoders raise almost anything on damaged files)
                # Logged by the main process: a worker's log may go nowhere.
                failures.append(Failure(self.images.name(index), _reason(error)))
                continue
            with torch.random.fork_rng(devices=[]):
                # Not torch.manual_seed, which would also reseed the GPUs.
                torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, index))
                return Sample(self.transform(image), self.images.labels[index], tuple(failures))
        return Sample(None, -1, tuple(failures))


@dataclass(frozen=True)
class DecodedOnce:
    """Images of another source; those that are kept in memory are read as uncompressed bitmaps."""

    images: Images
    bitmaps: tuple[bytes | None, ...]

    @staticmethod
    def keep(images: Images, at_most: int, max_pixels: int, places: Iterable[int] | None = None) -> DecodedOnce:
        """Decode images, in the order of the list, and keep as many as fit into `at_most` bytes.

        One that cannot be read is not kept: whoever reads it gets the error of the source.

        Args:
            images: Of which source.
            at_most: Bytes of all bitmaps together.
            max_pixels: An image with more counts as unreadable.
            places: All places in the list, wrapped to draw a progress bar.
        """
        bitmaps: list[bytes | None] = [None] * len(images)
        left = at_most
        for index in range(len(images)) if places is None else places:
            if left <= 0:
                break
            image = decoded(images, index, max_pixels)
            if image is None:
                continue
            bitmap = io.BytesIO()
            image.save(bitmap, "BMP")
            left -= bitmap.tell()
            if left >= 0:
                bitmaps[index] = bitmap.getvalue()
        return DecodedOnce(images, tuple(bitmaps))

    @property
    def kept(self) -> int:
        """Return how many images are kept."""
        return sum(bitmap is not None for bitmap in self.bitmaps)

    @property
    def size(self) -> int:
        """Return the bytes of all that are kept."""
        return sum(len(bitmap) for bitmap in self.bitmaps if bitmap is not None)

    @property
    def root(self) -> Path | str:
        """Return where the images lie, for messages."""
        return self.images.root

    @property
    def labels(self) -> Sequence[int]:
        """Return the labels of the source."""
        return self.images.labels

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Return what a message calls this image."""
        return self.images.name(index)

    def read(self, index: int) -> BinaryIO:
        """Return the bitmap, or where it is not kept the image as it is stored."""
        bitmap = self.bitmaps[index]
        return self.images.read(index) if bitmap is None else io.BytesIO(bitmap)

    def select(self, indices: Sequence[int]) -> DecodedOnce:
        """Return the images at these places, in this order."""
        return DecodedOnce(self.images.select(indices), tuple(self.bitmaps[index] for index in indices))

    def fingerprint(self) -> str:
        """Return the fingerprint of the source."""
        return self.images.fingerprint()


def collate(samples: list[Sample]) -> Batch:
    """Stack the images that could be read."""
    read = [(sample.image, sample.label) for sample in samples if sample.image is not None]
    failures = tuple(failure for sample in samples for failure in sample.failures)
    labels = torch.tensor([label for _, label in read], dtype=torch.int64)
    return Batch(torch.stack([image for image, _ in read]) if read else None, labels, failures)


def decoded(images: Images, index: int, max_pixels: int) -> Image.Image | None:
    """Return an image of a source in RGB; None if it cannot be read."""
    try:
        with images.read(index) as stream:
            return _rgb(stream, max_pixels)
    except Exception:  # noqa: BLE001 (decoders raise almost anything on damaged files)
        return None


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an image file in RGB, read as those of a data set are.

    Raises:
        InputError: It cannot be read.
    """
    try:
        with open_regular(path) as stream:
            return _rgb(stream, max_pixels)
    except Exception as error:
        raise InputError(f"{path} must be an image file, but cannot be read ({_reason(error)})") from error


def _rgb(stream: BinaryIO, max_pixels: int) -> Image.Image:
    with _limited(max_pixels):
        size = stream.seek(0, os.SEEK_END)
        if size > _LARGEST_PIXEL * max_pixels + 2**20:
            raise ValueError(f"it has {size} bytes, more than the {max_pixels} pixels of max_pixels can take")
        stream.seek(0)
        with Image.open(stream, formats=IMAGE_FORMATS) as image:
            return _eight_bits(image).convert("RGB")


@contextmanager
def _limited(max_pixels: int) -> Iterator[None]:
    """Let Pillow decode images of so many pixels at most, without a warning."""
    own = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        # Pillow warns of harmless things (odd EXIF data, transparent palettes); what it cannot decode raises.
        warnings.simplefilter("ignore")
        # From the limit on it warns, and raises only at twice as many pixels.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(
                f"it has more pixels than max_pixels, which is {max_pixels}; raise it to read the image"
            ) from error
        finally:
            Image.MAX_IMAGE_PIXELS = own


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow would cut it off at white.

    Raises:
        ValueError: The image does not say which of its values is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image)
        if values.max() < _DARK:
            raise ValueError(
                f"16-bit grey of which no value is above {values.max()}: a dark image and one of fewer bits look "
                "alike; scale it to the whole range or convert it to 8 bits"
            )
        return Image.fromarray((values / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"grey values of mode {image.mode} have no stated range; convert the image to 8 or 16 bits")
    return image


def _reason(error: BaseException) -> str:
    # Pillow's own text names the object in memory, not the image.
    unknown = isinstance(error, UnidentifiedImageError)
    text = f"none of the formats {', '.join(IMAGE_FORMATS)}, or damaged" if unknown else str(error)
    return f"{type(error).__name__}: {text}"


def mixed_seed(*numbers: int) -> int:
    """Return one seed from several numbers: a sum would give one image in one epoch its neighbour's in the next."""
    text = ",".join(map(str, numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
