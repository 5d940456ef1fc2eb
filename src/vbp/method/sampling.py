"""The random numbers of an image: a function of the seed and its number alone, the same in every process and site.

Image i of a process has the number first + step * (i // block) + i % block among all images. From it follow which
tokens count for the covariance, and the random vectors of the Fisher information and its sketches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vbp.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ImageNumbers:
    """Number each image of a process among all images.

    `first` is that of the first image that this process reads, `block` how many images follow each other in the order
    of all, `step` the distance between the beginnings of two blocks: 1 and the number of processes where these share
    the images by stride. Another seed draws other random numbers for the same images.
    """

    seed: int = 0
    first: int = 0
    step: int = 1
    block: int = 1

    def __post_init__(self) -> None:
        """Raise InputError if a value is out of range, for two images would have one number."""
        if self.seed < 0 or self.first < 0 or self.block < 1 or self.step < self.block:
            raise InputError(
                "seed and first image must be at least 0, the block at least 1 and the step no smaller than it, "
                f"got {self.seed}, {self.first}, {self.block}, {self.step}; 0, 0, 1 and 1 suit a single process"
            )

    def number(self, image: int) -> int:
        """Return the number of the image that this process reads at a place, from 0."""
        return self.first + self.step * (image // self.block) + image % self.block


@dataclass(frozen=True)
class TokenSample(ImageNumbers):
    """Choose a random share, in (0, 1], of the tokens of every image: at least one, the same at every site."""

    fraction: float = 1.0

    def __post_init__(self) -> None:
        """Raise InputError if a value is out of range."""
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise InputError(
                f"the share of tokens must be in (0, 1], got {self.fraction}; 0.2 samples 20 % of the tokens"
            )

    def tokens(self, image: int, tokens: int) -> list[int]:
        """Return the sampled tokens of an image of this process, ascending."""
        # The tolerance undoes binary fractions: 0.07 * 100 is 7.000000000000001 and means 7 tokens.
        count = max(1, math.ceil(tokens * self.fraction - 1e-9))
        generator = np.random.default_rng((self.seed, self.number(image)))
        return sorted(generator.choice(tokens, count, replace=False, shuffle=False).tolist())


class TokenSampler:
    """Draw the sampled rows of one batch after the other; `images` are those of the batch."""

    def __init__(self, sample: TokenSample) -> None:
        self._sample = sample
        self._start = self.images = 0
        self._drawn: dict[int, Tensor] = {}

    def begin(self, images: int) -> None:
        """Begin a batch of so many images."""
        self._start += self.images
        self.images = images
        self._drawn = {}

    def draw(self, rows: Tensor) -> Tensor:
        """Return the sampled rows of a layer's values in this batch, the images one after the other.

        Where rows and images do not go together (a model that mixes images), the batch counts as one image.
        """
        if self._sample.fraction == 1:
            return rows
        count = rows.shape[0]
        if count not in self._drawn:
            images = self.images if self.images and count % self.images == 0 else 1
            size = count // images
            chosen = [
                image * size + token
                for image in range(images)
                for token in self._sample.tokens(self._start + image, size)
            ]
            self._drawn[count] = torch.tensor(chosen).to(rows.device, non_blocking=True)
        return rows.index_select(0, self._drawn[count])


def priority_sample(
    sizes: Float[Tensor, "images tokens"], uniform: Float[Tensor, "images tokens"], count: int
) -> tuple[Int[Tensor, "images count"], Float[Tensor, "images count"]]:
    """Draw tokens of each image, large ones rather than small ones, so that weighted sums over them are unbiased.

    Sizes are positive and say how much each token matters; `uniform` are independent random numbers in (0, 1). If an
    image has no more than `count` tokens, all are taken.

    Returns:
        Their places, and what each counts for: its size, or, if larger, that of the first token left out over its
        random number.

    Source: Duffield, Lund, Thorup (2007), priority sampling.
    """
    if sizes.shape[1] <= count:
        return torch.arange(sizes.shape[1], device=sizes.device).expand(sizes.shape), sizes
    first = (sizes / uniform).topk(count + 1, dim=1)
    places = first.indices[:, :count]
    return places, torch.maximum(sizes.gather(1, places), first.values[:, count:])


@dataclass(frozen=True)
class RandomProbes(ImageNumbers):
    """Draw the random vectors of an image, for the Fisher information and its sketches of so many columns."""

    input_columns: int = 8
    output_columns: int = 32

    def of(self, start: int, images: int, classes: int, outputs: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normal numbers of images from `start` on: of each class, and the two sketches; on the CPU."""
        noise, left, right = [], [], []
        for image in range(start, start + images):
            number = self.number(image)
            generator = np.random.default_rng((self.seed, 1, number))
            noise.append(generator.standard_normal(classes, dtype=np.float32))
            left.append(generator.standard_normal((outputs, self.input_columns), dtype=np.float32))
            right.append(generator.standard_normal((hidden, self.output_columns), dtype=np.float32))
        return torch.tensor(np.stack(noise)), torch.tensor(np.stack(left)), torch.tensor(np.stack(right))

    def uniform(self, start: int, images: int, tokens: int) -> Tensor:
        """Return a number in (0, 1] for each token of images from `start` on; on the CPU."""
        numbers = map(self.number, range(start, start + images))
        drawn = [np.random.default_rng((self.seed, 2, number)).random(tokens, dtype=np.float32) for number in numbers]
        return 1 - torch.tensor(np.stack(drawn))
