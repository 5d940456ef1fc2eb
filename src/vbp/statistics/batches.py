"""Take images and labels out of a user's batches, and see that they fit the model: one door for every entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vbp.errors import InputError

_IMAGES: Final = ("pixel_values", "image", "images")
_LABELS: Final = ("labels", "label")


def pixels_of(batch: Any) -> Tensor:
    """Return the images of a batch, or raise InputError.

    A batch is images as a tensor or an array; a tuple or list that begins with them; or a dictionary that has them
    under `pixel_values`, `image` or `images`.
    """
    images = _part(batch, _IMAGES, 0)
    if not (images.is_floating_point() and images.ndim > 1):
        raise InputError(
            f"images must be floating-point tensors (batch channels height width), got {images.dtype} of shape "
            f"{list(images.shape)}; prepare them as for evaluation, and let them come first in the batch"
        )
    return images


def _part(batch: Any, names: Sequence[str], place: int) -> Tensor:
    found = batch
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in names if name in batch), None)
    elif isinstance(batch, Sequence):
        found = batch[place] if len(batch) > place else None
    elif place:
        found = None  # images alone
    if isinstance(found, Tensor):
        return found
    try:
        # Labels may be a list of numbers.
        return torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise InputError(
            f"a batch must be a tensor, a tuple (images, labels) or a dictionary with {' or '.join(names)}, got "
            f"{got}; change what the loader yields"
        ) from error


def images_for(
    model: nn.Module, batches: Iterable[Any], device: torch.device | str | None = None
) -> Iterator[Tensor]:
    """Return the images of all batches that have any: on the model's device or another, in its floating type."""
    return (pixels for pixels, _ in _fitting(model, batches, device))


def part_of(batch: Any, low: int, high: int, *, labels: bool) -> Any:
    """Return the images of a batch from one place to another, alone or with their labels."""
    pixels = pixels_of(batch)[low:high]
    return (pixels, _part(batch, _LABELS, 1)[low:high]) if labels else pixels


def labelled_for(
    model: nn.Module, batches: Iterable[Any], device: torch.device | str | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return images as `images_for` does, and the labels of each batch, which `class_numbers` has not yet checked."""
    return ((pixels, _part(batch, _LABELS, 1)) for pixels, batch in _fitting(model, batches, device))


def _fitting(
    model: nn.Module, batches: Iterable[Any], device: torch.device | str | None
) -> Iterator[tuple[Tensor, Any]]:
    parameter = next((each for each in model.parameters() if each.is_floating_point()), None)
    if device is None and parameter is not None:
        device = parameter.device
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    for batch in batches:
        pixels = pixels_of(batch)
        if convolutional and pixels.ndim != 4:
            raise InputError(
                f"images must come in batches (batch channels height width), got shape {list(pixels.shape)}; put "
                "images[None] in the place of a single one"
            )
        if len(pixels):
            dtype = pixels.dtype if parameter is None else parameter.dtype
            yield pixels.detach().to(device, dtype, non_blocking=True), batch


@dataclass(frozen=True)
class ImagesFor:
    """Images of batches as `images_for` returns them, which can be gone through again."""

    model: nn.Module
    batches: Iterable[Any]

    def __post_init__(self) -> None:
        """Refuse what can be gone through only once."""
        check_repeatable(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return images_for(self.model, self.batches)


def check_repeatable(batches: Iterable[Any]) -> None:
    """Raise InputError for an iterator, which can be gone through only once."""
    if isinstance(batches, Iterator):
        raise InputError(
            f"batches must be a list or a loader that can be gone through several times, got "
            f"{type(batches).__name__}, which ends after the first time; make a list of it"
        )


def class_numbers(labels: Tensor, images: int, classes: int) -> Int[Tensor, " images"]:
    """Return one class number for each image, or raise InputError.

    Labels are whole numbers, one for each image, perhaps in a column of their own; or one-hot rows.
    """
    numbers = labels.detach()
    if numbers.ndim == 2 and numbers.shape[1] == classes > 1:
        # Each row one 1 and zeros besides; other rows keep their shape and are refused below.
        if bool(((numbers == 0) | (numbers == 1)).all() and (numbers.sum(1) == 1).all()):
            numbers = numbers.int().argmax(1)
    elif numbers.ndim == 2 and numbers.shape[1] == 1:
        numbers = numbers[:, 0]
    if numbers.shape != (images,) or numbers.is_complex() or not bool((numbers == numbers.long()).all()):
        raise InputError(
            f"labels must be one class number for each of {images} images, or one-hot rows of {classes} classes, got "
            f"shape {list(labels.shape)} of {labels.dtype}; give one class for each image"
        )
    outside = numbers[(numbers < 0) | (numbers >= classes)]
    if len(outside):
        raise InputError(
            f"each label must be a whole number from 0 to {classes - 1}, as the model has {classes} classes, got "
            f"{outside[0].item():g} and {len(outside) - 1} more outside; count classes from 0 and leave images "
            "without a label out"
        )
    return numbers.long()
