"""Hugging Face datasets: small parquet folders, read back by the datasets library itself as the oracle."""

from __future__ import annotations

import io
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from vbp.data.data_path import check_data_path, list_images
from vbp.data.images import Images
from vbp.data.labels import head_labels
from vbp.data.loader import make_loader
from vbp.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((2, 2, 3), number, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_split(
    folder: Path, split: str, labels: list[int | None], *, names: list[str] | None = None, first: int = 0
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(first + row), "path": f"{first + row}.png"} for row in range(len(labels))]
    columns = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=names) if names else datasets.Value("int64"),
        "text": datasets.Value("string"),
    }
    values = {"image": images, "label": labels, "text": ["x"] * len(labels)}
    data = datasets.Dataset.from_dict(values, features=datasets.Features(columns))
    data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture(autouse=True, scope="module")
def _quiet_and_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pets")
    write_split(folder, "train", [0, 2, 1, 1, 0, 2, 2], names=["ant", "bee", "cat"])
    write_split(folder, "validation", [2, 0, 1], names=["ant", "bee", "cat"], first=100)
    return folder


def numbers(images: Images) -> list[int]:
    return [Image.open(images.read(index)).getpixel((0, 0))[0] for index in range(len(images))]


def first_pixel(image: Image.Image) -> Tensor:
    return torch.full((3, 1, 1), float(image.getpixel((0, 0))[0]))


def test_rows_are_those_of_the_dataset(parquet: Path) -> None:
    check_data_path(f"hfds/{parquet}")
    for split, name in (("train", "train"), ("val", "validation")):
        images = list_images(f"hfds/{parquet}", split, 3)  # type: ignore[arg-type]
        oracle = datasets.load_dataset(str(parquet), split=name)
        assert numbers(images) == [row["image"].getpixel((0, 0))[0] for row in oracle]
        assert list(images.labels) == oracle["label"]
        assert images.name(2) == f"hfds/{parquet} ({name}) row 2"


def test_splits_and_columns_are_chosen_by_name(tmp_path: Path, parquet: Path) -> None:
    data_path = f"hfds/{parquet}?train=train[:4]&val=train+validation"
    check_data_path(data_path)
    part, both = list_images(data_path, "train", 3), list_images(data_path, "val", 3)
    assert (numbers(part), part.labels) == ([0, 1, 2, 3], (0, 2, 1, 1))
    assert (numbers(both), both.labels) == ([*range(7), 100, 101, 102], (0, 2, 1, 1, 0, 2, 2, 2, 0, 1))
    whole = list_images(f"hfds/{parquet}", "train", 3)
    assert part.fingerprint() == whole.select(range(4)).fingerprint() == both.select(range(4)).fingerprint()
    data = datasets.Dataset.from_dict(
        {"photo": [{"bytes": png(7), "path": None}], "kind": [1]},
        features=datasets.Features({"photo": datasets.Image(), "kind": datasets.Value("int32")}),
    )
    data.to_parquet(tmp_path / "train.parquet")
    images = list_images(f"hfds/{tmp_path}?image=photo&label=kind", "train", 2)
    assert (numbers(images), images.labels) == ([7], (1,))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("hfds/", "must say what to read after hfds/"),
        ("hfds/{}?vall=x", "got 'vall=x'"),
        ("hfds/{}?val=test", r"val of hfds/.* must be one of its splits \(train, validation\), got test"),
        ("hfds/{}/nowhere", "must be followed by a folder that exists or by OWNER/NAME .* got .*nowhere"),
        ("hfds/./nowhere", "must be followed by a folder that exists"),
        ("hfds/nobody/nothing", "dataset hfds/nobody/nothing must be readable, got .* looked for on the hub"),
    ],
)
def test_bad_paths_are_refused_before_any_work(parquet: Path, path: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        check_data_path(path.format(parquet))


@pytest.mark.parametrize(
    ("options", "classes", "text"),
    [
        ("train=test", 3, "must be readable, got ValueError: Unknown split"),
        ("image=photo", 3, "the image column of .* must be one of image, label, text, got photo"),
        ("label=kind", 3, "the label column of .* must be one of image, label, text, got kind"),
        ("image=label", 3, "column label of .* must hold images, got ClassLabel"),
        ("label=text", 3, "column text of .* must hold whole numbers as labels, got string"),
        ("val=validation", 4, "must be the model's 4, got 3 .ant, bee, cat.; choose a model with 3 classes"),
    ],
)
def test_datasets_that_do_not_fit_are_refused(parquet: Path, options: str, classes: int, text: str) -> None:
    with pytest.raises(InputError, match=text):
        list_images(f"hfds/{parquet}?{options}", "train", classes)


def test_bad_labels_and_damaged_files_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path / "a", "train", [0, -1, 1], names=["ant", "bee"])
    with pytest.raises(InputError, match=r"from 0 to 1, .* got -1 for hfds/.* \(train\) row 1 \(1 of 3 labels"):
        list_images(f"hfds/{tmp_path}/a", "train", 2)
    write_split(tmp_path / "b", "train", [0, 3])
    assert list_images(f"hfds/{tmp_path}/b", "train", 4).labels == (0, 3)
    with pytest.raises(InputError, match=r"from 0 to 2, .* got 3 for .* row 1"):
        list_images(f"hfds/{tmp_path}/b", "train", 3)
    write_split(tmp_path / "c", "train", [0, None])
    with pytest.raises(InputError, match="must hold whole numbers as labels, got 1 empty ones"):
        list_images(f"hfds/{tmp_path}/c", "train", 3)
    write_split(tmp_path / "d", "train", [0] * 50)
    [file] = (tmp_path / "d").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"dataset hfds/.*/d must be readable, got"):
        list_images(f"hfds/{tmp_path}/d", "train", 3)


