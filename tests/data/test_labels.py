"""Which label a class gets: a known name before a number, a number before a position."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from torchvision.transforms.functional import to_tensor

from vbp.data.data_path import class_folders, list_images
from vbp.data.folder import ImageList
from vbp.data.labels import head_labels, label_in_path
from vbp.data.loader import make_loader
from vbp.errors import InputError

INFO = ImageNetInfo("imagenet-1k")
OWN = ("zebra", "Golden_Retriever", "ant, emmet", "10-19")


def make_folders(data: Path, *names: str, split: str = "val") -> Path:
    for name in names:
        (data / split / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(data / split / name / "0.png")
    return data


def by_folder(images: ImageList) -> dict[str, int]:
    return {path.split("/")[1]: label for path, label in zip(images.paths, images.labels, strict=True)}


@pytest.mark.parametrize("pattern", ["{}", "{:04d}"])
def test_folders_named_by_numbers_are_numbered_by_them(tmp_path: Path, pattern: str) -> None:
    """Kin to the reports of ImageNet folders 0 to 999 in the order of text: DeiT-tiny fell from 79 to 1.5 %."""
    data = make_folders(tmp_path, *map(pattern.format, range(1000)))
    assert by_folder(list_images(data, "val", 1000)) == {pattern.format(number): number for number in range(1000)}
    assert head_labels(["2", "0", "1"], 3, "data") == [2, 0, 1]
    # From 1 on they are in the order of numbers too, as in no model's own list.
    data = make_folders(tmp_path / "one", *map(str, range(1, 13)), split="train")
    assert by_folder(list_images(data, "train", 12)) == {str(number): number - 1 for number in range(1, 13)}
    assert class_folders(data, 12) == [str(number) for number in range(1, 13)]


def test_folders_with_the_models_own_names_are_numbered_by_these(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Kin to the reports of a fine-tuned Hugging Face model, whose `id2label` is not in alphabetical order."""
    caplog.set_level(logging.INFO)
    data = make_folders(tmp_path, "10-19", "ant", "golden retriever", "zebra")
    labels = {"10-19": 3, "ant": 2, "golden retriever": 1, "zebra": 0}
    assert by_folder(list_images(data, "val", 4, OWN)) == labels
    assert "numbered in their order" not in caplog.text
    # A kept list must not hide that this model has no names; the log says what was done.
    assert by_folder(list_images(data, "val", 4)) == {name: label for label, name in enumerate(labels)}
    assert "the 4 classes of" in caplog.text
    assert "are numbered in their order (10-19, ant, golden retriever, zebra)" in caplog.text
    assert by_folder(list_images(data, "val", 4, OWN)) == labels
    # Names say themselves which class they are: some may be missing, in one split or both.
    make_folders(tmp_path, "zebra", "ant", split="train")
    assert by_folder(list_images(data, "train", 4, OWN)) == {"ant": 2, "zebra": 0}


def test_a_hugging_face_dataset_follows_the_same_rule(tmp_path: Path) -> None:
    names = sorted(["zebra", "Golden_Retriever", "ant", "10-19"])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [Image.new("RGB", (4, 4))] * 4, "label": [0, 1, 2, 3]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    assert list_images(f"hfds/{tmp_path}", "train", 4, OWN).labels == (3, 1, 2, 0)
    assert list_images(f"hfds/{tmp_path}", "train", 4).labels == (0, 1, 2, 3)
    with pytest.raises(
        InputError, match=r"must have the names of the model's classes \(a, b, c, d\), .* rename them"
    ):
        list_images(f"hfds/{tmp_path}", "train", 4, "abcd")


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["cat", "dog", "fox", "owl"], r"must have the names of the model's classes \(zebra, .* 0 to 3, got cat"),
        (["cat", "zebra", "ant", "10-19"], "must all have names of the model's classes, .* got cat among 3"),
        (["emmet", "zebra", "ant", "10-19"], "no other for the same, got 'emmet', 'ant' for 2; rename or join"),
        (["zebra", "ant", "cat"], "got cat among 2 of its names"),
        (["cat", "dog"], "must be the model's 4, got 2"),
    ],
)
def test_classes_that_are_not_the_models_are_refused(names: list[str], text: str) -> None:
    with pytest.raises(InputError, match=text):
        head_labels(names, 4, "data", OWN)


