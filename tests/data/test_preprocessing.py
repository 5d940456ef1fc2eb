"""Preprocessing: timm is the oracle of the evaluation transform; bad values stop at once."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config

from vbp.data.preprocessing import (
    CROP_MODES,
    INTERPOLATIONS,
    Preprocessing,
    ViewTransform,
    evaluation_transform,
    training_transform,
)
from vbp.errors import InputError

IMAGENET = Preprocessing((32, 32), 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def random_image(width: int = 57, height: int = 41, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("img_size", [(32, 32), (24, 40)])
def test_evaluation_equals_timm_bit_for_bit(crop_mode: str, interpolation: str, img_size: tuple[int, int]) -> None:
    preprocessing = replace(
        IMAGENET, crop_mode=crop_mode, interpolation=interpolation, img_size=img_size, crop_pct=0.9
    )
    oracle = create_transform(
        input_size=(3, *img_size),
        is_training=False,
        interpolation=interpolation,
        crop_pct=0.9,
        crop_mode=crop_mode,
        mean=IMAGENET.mean,
        std=IMAGENET.std,
    )
    for width, height in [(57, 41), (20, 90), (8, 8)]:
        image = random_image(width, height)
        expected = oracle(image)
        assert expected.shape == (3, *img_size)
        assert torch.equal(evaluation_transform(preprocessing)(image), expected)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_evaluation_equals_timm_for_a_models_own_configuration(name: str) -> None:
    config = resolve_data_config({}, model=timm.create_model(name))
    preprocessing = Preprocessing(
        img_size=config["input_size"][1:],
        crop_pct=config["crop_pct"],
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_mode=config["crop_mode"],
    )
    image = random_image(200, 180)
    oracle = create_transform(**config, is_training=False)
    assert torch.equal(evaluation_transform(preprocessing)(image), oracle(image))


@given(
    width=st.integers(4, 64),
    height=st.integers(4, 64),
    edge=st.integers(16, 40),
    crop_pct=st.floats(0.3, 1.0),
    crop_mode=st.sampled_from(CROP_MODES),
)
@settings(max_examples=40, deadline=None)
def test_both_transforms_always_give_the_networks_size(
    width: int, height: int, edge: int, crop_pct: float, crop_mode: str
) -> None:
    preprocessing = replace(IMAGENET, img_size=(edge, edge + 3), crop_pct=crop_pct, crop_mode=crop_mode)
    image = random_image(width, height)
    for transform in (evaluation_transform(preprocessing), training_transform(preprocessing)):
        assert transform(image).shape == (3, edge, edge + 3)


def test_the_whole_image_in_training_equals_evaluation() -> None:
    # With the full area, the image's own ratio and no flip, the random crop is the identity crop.
    preprocessing = replace(IMAGENET, crop_pct=1.0)
    image = random_image(48, 48)
    transform = training_transform(preprocessing, hflip=False, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    torch.testing.assert_close(transform(image), evaluation_transform(preprocessing)(image))


def test_hflip_mirrors_about_half_of_the_images_and_only_when_asked() -> None:
    image = random_image(32, 32)
    whole: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    plain = training_transform(IMAGENET, hflip=False, **whole)(image)
    torch.manual_seed(0)
    flipping = training_transform(IMAGENET, hflip=True, **whole)
    mirrored = sum(torch.equal(flipping(image), plain.flip(-1)) for _ in range(100))
    assert 30 < mirrored < 70
    keeping = training_transform(IMAGENET, hflip=False, **whole)
    assert all(torch.equal(keeping(image), plain) for _ in range(20))


def test_one_view_in_so_many_is_as_for_evaluation() -> None:
    image = random_image(40, 48)
    plain = evaluation_transform(IMAGENET)(image)
    alone = ViewTransform(IMAGENET, 1, scale=(0.35, 1.0))
    assert all(torch.equal(alone(image), plain) for _ in range(20))
    torch.manual_seed(0)
    views = [ViewTransform(IMAGENET, 4, scale=(0.35, 1.0))(image) for _ in range(200)]
    assert all(view.shape == plain.shape for view in views)
    assert 30 < sum(torch.equal(view, plain) for view in views) < 70
    torch.manual_seed(0)
    assert torch.equal(ViewTransform(IMAGENET, 4, scale=(0.35, 1.0))(image), views[0])


@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_one_mean_makes_a_grey_input(crop_mode: str) -> None:
    grey = Preprocessing((16, 16), 0.9, "bilinear", (0.5,), (0.25,), crop_mode)
    image = random_image(20, 30)
    colour = replace(grey, mean=(0.5,) * 3, std=(0.25,) * 3)
    expected = evaluation_transform(colour)(image.convert("L").convert("RGB"))[:1]
    assert torch.equal(evaluation_transform(grey)(image), expected)
    assert training_transform(grey)(image).shape == (1, 16, 16)


def test_transforms_can_be_sent_to_worker_processes() -> None:
    image = random_image()
    transform = evaluation_transform(IMAGENET)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), transform(image))
    pickle.dumps(training_transform(IMAGENET))
    pickle.dumps(ViewTransform(IMAGENET, 4, scale=(0.35, 1.0)))


def test_through_json_and_back() -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(IMAGENET.to_dict()))) == IMAGENET


def test_lists_and_tuples_are_the_same_preprocessing() -> None:
    listed = replace(IMAGENET, mean=list(IMAGENET.mean), std=list(IMAGENET.std))  # type: ignore[arg-type]
    assert listed == IMAGENET
    assert hash(listed) == hash(IMAGENET)


def test_override_changes_only_what_is_given() -> None:
    assert IMAGENET.override() == IMAGENET
    changed = IMAGENET.override(img_size=48, crop_pct=1.0, mean=[0.5] * 3)
    assert changed == replace(IMAGENET, img_size=(48, 48), crop_pct=1.0, mean=(0.5, 0.5, 0.5))


def test_str_is_one_line() -> None:
    assert str(IMAGENET) == (
        "32x32 pixels, center crop 0.875, bicubic, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)"
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"img_size": 0}, "img_size must be positive"),
        ({"img_size": 22.5}, "img_size must be positive"),
        ({"crop_pct": 0.0}, r"crop_pct must be in \(0, 1\], got 0.0"),
        ({"crop_pct": 1.01}, r"crop_pct must be in \(0, 1\], got 1.01"),
        ({"crop_pct": float("nan")}, "crop_pct must be"),
        ({"interpolation": "random"}, "interpolation must be one of .*bicubic.*, got 'random'"),
        ({"mean": (0.5,)}, "got 1 and 3 values; give both together"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "got 2 and 2 values"),
        ({"mean": "0.5"}, "mean must be a list of numbers, got '0.5'"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean must be a list of numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be greater than 0"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        IMAGENET.override(**values)


def test_bad_crop_mode_is_refused() -> None:
    with pytest.raises(InputError, match="crop_mode must be one of center, squash, border, got 'middle'"):
        replace(IMAGENET, crop_mode="middle")


@pytest.mark.parametrize(
    "values", [{"scale": (0.0, 1.0)}, {"scale": (0.5, 0.4)}, {"scale": (0.5, 1.5)}, {"ratio": (0.0, 1.0)}]
)
def test_bad_ranges_of_the_random_crop_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be two"):
        training_transform(IMAGENET, **values)


def test_from_dict_names_what_is_missing_and_unknown() -> None:
    values = IMAGENET.to_dict()
    del values["std"]
    values["sdt"] = [1, 1, 1]
    with pytest.raises(InputError, match="missing: std; unknown: sdt"):
        Preprocessing.from_dict(values)
