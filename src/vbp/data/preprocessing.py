"""Prepare images for a network: resize, crop and normalise them as its weights want it."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vbp.data.augmentation import augmentation_steps
from vbp.errors import InputError
from vbp.runtime.decode import from_json, to_json

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


class Transform(Protocol):
    """Turns one RGB image into the tensor that the network takes."""

    def __call__(self, image: Image.Image, /) -> Float[Tensor, "channels height width"]: ...


@dataclass(frozen=True)
class Preprocessing:
    """How images are resized, cropped and normalised for one network.

    Attributes:
        img_size: Height and width of the network's input, in pixels.
        crop_pct: Share of the resized image's edge that the centre crop keeps, in (0, 1].
        interpolation: The resampling filter; one of `INTERPOLATIONS`.
        mean: Subtracted from each channel of an image in [0, 1]; one value makes the input greyscale.
        std: Divides each channel afterwards.
        crop_mode: `center` keeps the aspect ratio and loses the border, `squash` ignores the aspect ratio,
            `border` keeps the whole image and pads it with the mean colour.

    Raises:
        InputError: A value is outside its range.

    Example:
        >>> own = vbp.Preprocessing((224, 224), 0.9, "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    """

    img_size: tuple[int, int]
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        # Model configurations hold lists; as tuples two equal settings compare equal and can be hashed.
        for name in ("img_size", "mean", "std"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        _check_size_and_crop(self)
        _check_normalisation(self)

    def example_input(self, batch: int = 1) -> Float[Tensor, "batch channels height width"]:
        """Return noise of the network's size, the same at every call: on blank images all tokens are equal."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, len(self.mean), *self.img_size, generator=generator)

    def override(
        self,
        *,
        img_size: int | None = None,
        crop_pct: float | None = None,
        interpolation: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Preprocessing:
        """Return a copy with the given values in place of the model's own; `None` keeps the model's.

        Raises:
            InputError: A value is outside its range.
        """
        given = {
            "img_size": None if img_size is None else (img_size, img_size),
            "crop_pct": crop_pct,
            "interpolation": interpolation,
            "mean": mean,
            "std": std,
        }
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` reads them back."""
        plain: dict[str, Any] = to_json(self)
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read back what `to_dict` returned, or raise an `InputError`."""
        return from_json(cls, values, "the preprocessing", "save the file again with this version of vbp")

    def __str__(self) -> str:
        height, width = self.img_size
        mean = ", ".join(f"{value:.4g}" for value in self.mean)
        std = ", ".join(f"{value:.4g}" for value in self.std)
        return (
            f"{height}x{width} pixels, {self.crop_mode} crop {self.crop_pct:.4g}, {self.interpolation}, "
            f"mean ({mean}), std ({std})"
        )


def evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """Return the deterministic transform for calibration and evaluation: timm's own, so that accuracies agree.

    Example:
        >>> vbp.evaluation_transform(preprocessing)(picture).shape
        torch.Size([3, 32, 32])
    """
    from timm.data.transforms_factory import create_transform  # timm takes seconds to import

    steps = create_transform(
        input_size=(len(preprocessing.mean), *preprocessing.img_size),
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )
    return _in_colour_or_grey(preprocessing, [steps])


def training_transform(
    preprocessing: Preprocessing,
    *,
    hflip: bool = True,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    auto_augment: str | None = None,
    reprob: float = 0.0,
) -> Transform:
    """Return the random transform for fine-tuning; it draws from torch's default generator.

    Args:
        preprocessing: Size, interpolation and normalisation are taken from it.
        hflip: Mirror every second image; wrong for digits, letters and road signs.
        scale: Least and greatest share of the image's area that the random crop covers.
        ratio: Least and greatest width / height of the random crop.
        auto_augment: A policy of timm, as `rand-m9-mstd0.5-inc1`; None leaves colours and shapes as they are.
        reprob: Probability that a random rectangle is replaced by noise.

    Raises:
        InputError: `scale` or `ratio` is no range, or a value lies outside what is allowed.

    Example:
        >>> image = vbp.training_transform(preprocessing, hflip=False)(picture)
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise InputError(f"scale must be two shares with 0 < least <= greatest <= 1, got {scale}")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise InputError(f"ratio must be two numbers with 0 < least <= greatest, got {ratio}")
    from torchvision import transforms

    steps: list[Callable[[Any], Any]] = [
        transforms.RandomResizedCrop(
            preprocessing.img_size,
            scale=scale,
            ratio=ratio,
            interpolation=transforms.InterpolationMode(preprocessing.interpolation),
        )
    ]
    if hflip:
        steps.append(transforms.RandomHorizontalFlip())
    erase: list[Callable[[Any], Any]] = []
    if auto_augment is not None or reprob:
        more, erase = augmentation_steps(
            preprocessing.img_size, preprocessing.interpolation, preprocessing.mean, preprocessing.std,
            auto_augment=auto_augment, reprob=reprob,
        )  # fmt: skip
        steps += more
    steps += [transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std), *erase]
    return _in_colour_or_grey(preprocessing, steps)


class ViewTransform:
    """Turns an image into one of its views: one in `views` is as for evaluation, the others are random crops.

    It draws from torch's default generator; `scale` is as for `training_transform`.
    """

    def __init__(
        self, preprocessing: Preprocessing, views: int, *, hflip: bool = True, scale: tuple[float, float]
    ) -> None:
        self._whole = evaluation_transform(preprocessing)
        self._crop = training_transform(preprocessing, hflip=hflip, scale=scale)
        self._views = views

    def __call__(self, image: Image.Image, /) -> Float[Tensor, "channels height width"]:
        """Return one view."""
        whole = self._views == 1 or int(torch.randint(self._views, ())) == 0
        return (self._whole if whole else self._crop)(image)


def _in_colour_or_grey(preprocessing: Preprocessing, steps: list[Callable[[Any], Any]]) -> Transform:
    from torchvision import transforms

    # Images arrive as RGB; a network with one input channel wants their luminance.
    grey = [transforms.Grayscale(1)] if len(preprocessing.mean) == 1 else []
    composed: Transform = transforms.Compose([*grey, *steps])
    return composed


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, (tuple, list)) and all(_is_number(item) for item in value):
        return tuple(value)
    raise InputError(f"{name} must be a list of numbers, got {reprlib.repr(value)}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_size_and_crop(preprocessing: Preprocessing) -> None:
    size, crop_pct = preprocessing.img_size, preprocessing.crop_pct
    if len(size) != 2 or any(not isinstance(edge, int) or not 1 <= edge <= 8192 for edge in size):
        raise InputError(
            f"img_size must be positive whole numbers of pixels (height, width), 8192 at most, got {size}"
        )
    if not _is_number(crop_pct) or not 0 < crop_pct <= 1:
        raise InputError(f"crop_pct must be in (0, 1], got {reprlib.repr(crop_pct)}; 1 keeps the whole resized image")
    if preprocessing.interpolation not in INTERPOLATIONS:
        # timm's "random" differs from call to call, so that two evaluations would not agree.
        raise InputError(
            f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got "
            f"{reprlib.repr(preprocessing.interpolation)}"
        )
    if preprocessing.crop_mode not in CROP_MODES:
        raise InputError(
            f"crop_mode must be one of {', '.join(CROP_MODES)}, got {reprlib.repr(preprocessing.crop_mode)}"
        )


def _check_normalisation(preprocessing: Preprocessing) -> None:
    mean, std = preprocessing.mean, preprocessing.std
    if len(mean) not in (1, 3) or len(std) != len(mean):
        raise InputError(
            f"mean and std must have one value for each channel, 3 for colour or 1 for greyscale, "
            f"got {len(mean)} and {len(std)} values; give both together"
        )
    if any(value <= 0 for value in std):
        raise InputError(f"std must be greater than 0 in each channel, got {std}")
