"""Class names travel with a classifier where its weights or its data say them, and are never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from families import FAMILIES
from timm.data.imagenet_info import ImageNetInfo

from vbp import load_classifier
from vbp.models.class_names import dataset_class_names, huggingface_class_names, is_imagenet, timm_class_names


def test_pretrained_imagenet_heads_are_named() -> None:
    names = timm_class_names(timm.get_pretrained_cfg("deit_tiny_patch16_224").to_dict(), 1000)
    assert names is not None
    assert (len(names), names[0], names[999]) == (
        1000,
        "tench, Tinca tinca",
        "toilet tissue, toilet paper, bathroom tissue",
    )
    large = timm_class_names(timm.get_pretrained_cfg("vit_base_patch16_224.augreg_in21k").to_dict(), 21843)
    assert large is not None
    assert len(large) == 21843
    assert timm_class_names({"num_classes": 1000}, 10) is None
    assert timm_class_names({"num_classes": 10}, 10) is None


def test_a_record_of_ones_own_goes_before_imagenet() -> None:
    cfg = {"num_classes": 2, "label_names": ["n1", "n2"], "label_descriptions": {"n1": "cat"}}
    assert timm_class_names(cfg, 2) == ("cat", "n2")
    assert timm_class_names({**cfg, "label_names": {"1": "dog", "0": "cat"}}, 2) == ("cat", "dog")
    assert timm_class_names(cfg, 3) is None


def test_a_file_or_random_weights_say_nothing(tmp_path: Path) -> None:
    model = timm.create_model("test_vit")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert load_classifier("test_vit", checkpoint=tmp_path / "weights.pth").class_names is None
    assert load_classifier("test_vit", allow_random_init=True).class_names is None


def test_hugging_face_names_but_no_placeholders(tmp_path: Path) -> None:
    model = FAMILIES["hf-vit"].build()
    assert huggingface_class_names(model.config.to_dict()) is None
    model.config.id2label = {index: f"class {index}" for index in range(7)}
    assert huggingface_class_names(model.config.to_dict()) == tuple(f"class {index}" for index in range(7))
    assert huggingface_class_names({}) is None
    assert huggingface_class_names({"id2label": {"0": "a", "2": "c"}}) is None


@pytest.mark.parametrize(
    ("folders", "classes", "first"),
    [
        (["n01443537", "n01440764"], 1000, "tench, Tinca tinca"),
        (ImageNetInfo("imagenet-1k").label_names(), 1000, "tench, Tinca tinca"),
        (["cat", "dog"], 2, "cat"),
        ([f"n{number}" for number in range(1000)], 1000, "n0"),
    ],
)
def test_datasets_name_their_classes(folders: list[str], classes: int, first: str) -> None:
    names = dataset_class_names(folders, classes)
    assert names is not None
    assert (len(names), names[0]) == (classes, first)


def test_a_part_of_the_classes_names_none() -> None:
    assert dataset_class_names(["cat", "dog"], 3) is None
    assert dataset_class_names([], 1000) is None


def test_imagenet_is_known_by_its_class_names() -> None:
    names = tuple(ImageNetInfo("imagenet-1k").label_descriptions())
    assert is_imagenet(names, 1000)
    assert not is_imagenet(names[::-1], 1000)
    assert not is_imagenet([f"class {number}" for number in range(1000)], 1000)
    assert not is_imagenet(None, 1000)
    assert not is_imagenet(names[:10], 10)