def test_imagenet_labels_follow_the_head() -> None:
    info = ImageNetInfo("imagenet-1k")
    described = [info.index_to_description(label) for label in range(1000)]
    synsets = [info.index_to_label_name(label) for label in range(1000)]
    assert head_labels(described, 1000, "data") == list(range(1000))
    # Synsets say themselves which class they are, in any order, and some may be missing.
    places = random.Random(0).sample(range(1000), 600)
    assert head_labels([synsets[place] for place in places], 1000, "data") == places
    # Two of them are called crane, and outside of their order nothing tells which is which.
    with pytest.raises(InputError, match=r"got 'crane', 'crane' for 134, 517; .* by synset"):
        head_labels([*described[:2], described[3], described[2], *described[4:]], 1000, "data")
    # Of names of its own nothing is known.
    assert head_labels([f"kind {label}" for label in range(1000)], 1000, "data") == list(range(1000))


@pytest.mark.parametrize("workers", [0, 2])
def test_no_image_is_lost_or_doubled(parquet: Path, workers: int) -> None:
    images = list_images(f"hfds/{parquet}", "train", 3)
    for world in (1, 2, 3):
        found = [
            int(number)
            for rank in range(world)
            for batch, _ in make_loader(
                images, first_pixel, batch_size=2, num_workers=workers, rank=rank, world=world
            )
            for number in batch[:, 0, 0, 0]
        ]
        assert sorted(found) == list(range(7))


def test_an_empty_or_broken_image_is_an_unreadable_one(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict(
        {"image": [None, {"bytes": b"", "path": None}, {"bytes": b"x", "path": "x"}, {"bytes": png(4), "path": None}]}
        | {"label": [0, 0, 0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    data.to_parquet(tmp_path / "train.parquet")
    images = list_images(f"hfds/{tmp_path}", "train", 2)
    loader = make_loader(images, first_pixel, batch_size=4, num_workers=0, max_unreadable=0.8)
    [(batch, labels)] = loader
    assert (batch[:, 0, 0, 0].tolist(), labels.tolist()) == ([4.0], [1])
    assert [reason.split(":")[0] for reason in loader.unreadable.values()] == [
        "OSError",
        "OSError",
        "UnidentifiedImageError",
    ]


def test_images_travel_to_other_processes_and_places(tmp_path: Path, parquet: Path) -> None:
    images = list_images(f"hfds/{parquet}", "train", 3)
    sent = pickle.loads(pickle.dumps(images))
    assert (numbers(sent), sent.labels, sent.fingerprint()) == (numbers(images), images.labels, images.fingerprint())
    chosen = images.select([5, 1])
    assert (numbers(chosen), chosen.labels, chosen.name(0)[-5:]) == ([5, 1], (2, 2), "row 5")
    others = [images, chosen, images.select([1, 5]), list_images(f"hfds/{parquet}", "val", 3)]
    assert len({each.fingerprint() for each in others}) == 4
    for name in ("x", "y"):
        write_split(tmp_path / name, "train", [0, 2, 1, 1, 0, 2, 2], names=["ant", "bee", "cat"])
        assert list_images(f"hfds/{tmp_path}/{name}", "train", 3).fingerprint() == images.fingerprint()


def test_other_columns_are_not_decoded_and_a_row_opens_only_regular_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(3))
    os.mkfifo(tmp_path / "pipe.png")
    rows = [{"bytes": None, "path": str(tmp_path / "a.png")}, {"bytes": None, "path": str(tmp_path / "pipe.png")}]
    image = datasets.Image()
    data = datasets.Dataset.from_dict(
        {"image": [*rows, {"bytes": None, "path": "/dev/zero"}], "mask": [{"bytes": b"%!PS", "path": None}] * 3}
        | {"label": [0, 1, 1]},
        features=datasets.Features({"image": image, "mask": image, "label": datasets.Value("int64")}),
    )
    (tmp_path / "data").mkdir()
    data.cast_column("image", datasets.Image(decode=False)).cast_column(
        "mask", datasets.Image(decode=False)
    ).to_parquet(tmp_path / "data/train.parquet")
    images = list_images(f"hfds/{tmp_path}/data", "train", 2)
    loader = make_loader(images, first_pixel, batch_size=4, num_workers=0, max_unreadable=0.8)
    [(batch, labels)] = loader
    assert (batch[:, 0, 0, 0].tolist(), labels.tolist()) == ([3.0], [0])
    assert [reason.partition(":")[2] for reason in loader.unreadable.values()] == [
        " it is a pipe, and only regular files are read",
        " it is a device, and only regular files are read",
    ]