def test_english_names_of_imagenet(tmp_path: Path) -> None:
    """Kin to the reports of ImageNet folders with readable names, where 0.5 % was right."""
    chosen = {"goldfish": 1, "Great_White_Shark": 2, "teddy bear": 850, "n02123045": 281, "missile": 657}
    data = make_folders(tmp_path, *chosen)
    assert by_folder(list_images(data, "val", 1000)) == chosen
    described = [INFO.index_to_description(label) for label in range(1000)]
    assert by_folder(list_images(data, "val", 1000, described)) == chosen
    with pytest.raises(InputError, match=r"got 'crane' for 134, 517; rename"):
        head_labels(["crane", "goldfish"], 1000, "data")
    # In order, a few names spelt otherwise do no harm; of a model in another order synsets say nothing.
    assert head_labels([*described[:999], "paper roll"], 1000, "data") == list(range(1000))
    with pytest.raises(InputError, match="must be the model's 1000, got 1"):
        head_labels(["n02123045"], 1000, "data", tuple(described[::-1]))


def test_a_list_of_samples_that_contradicts_its_paths_is_refused(tmp_path: Path) -> None:
    """Kin to the reports of labels counted among the folders at hand, of a part of ImageNet: 76.7 became 10 %."""
    synsets = [INFO.index_to_label_name(label) for label in (7, 281, 850)]
    data = make_folders(tmp_path, *synsets)
    ranks = [(f"val/{name}/0.png", rank) for rank, name in enumerate(synsets)]
    (data / "val_samples.pkl").write_bytes(pickle.dumps(ranks))
    with pytest.raises(InputError, match=r"got 0 for val/n\d+/0.png, whose path names class 7 \(3 of 3 contradict"):
        list_images(data, "val", 1000)
    assert list_images(data, "val", 3).labels == (0, 1, 2)
    with pytest.raises(InputError, match=r"path names class 2 \(2 of 3"):
        list_images(data, "val", 3, (synsets[2], synsets[1], synsets[0]))
    right = [(path, label) for (path, _), label in zip(ranks, (7, 281, 850), strict=True)]
    (data / "val_samples.pkl").write_bytes(pickle.dumps(right))
    assert list_images(data, "val", 1000).labels == (7, 281, 850)
    assert label_in_path("/flat/n02123045_17.JPEG", 1000) == 281
    assert label_in_path("/pictures/xn02123045/17.JPEG", 1000) is None


def test_what_is_left_out_is_stated_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Kin to the reports of thumbnails of network disks taken as images, and of extensions that were not."""
    caplog.set_level(logging.INFO)
    data = make_folders(tmp_path, "ant", "bee")
    for name, kind in {"a.JPE": "JPEG", "b.jfif": "JPEG", "c.gif": "GIF", "d.avif": "AVIF"}.items():
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data / "val/ant" / name, kind)
    before = list_images(data, "val", 2)
    assert len(before) == 6
    assert "left out" not in caplog.text
    (data / "val/ant/notes.txt").touch()
    (data / "val/ant/Thumbs.db").touch()
    Image.new("RGB", (8, 8)).save(data / "val/ant/e.jp2")
    (data / "val/ant/.hidden.png").touch()
    for folder in ("val/@eaDir", "val/ant/@eaDir", "val/ant/__MACOSX"):
        make_folders(data / folder, "x", split="y")
    for link in ("val/loop", "val/ant/all"):
        (data / link).symlink_to(data / "val", target_is_directory=True)
    expected = (
        f"left out of {data / 'val'}: 1 .db (not read), 1 .jp2 (not read), 1 .txt (not read), 2 @eaDir, 1 __MACOSX, "
        "1 hidden, 2 links to a folder above"
    )
    for _ in range(2):  # the list that is kept says it too
        caplog.clear()
        assert list_images(data, "val", 2) == before
        assert expected in caplog.text


RAMP = np.tile(np.linspace(0, 65535, 64), (8, 1))


@pytest.mark.parametrize(
    ("name", "pixels", "problem"),
    [
        ("a.png", RAMP.astype(np.uint16), None),
        ("a.tif", RAMP.astype(np.uint16), None),
        ("b.png", (RAMP / 16).astype(np.uint16), "16-bit grey of which no value is above 4095"),
        ("b.tif", (RAMP / 65535).astype(np.float32), "grey values of mode F have no stated range"),
        ("c.tif", RAMP.astype(np.int32), "grey values of mode I have no stated range"),
    ],
)
def test_deep_grey_images_are_scaled_right_or_refused_by_name(
    tmp_path: Path, name: str, pixels: np.ndarray[Any, Any], problem: str | None
) -> None:
    """Kin to the reports of 16-bit and float images that came out white or black."""
    data = make_folders(tmp_path, "ant")
    Image.fromarray(pixels).save(data / "val/ant" / name)
    loader = make_loader(list_images(data, "val", 1), to_tensor, batch_size=1, num_workers=0, max_unreadable=1)
    images = [batch for batch, _ in loader]
    if problem is None:
        assert (images[-1] - torch.from_numpy(RAMP / 65535)).abs().max() < 1 / 400
    else:
        assert problem in loader.unreadable[str(data / "val/ant" / name)]
