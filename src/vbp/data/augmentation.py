"""Augment training images by timm's policies and by erasing; all random numbers follow from torch's generator."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import numpy as np
import torch

from vbp.errors import InputError, one_line

# timm leaves out what it does not know, and would train without it.
_POLICY: Final = re.compile(
    r"(rand|augmix|3a|original|originalr|v0|v0r)(-(m|n|p|mstd|mmax|inc|w|d|a|b)\d+(\.\d+)?|-t(weights|3a|3aw))*"
)

# timm's posterisation may ask for an image of 0 bits, which Pillow refuses: other random numbers are drawn then.
_DRAWS: Final = 100


class _NoBitsError(Exception):
    """An image of 0 bits was asked for."""


Step = Callable[[Any], Any]


def augmentation_steps(
    size: tuple[int, int],
    interpolation: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    auto_augment: str | None = None,
    reprob: float = 0.0,
) -> tuple[list[Step], list[Step]]:
    """Return what is done to a cropped image, and to its normalised tensor.

    Args:
        size: Height and width of the image, in pixels: the distances of a policy depend on it.
        interpolation: The resampling filter of rotations and the like.
        mean: The colour that fills what they leave empty.
        std: Of the normalisation.
        auto_augment: A policy in timm's words, as `rand-m9-mstd0.5-inc1`.
        reprob: Probability that a rectangle of the tensor is replaced by noise.

    Raises:
        InputError: The policy is none of timm's.

    Source: Cubuk et al. (2020), RandAugment; Zhong et al. (2020), Random Erasing.
    """
    if not 0 <= reprob <= 1:
        raise InputError(f"reprob must be a probability in [0, 1], got {reprob}; 0.25 is usual")
    if auto_augment is not None and not _POLICY.fullmatch(auto_augment):
        raise _no_policy(auto_augment, "it has a part that is not known")
    from timm.data.transforms_factory import create_transform  # timm takes seconds to import

    try:
        _, on_image, on_tensor = create_transform(
            (len(mean), *size), is_training=True, color_jitter=None,  # type: ignore[arg-type]
             auto_augment=auto_augment, re_prob=reprob,
            re_mode="pixel", interpolation=interpolation, mean=mean, std=std, separate=True,
        )  # fmt: skip
    except (AssertionError, KeyError, ValueError) as error:
        raise _no_policy(str(auto_augment), one_line(error)) from error
    # The last ones make a normalised tensor, and erase.
    erase = on_tensor.transforms[2:]
    return [_FromTorch(step) for step in on_image.transforms], [_FromTorch(step) for step in erase]


def check_augmentation(auto_augment: str | None, reprob: float) -> None:
    """Raise InputError if the augmentation that is asked for cannot be made."""
    if auto_augment is not None or reprob:
        augmentation_steps((224, 224), "bicubic", (0.5,) * 3, (0.5,) * 3, auto_augment=auto_augment, reprob=reprob)


class _FromTorch:
    """Does a step whose random numbers are Python's and NumPy's, with seeds drawn from torch's default generator.

    An image gets the same ones whichever process reads it; the generators of the process stay as they were.
    """

    def __init__(self, step: Step) -> None:
        self._step = step

    def __call__(self, image: Any) -> Any:
        own, numpys = random.getstate(), np.random.get_state()
        try:
            for _ in range(_DRAWS):
                seed = int(torch.randint(2**31, ()))
                random.seed(seed)
                np.random.seed(seed)
                with suppress(_NoBitsError):
                    return self._once(image)
            raise InputError(f"no step of {self._step} can be done to an image; choose another --auto_augment")
        finally:
            random.setstate(own)
            np.random.set_state(numpys)

    def _once(self, image: Any) -> Any:
        try:
            return self._step(image)
        except ValueError as error:
            if "bits must be" in str(error):
                raise _NoBitsError from error
            raise


def _no_policy(text: str, reason: str) -> InputError:
    return InputError(
        f"auto_augment must be a policy of timm, as rand-m9-mstd0.5-inc1, augmix-m3-w3 or original, got {text!r} "
        f"({reason})"
    )
