"""Mix the images of a batch and their labels: Mixup and CutMix by timm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vbp.training.losses import check_below_one, check_weights


@dataclass(frozen=True)
class Mixup:
    """Mix each image of a batch with the one at the same place from the end.

    `mixup` and `cutmix` are alphas; 0 leaves one out, and with both each batch takes one of them at random. What is
    drawn depends on the seed, the epoch, the batch and the process alone.

    Source: Zhang et al. (2018), equation 2; Yun et al. (2019), equation 1.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    num_classes: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        check_weights("mixup and cutmix", self.mixup, self.cutmix, "0.8 and 1.0 are usual")
        check_below_one("label_smoothing", self.label_smoothing, usual=0.1)

    def __call__(
        self,
        pixels: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, "batch"],
        *,
        epoch: int,
        batch: int,
        rank: int = 0,
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch classes"]]:
        """Return mixed images and their shares of all classes; the images that came in stay as they are."""
        from timm.data.mixup import Mixup as TimmMixup  # timm takes seconds to import

        half, odd = (len(labels) + 1) // 2, len(labels) % 2 == 1
        # timm takes even batches. In an odd one the image in the middle is its own partner and stays as it is: it
        # stands there twice while the others are mixed.
        if odd:
            pixels, labels = (torch.cat((both[:half], both[half - 1 :])) for both in (pixels, labels))
        mix = TimmMixup(  # type: ignore[no-untyped-call]
            self.mixup, self.cutmix, label_smoothing=self.label_smoothing, num_classes=self.num_classes
        )
        with _numpy_seeded(self.seed, epoch, batch, rank):
            mixed, targets = mix(pixels.clone(), labels)
        if odd:
            mixed, targets = (torch.cat((both[:half], both[half + 1 :])) for both in (mixed, targets))
        return mixed, targets


@contextmanager
def _numpy_seeded(*numbers: int) -> Iterator[None]:
    """Draw from NumPy's global numbers, as timm does, and leave them as they were."""
    state = np.random.get_state()
    np.random.seed(np.random.SeedSequence(numbers).generate_state(8))
    try:
        yield
    finally:
        np.random.set_state(state)
