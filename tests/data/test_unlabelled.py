"""Images without labels: in any folders, with `train` and `val` or not."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vbp import InputError, balanced_subset
from vbp.data.data_path import check_data_path, has_labels, list_splits, list_unlabelled


def fill(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (4, 4)).save(folder / f"{number}.png")


def test_a_folder_of_images_is_enough(tmp_path: Path) -> None:
    fill(tmp_path / "photos", 11)
    (tmp_path / "photos/notes.txt").write_text("none")
    check_data_path(tmp_path / "photos")
    assert not has_labels(tmp_path / "photos")
    train, val, labelled = list_splits(tmp_path / "photos", 10, None)
    assert not labelled
    names = [{images.name(place) for place in range(len(images))} for images in (train, val)]
    assert (len(train), len(val)) == (8, 3)
    assert not names[0] & names[1]
    with train.read(0) as file:
        assert file.read(4)[1:] == b"PNG"


def test_images_in_train_and_val_keep_to_them(tmp_path: Path) -> None:
    fill(tmp_path / "train", 3)
    fill(tmp_path / "val", 2)
    check_data_path(tmp_path)
    assert not has_labels(tmp_path)
    assert [len(list_unlabelled(tmp_path, split)) for split in ("train", "val")] == [3, 2]  # type: ignore[arg-type]


def test_folders_are_no_classes_for_a_model_without_any(tmp_path: Path) -> None:
    for name, count in (("a/x", 6), ("b", 2), ("c/y/z", 2)):
        fill(tmp_path / "train" / name, count)
        fill(tmp_path / "val" / name, 1)
    assert has_labels(tmp_path)
    train, val, labelled = list_splits(tmp_path, 0, None)
    assert (len(train), len(val), labelled) == (10, 3, False)
    # A part is taken evenly from all of them.
    assert sorted(balanced_subset(train, 6, 0).labels) == [0, 0, 1, 1, 2, 2]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "half/train", 2)
    (tmp_path / "empty/train").mkdir(parents=True)
    (tmp_path / "empty/val").mkdir()
    for place, fault in (
        ("half", "must hold both train and val, or neither, got only train"),
        ("empty", "must hold images for train, got none"),
        ("nowhere", "must be a folder with images, got .*nowhere, which is none"),
    ):
        with pytest.raises(InputError, match=fault):
            list_unlabelled(tmp_path / place, "train")


def test_shards_have_labels(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    with pytest.raises(InputError, match="must lie in a folder or a Hugging Face dataset, got wds/"):
        list_unlabelled(f"wds/{tmp_path}", "train")


def test_a_dataset_needs_no_column_of_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    fill(tmp_path / "images", 4)
    rows = {"image": [str(path) for path in sorted((tmp_path / "images").iterdir())]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    (tmp_path / "set").mkdir()
    for split in ("train", "validation"):
        made.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    found = list_unlabelled(f"hfds/{tmp_path / 'set'}", "val")
    assert len(found) == 4
    with found.read(0) as file:
        assert file.read(4)[1:] == b"PNG"
