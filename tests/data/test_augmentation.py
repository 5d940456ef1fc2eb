"""timm's augmentation: the paper's images without it, the same images whoever reads them with it."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vbp.data.preprocessing import Preprocessing, training_transform
from vbp.errors import InputError

COLOUR = Preprocessing((32, 32), 1.0, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Preprocessing((32, 32), 1.0, "bilinear", (0.5,), (0.5,))
POLICIES = ("rand-m9-mstd0.5-inc1", "rand-m15-n3", "rand-m9-tweights", "augmix-m3-w3", "original", "v0-mstd0.5", "3a")


def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (41, 57, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def drawn(preprocessing: Preprocessing, seed: int, **options: object) -> Tensor:
    """Return what training sees of the image with these random numbers."""
    torch.manual_seed(seed)
    return training_transform(preprocessing, **options)(image())  # type: ignore[arg-type]


@pytest.mark.parametrize("preprocessing", [COLOUR, GREY])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_changes_images_and_follows_the_seed_alone(preprocessing: Preprocessing, policy: str) -> None:
    plain = [drawn(preprocessing, seed) for seed in range(6)]
    random.seed(1)
    np.random.seed(1)
    first = [drawn(preprocessing, seed, auto_augment=policy) for seed in range(6)]
    random.seed(2)
    np.random.seed(2)
    again = [drawn(preprocessing, seed, auto_augment=policy) for seed in range(6)]
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, plain))
    assert {each.shape for each in first} == {plain[0].shape}


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m0", "v0"])
def test_what_pillow_refuses_of_a_policy_is_drawn_again(policy: str) -> None:
    # Posterising to 0 bits: about one image in ten.
    torch.manual_seed(0)
    transform = training_transform(COLOUR, auto_augment=policy)
    assert {transform(image()).shape for _ in range(60)} == {(3, 32, 32)}


def test_augmentation_leaves_the_random_numbers_of_the_process_alone() -> None:
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), float(np.random.rand())
    random.seed(3)
    np.random.seed(3)
    drawn(COLOUR, 0, auto_augment="rand-m9-mstd0.5-inc1", reprob=1.0)
    assert (random.random(), float(np.random.rand())) == expected


def test_erasing_replaces_one_rectangle_and_nothing_else() -> None:
    plain, erased = drawn(COLOUR, 5), drawn(COLOUR, 5, reprob=1.0)
    changed = (plain != erased).any(0)
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    assert 0 < area < 32 * 32
    assert changed.sum() == area
    assert torch.equal(drawn(COLOUR, 5, reprob=0.0), plain)


def test_an_augmenting_transform_reaches_other_processes() -> None:
    transform = training_transform(COLOUR, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)
    torch.manual_seed(0)
    expected = transform(image())
    torch.manual_seed(0)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image()), expected)


@pytest.mark.parametrize("policy", ["", "rand-m", "rand-m9-x3", "rand-nope", "randaugment", "v1", "rand-tnothing"])
def test_a_policy_that_timm_does_not_have_is_refused(policy: str) -> None:
    with pytest.raises(InputError, match=r"auto_augment must be a policy of timm, as rand-m9-mstd0.5-inc1, .* got "):
        training_transform(COLOUR, auto_augment=policy)


@pytest.mark.parametrize("reprob", [-0.1, 1.1])
def test_the_probability_of_erasing_is_one(reprob: float) -> None:
    with pytest.raises(InputError, match=r"reprob must be a probability in \[0, 1\], got "):
        training_transform(COLOUR, reprob=reprob)
