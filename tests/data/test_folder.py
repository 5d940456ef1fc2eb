"""Image lists and loaders: ImageFolder, a plain count and a loader without workers are the oracles."""

from __future__ import annotations

import collections
import hashlib
import io
import itertools
import json
import logging
import os
import pickle
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor
from torchvision.datasets import ImageFolder

from vbp.data.data_path import check_data_path, list_images
from vbp.data.folder import ImageList
from vbp.data.images import balanced_order, balanced_subset
from vbp.data.loader import ImageLoader, make_loader
from vbp.data.preprocessing import Preprocessing, evaluation_transform, training_transform
from vbp.errors import InputError

# Forking a process with threads, and more workers than cores, are warned of on some machines.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

PREPROCESSING = Preprocessing((16, 16), 0.9, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
EVALUATION = evaluation_transform(PREPROCESSING)
TRAINING = training_transform(PREPROCESSING)


def save_image(file: Path, seed: int = 0, size: tuple[int, int] = (20, 24)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def settle(data: Path) -> None:
    """Date all folders back, so that the next change gives a later time even on a coarse clock."""
    for folder, _, _ in os.walk(data):
        os.utime(folder, (1_000_000_000, 1_000_000_000))


def make_data(data: Path, classes: dict[str, int], splits: tuple[str, ...] = ("train", "val")) -> Path:
    for split in splits:
        for name, count in classes.items():
            (data / split / name).mkdir(parents=True)
            for number in range(count):
                save_image(data / split / name / f"{number}.png", seed=number)
    settle(data)
    return data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data", {"cat": 4, "ant": 3, "bee": 2})


def pairs(images: ImageList) -> list[tuple[str, int]]:
    return list(zip(images.paths, images.labels, strict=True))


def epoch_of(loader: ImageLoader) -> list[tuple[Tensor, Tensor]]:
    return list(loader)


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


# --- listing class folders


def test_listing_equals_imagefolder(data: Path) -> None:
    save_image(data / "train" / "bee" / "deep" / "er" / "x.JPEG")
    save_image(data / "train" / "bee" / "y.webp")
    (data / "train" / "bee" / "notes.txt").write_text("no image")
    images = list_images(data, "train", 3)
    oracle = ImageFolder(str(data / "train"))
    expected = [(Path(file).relative_to(data).as_posix(), label) for file, label in oracle.samples]
    assert sorted(pairs(images)) == sorted(expected)
    assert images.file(0) == data / images.paths[0]
    # Classes in order, paths in order within each: the same on every file system.
    assert pairs(images) == sorted(pairs(images), key=lambda pair: (pair[1], pair[0]))


def test_hidden_entries_are_no_images(data: Path) -> None:
    before = list_images(data, "val", 3)
    for hidden in (".thumbs/0.png", "cat/.0.png", "cat/.cache/0.png"):
        save_image(data / "val" / hidden)
    assert list_images(data, "val", 3) == before


def test_a_link_to_a_folder_above_ends(data: Path) -> None:
    before = list_images(data, "val", 3)
    (data / "val" / "cat" / "loop").symlink_to(data / "val" / "cat", target_is_directory=True)
    assert list_images(data, "val", 3) == before


def test_linked_class_folders_are_followed(data: Path) -> None:
    expected = pairs(list_images(data, "val", 3))
    shutil.move(data / "val" / "cat", data / "elsewhere")
    (data / "val" / "cat").symlink_to(data / "elsewhere", target_is_directory=True)
    assert pairs(list_images(data, "val", 3)) == expected


def test_synsets_are_numbered_as_the_head_even_where_folders_are_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    synsets = ImageNetInfo().label_names()
    chosen = [0, 7, 500, 999]
    data = make_data(tmp_path, {synsets[label]: 1 for label in chosen}, ("val",))
    make_data(tmp_path, {synsets[3]: 1}, ("train",))
    (data / "val" / synsets[42]).mkdir()
    images = list_images(data, "val", 1000)
    assert list(images.labels) == chosen
    assert [path.split("/")[1] for path in images.paths] == [synsets[label] for label in chosen]
    assert f"1 class folders of {data / 'val'} hold no image: {synsets[42]}" in caplog.text
    assert list_images(data, "train", 1000).labels == (3,)


def test_synset_folders_of_another_model_are_numbered_by_name(tmp_path: Path) -> None:
    synsets = ImageNetInfo().label_names()
    data = make_data(tmp_path, {synsets[7]: 1, synsets[500]: 1})
    assert list_images(data, "val", 2).labels == (0, 1)
    # The kept list of the other model must not be taken for this one's.
    assert list_images(data, "val", 1000).labels == (7, 500)
    assert list_images(data, "val", 2).labels == (0, 1)


def test_a_stray_folder_among_synsets_is_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path, {"n01440764": 1, "lost+found": 1})
    with pytest.raises(
        InputError, match=r"got lost\+found among 1 of its names; rename these classes or move them away"
    ):
        list_images(data, "val", 1000)


def no_data(data: Path) -> None:
    shutil.rmtree(data)


def data_is_a_file(data: Path) -> None:
    shutil.rmtree(data)
    data.write_text("")


def no_split(data: Path) -> None:
    shutil.rmtree(data / "val")


def no_classes(data: Path) -> None:
    shutil.rmtree(data / "val")
    (data / "val").mkdir()


def loose_images(data: Path) -> None:
    no_classes(data)
    save_image(data / "val" / "0.png")


def no_images(data: Path) -> None:
    for file in (data / "val").rglob("*.png"):
        file.unlink()


def one_class_without_images(data: Path) -> None:
    shutil.rmtree(data / "val" / "bee")
    (data / "val" / "bee").mkdir()


def one_class_more(data: Path) -> None:
    for split in ("train", "val"):
        save_image(data / split / "dog" / "0.png")


def other_class_in_train(data: Path) -> None:
    (data / "train" / "bee").rename(data / "train" / "wasp")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (no_data, "data_path must be a folder .* got .*data, which does not exist"),
        (data_is_a_file, "data_path must be a folder .* got .*data, which is no folder"),
        (no_split, "must hold a folder .*val with one folder of images for each class, found none"),
        (no_classes, "val must hold one folder of images for each class, found none$"),
        (loose_images, "found none but 1 images; move each into the folder of its class"),
        (no_images, "val must hold images .*webp.*found none in 3 class folders"),
        (one_class_without_images, "must hold images, found none in bee; add images"),
        (one_class_more, "must be the model's 3, got 4 .*choose a model with 4 classes"),
        (other_class_in_train, "same class folders, found only in train: wasp; only in val: bee"),
    ],
)
def test_unusable_folders_are_refused(data: Path, damage: Callable[[Path], None], text: str) -> None:
    list_images(data, "val", 3)  # a kept list must not hide the damage
    damage(data)
    with pytest.raises(InputError, match=text):
        list_images(data, "val", 3)


def test_a_text_is_a_folder_too_and_is_checked_without_a_model(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pairs(list_images(str(data), "val", 3)) == pairs(list_images(data, "val", 3))  # type: ignore[arg-type]
    check_data_path(str(data))
    monkeypatch.chdir(data)
    check_data_path(".")
    # A path object is a folder whatever its name.
    make_data(Path("wds") / "pets", {"cat": 1})
    assert len(list_images(Path("wds/pets"), "val", 1)) == 1
    no_split(data)
    with pytest.raises(InputError, match=r"got no folder .*val"):
        check_data_path(data)
    (data / "val_samples.pkl").touch()
    check_data_path(data)
    with pytest.raises(InputError, match=r"got no folder .*nowhere"):
        check_data_path(data / "nowhere")
    with pytest.raises(InputError, match=r"local files, got s3://bucket/x; copy it"):
        check_data_path("s3://bucket/x")


@pytest.mark.parametrize(("split", "classes"), [("test", 3), ("val", 0)])
def test_bad_arguments_are_refused(data: Path, split: Any, classes: int) -> None:
    with pytest.raises(InputError, match=r"must be train or val|must be 1 or more"):
        list_images(data, split, classes)


# --- the kept list


def count_scans(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    import vbp.data.folder as module

    scans: Counter[str] = Counter()
    for name in ("scan_split", "read_samples"):
        original = getattr(module, name)

        def counted(*arguments: Any, name: str = name, original: Any = original) -> Any:
            scans[name] += 1
            return original(*arguments)

        monkeypatch.setattr(module, name, counted)
    return scans


def test_the_list_is_made_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = count_scans(monkeypatch)
    first = [list_images(data, split, 3) for split in ("train", "val")]
    assert [list_images(data, split, 3) for split in ("train", "val")] == first
    assert scans == {"scan_split": 2}
    rows = (data / "val_index.jsonl").read_text().splitlines()[1:]
    assert rows == [json.dumps([label, path]) for path, label in pairs(first[1])]
    assert sorted(file.name for file in data.iterdir()) == [
        "train",
        "train_index.jsonl",
        "val",
        "val_index.jsonl",
    ]


def test_the_list_moves_with_the_folder(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list_images(data, "val", 3)
    scans = count_scans(monkeypatch)
    moved = data.rename(data.parent / "moved")
    after = list_images(moved, "val", 3)
    assert pairs(after) == pairs(before)
    assert after.fingerprint() == before.fingerprint()
    assert not scans


def add_image(data: Path) -> None:
    save_image(data / "val" / "cat" / "new.png")


def add_deep_image(data: Path) -> None:
    save_image(data / "val" / "cat" / "deep" / "new.png")


def remove_image(data: Path) -> None:
    (data / "val" / "cat" / "0.png").unlink()


def rename_image(data: Path) -> None:
    (data / "val" / "cat" / "0.png").rename(data / "val" / "cat" / "zero.png")


def rename_class(data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "cat").rename(data / split / "aardvark")


def add_samples_file(data: Path) -> None:
    (data / "val_samples.pkl").write_bytes(pickle.dumps([("val/cat/1.png", 2)]))


@pytest.mark.parametrize(
    "change", [add_image, add_deep_image, remove_image, rename_image, rename_class, add_samples_file]
)
def test_the_list_is_made_anew_when_the_folder_changes(data: Path, change: Callable[[Path], None]) -> None:
    before = list_images(data, "val", 3)
    change(data)
    after = list_images(data, "val", 3)
    (data / "val_index.jsonl").unlink()
    assert after == list_images(data, "val", 3) != before


def cut_short(index: bytes) -> bytes:
    return index[:-7]


def empty(index: bytes) -> bytes:
    return b""


def binary(index: bytes) -> bytes:
    return bytes(range(256))


def other_version(index: bytes) -> bytes:
    return index.replace(b"vbp-image-index/3", b"vbp-image-index/99")


def other_label(index: bytes) -> bytes:
    return index[: index.index(b"\n") + 1] + b"2" + index[index.index(b"\n") + 2 :]


def other_header(index: bytes) -> bytes:
    return index.replace(b'"directories": {', b'"directories": 3, "x": {')


def no_header_values(index: bytes) -> bytes:
    return b"[]" + index[index.index(b"\n") :]


@pytest.mark.parametrize(
    "damage", [cut_short, empty, binary, other_version, other_label, other_header, no_header_values]
)
def test_a_damaged_list_is_made_anew(
    data: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    expected = list_images(data, "val", 3)
    file = data / "val_index.jsonl"
    whole = file.read_bytes()
    assert damage(whole) != whole
    file.write_bytes(damage(whole))
    assert list_images(data, "val", 3) == expected
    assert f"{file} cannot be used" in caplog.text
    assert file.read_bytes() == whole


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such file names")
def test_odd_file_names_survive(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a\tb.png", "a\nb.png", "a\\nb.png", "a\rb.png", "a\x0bb\u2028c.png", "\u00e9 \u732b.png"]
    names.append(os.fsdecode(b"not-utf8-\xff.png"))
    for name in names:
        shutil.copy(data / "val" / "cat" / "0.png", data / "val" / "cat" / name)
    first = list_images(data, "val", 3)
    assert {f"val/cat/{name}" for name in names} <= set(first.paths)
    scans = count_scans(monkeypatch)
    again = list_images(data, "val", 3)
    assert (again, again.fingerprint()) == (first, first.fingerprint())
    assert not scans


def test_a_folder_that_is_marked_read_only_is_left_alone(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    data.chmod(0o555)
    try:
        first = list_images(data, "val", 3)
        scans = count_scans(monkeypatch)
        assert list_images(data, "val", 3) == first
        assert scans == {"scan_split": 1}
    finally:
        data.chmod(0o755)
    assert not (data / "val_index.jsonl").exists()
    assert "is not kept (the folder is read-only); the images are listed on each run" in caplog.text


def test_a_full_disk_leaves_the_earlier_list_whole(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    list_images(data, "val", 3)
    earlier = (data / "val_index.jsonl").read_bytes()
    add_image(data)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vbp.runtime.files.os.fsync", full)
    assert "val/cat/new.png" in list_images(data, "val", 3).paths
    assert (data / "val_index.jsonl").read_bytes() == earlier
    assert sorted(file.name for file in data.iterdir()) == ["train", "val", "val_index.jsonl"]
    assert "is not kept (No space left on device)" in caplog.text


# --- pickled samples


def write_samples(data: Path, samples: object) -> Path:
    file = data / "val_samples.pkl"
    file.write_bytes(pickle.dumps(samples))
    return file


def test_samples_come_in_their_order_with_paths_relative_where_possible(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = data.parent / "outside.png"
    save_image(outside)
    write_samples(
        data,
        [("val/cat/1.png", 2), [str(data / "val/ant/0.png"), 0], (str(outside), 1), ("val/bee/0.png", 1)],
    )
    shutil.rmtree(data / "train")  # class folders play no part
    scans = count_scans(monkeypatch)
    images = list_images(data, "val", 3)
    assert pairs(images) == [
        ("val/cat/1.png", 2),
        ("val/ant/0.png", 0),
        (str(outside), 1),
        ("val/bee/0.png", 1),
    ]
    assert all(images.file(index).is_file() for index in range(len(images)))
    assert list_images(data, "val", 3) == images
    assert scans == {"read_samples": 1}
    write_samples(data, [("val/cat/1.png", 2)])
    assert pairs(list_images(data, "val", 3)) == [("val/cat/1.png", 2)]


class Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("harm",))


class Persistent(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return 7 if isinstance(obj, str) else None


def persistent_pickle() -> bytes:
    stream = io.BytesIO()
    Persistent(stream).dump([("val/cat/0.png", 1)])
    return stream.getvalue()


GOOD = pickle.dumps([("val/cat/0.png", 2), ("val/ant/0.png", 0)])


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps([("val/cat/0.png", Command())]),
        pickle.dumps([("val/cat/0.png", collections.OrderedDict())], protocol=0),
        pickle.dumps([(Path("val/cat/0.png"), 2)]),
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        persistent_pickle(),
        b"",
        b"not a pickle",
        GOOD[:-1],
        GOOD[: len(GOOD) // 2],
    ],
)
@pytest.mark.filterwarnings("default")  # a damaged pickle may hold an invalid escape
def test_code_and_damage_in_a_samples_file_are_refused(
    data: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    (data / "val_samples.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"val_samples\.pkl must be a pickled list .* cannot be read"):
        list_images(data, "val", 3)
    assert not (data / "harm").exists()


def test_a_pickle_that_claims_gigabytes_takes_none(data: Path) -> None:
    """Kin to reports of small files that fill the memory: this one names place 2^28 of a table of earlier values."""
    (data / "val_samples.pkl").write_bytes(b"\x80\x02]r\x00\x00\x00\x10.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="got an empty list"):
        list_images(data, "val", 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_any_changed_byte_is_either_harmless_or_one_input_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    data = tmp_path_factory.getbasetemp() / "changed_byte"
    if not data.exists():
        make_data(data, {"cat": 1, "ant": 1})
    content = GOOD[:place] + bytes([value]) + GOOD[place + 1 :]
    (data / "val_samples.pkl").write_bytes(content)
    (data / "val_index.jsonl").unlink(missing_ok=True)
    try:
        images = list_images(data, "val", 3)
    except InputError:
        return
    assert all(0 <= label < 3 for label in images.labels)
    assert all(images.file(index).is_file() for index in range(len(images)))


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        ({"val/cat/0.png": 1}, r"must hold a list of \(path, label\), got a dict"),
        ([], "got an empty list"),
        (["val/cat/0.png"], r"must be \(path, label\), got 'val/cat/0.png' at 0"),
        ([("val/cat/0.png", 1, 2)], "got a tuple at 0"),
        ([("val/cat/0.png", 1), (b"val/cat/1.png", 1)], "must be a text, got a bytes at entry 1"),
        ([("val/cat/0.png", 3)], "from 0 to 2, as the model has 3 classes, got 3 at entry 0"),
        ([("val/cat/0.png", -1)], "got -1 at entry 0"),
        ([("val/cat/0.png", True)], "got True at entry 0"),
        ([("val/cat/0.png", 10**6000)], "got a int at entry 0"),
        ([("val/cat/0.png", "1")], "got '1' at entry 0"),
        ([("val/cat/0.png", 1), ("a.png", 1), ("b.png", 1)], "must exist, 2 of 3 do not, the first is a.png"),
    ],
)
def test_wrong_samples_are_refused(data: Path, samples: object, text: str) -> None:
    write_samples(data, samples)
    with pytest.raises(InputError, match=text):
        list_images(data, "val", 3)


# --- fingerprint and subset


def test_fingerprint_depends_on_paths_labels_and_order_alone() -> None:
    images = ImageList(Path("here"), ("a/0.png", "b/1.png"), (0, 1))
    assert images.fingerprint() == hashlib.sha256(b"0\0a/0.png\x001\0b/1.png\0").hexdigest()
    assert ImageList(Path("there"), images.paths, images.labels).fingerprint() == images.fingerprint()
    others = [images.select([1, 0]), images.select([0]), ImageList(images.root, images.paths, (0, 2))]
    assert len({other.fingerprint() for other in [images, *others]}) == 4


def test_an_image_list_has_a_label_for_each_path() -> None:
    with pytest.raises(InputError, match="got 2 paths and 1 labels"):
        ImageList(Path(), ("a", "b"), (0,))


def draw_by_rounds(labels: list[int], seed: int) -> list[int]:
    """Order the images in the obvious way: in each round, every class that has one left gives one."""
    generator = torch.Generator().manual_seed(seed)
    classes = sorted(set(labels))
    turns = torch.randperm(len(classes), generator=generator).tolist()
    queues: dict[int, list[int]] = {label: [] for _, label in sorted(zip(turns, classes, strict=True))}
    for index in torch.randperm(len(labels), generator=generator).tolist():
        queues[labels[index]].append(index)
    rounds = itertools.zip_longest(*queues.values())
    return [index for each in rounds for index in each if index is not None]


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=60), seed=st.integers(0, 2**40))
@settings(deadline=None)
def test_each_beginning_of_the_balanced_order_is_a_balanced_subset(labels: list[int], seed: int) -> None:
    images = ImageList(Path(), tuple(map(str, range(len(labels)))), tuple(labels))
    order = balanced_order(images, seed)
    assert list(order) == draw_by_rounds(labels, seed)
    for count in range(1, len(labels) + 1):
        assert balanced_subset(images, count, seed) == images.select(sorted(order[:count]))


@given(labels=st.lists(st.integers(0, 5), max_size=60), count=st.integers(0, 70), seed=st.integers(0, 2**40))
@settings(deadline=None)
def test_subset_is_balanced(labels: list[int], count: int, seed: int) -> None:
    images = ImageList(Path(), tuple(map(str, range(len(labels)))), tuple(labels))
    subset = balanced_subset(images, count, seed)
    assert subset == balanced_subset(images, count, seed)
    assert len(subset) == (min(count, len(images)) or len(images))
    places = [int(path) for path in subset.paths]
    assert places == sorted(set(places))
    assert subset.labels == tuple(labels[place] for place in places)
    had, got = Counter(labels), Counter(subset.labels)
    # Balanced means: a class that is short of the largest by more than one image has none left.
    most = max(got.values(), default=0)
    assert all(got[label] >= most - 1 or got[label] == had[label] for label in had)


def test_subset_depends_on_the_seed_and_draws_every_image_equally_often() -> None:
    images = ImageList(Path(), tuple(map(str, range(20))), (0,) * 10 + (1,) * 10)
    drawn = Counter(path for seed in range(1000) for path in balanced_subset(images, 5, seed).paths)
    assert len(drawn) == 20
    # 250 expected, standard deviation 14.
    assert all(180 < times < 320 for times in drawn.values())


def test_a_negative_subset_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be 0 .* or more, got -1"):
        balanced_subset(ImageList(Path(), ("a",), (0,)), -1, 0)


# --- loading


def test_batches_equal_transforming_by_hand(data: Path) -> None:
    images = list_images(data, "val", 3)
    loader = make_loader(images, EVALUATION, batch_size=4, num_workers=0)
    batches = epoch_of(loader)
    assert (len(loader), loader.batch_size, loader.images) == (3, 4, images)
    assert [len(labels) for _, labels in batches] == [4, 4, 1]
    expected = [EVALUATION(Image.open(images.file(index)).convert("RGB")) for index in range(len(images))]
    assert torch.equal(torch.cat([batch for batch, _ in batches]), torch.stack(expected))
    labels = torch.cat([labels for _, labels in batches])
    assert labels.dtype == torch.int64
    assert labels.tolist() == list(images.labels)
    assert loader.unreadable == {}


def test_epochs_do_not_depend_on_workers(data: Path) -> None:
    images = list_images(data, "train", 3)

    def loader(num_workers: int, seed: int = 1) -> ImageLoader:
        return make_loader(images, TRAINING, batch_size=2, num_workers=num_workers, shuffle=True, seed=seed)

    alone, helped = loader(0), loader(2)
    first = epoch_of(alone)
    assert same(first, epoch_of(helped))
    for each in (alone, helped):
        each.set_epoch(1)
    second = epoch_of(alone)
    assert same(second, epoch_of(helped))
    assert not same(first, second)
    next(iter(helped))  # an epoch that is left early does not disturb the next
    helped.set_epoch(0)
    assert same(first, epoch_of(helped))
    assert not same(first, epoch_of(loader(0, seed=2)))


def test_the_random_transform_depends_on_the_place_not_on_the_batch(data: Path) -> None:
    images = list_images(data, "train", 3)
    small = make_loader(images, TRAINING, batch_size=2, num_workers=0, seed=3)
    large = make_loader(images, TRAINING, batch_size=9, num_workers=0, seed=3)
    assert torch.equal(torch.cat([batch for batch, _ in small]), torch.cat([batch for batch, _ in large]))
    # The same file at two places is augmented in two ways.
    twice = make_loader(images.select([0, 0]), TRAINING, batch_size=2, num_workers=0)
    batch, _ = next(iter(twice))
    assert not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_programs_random_stream_alone(data: Path, num_workers: int) -> None:
    loader = make_loader(list_images(data, "train", 3), TRAINING, batch_size=2, num_workers=num_workers, shuffle=True)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    epoch_of(loader)
    assert torch.equal(torch.rand(3), expected)


def test_shuffling_gives_each_image_once(data: Path) -> None:
    images = list_images(data, "train", 3)
    orders = []
    for epoch in range(3):
        loader = make_loader(images, EVALUATION, batch_size=2, num_workers=0, shuffle=True)
        loader.set_epoch(epoch)
        labels = torch.cat([labels for _, labels in loader]).tolist()
        assert Counter(labels) == Counter(images.labels)
        orders.append(tuple(labels))
    assert len(set(orders)) == 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "palette with alpha"])
def test_every_mode_becomes_rgb_without_a_warning(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.fromarray(np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)).save(file)
    elif mode == "palette with alpha":
        Image.new("P", (20, 20)).save(file, transparency=bytes([10, 200]))
    else:
        Image.new(mode, (20, 20)).save(file)
    images = ImageList(tmp_path, (file.name,), (0,))
    batch, _ = next(iter(make_loader(images, EVALUATION, batch_size=1, num_workers=0)))
    assert batch.shape == (1, 3, 16, 16)


# --- unreadable images


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def no_image(file: Path) -> None:
    file.write_text("<html>404</html>")


def vanish(file: Path) -> None:
    file.unlink()


def make_huge(file: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(file)


def break_chunks(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[30:60] = bytes(30)
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", [truncate, no_image, vanish, make_huge, break_chunks])
def test_an_unreadable_image_is_named_once_and_left_out(
    data: Path, damage: Callable[[Path], None], num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    images = list_images(data, "val", 3)
    damage(images.file(4))
    loader = make_loader(images, EVALUATION, batch_size=2, num_workers=num_workers)
    for _ in range(2):
        labels = torch.cat([labels for _, labels in loader]).tolist()
        assert labels == [label for index, label in enumerate(images.labels) if index != 4]
    assert list(loader.unreadable) == [str(images.file(4))]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert str(images.file(4)) in warnings[0].getMessage()


def test_a_batch_without_a_readable_image_is_skipped(data: Path) -> None:
    images = list_images(data, "val", 3)
    vanish(images.file(8))
    loader = make_loader(images, EVALUATION, batch_size=4, num_workers=0)
    assert [len(labels) for _, labels in loader] == [4, 4]


def test_too_many_unreadable_images_stop_the_run(data: Path) -> None:
    images = list_images(data, "val", 3)
    for index in (1, 5, 7):
        vanish(images.file(index))
    with pytest.raises(
        InputError, match=r"at most 1 of 9 .* got 2 so far \(22.2%\): .*ant/1.png, .*cat/0.png; repair"
    ):
        epoch_of(make_loader(images, EVALUATION, batch_size=2, num_workers=0))
    with pytest.raises(InputError, match="at most 0 of 9"):
        epoch_of(make_loader(images, EVALUATION, batch_size=2, num_workers=0, max_unreadable=0))
    assert len(epoch_of(make_loader(images, EVALUATION, batch_size=9, num_workers=0, max_unreadable=0.4))) == 1


def test_no_readable_image_stops_the_run(data: Path) -> None:
    images = list_images(data, "val", 3).select([0, 1])
    for index in range(2):
        vanish(images.file(index))
    with pytest.raises(InputError, match=r"no image of .* could be read"):
        epoch_of(make_loader(images, EVALUATION, batch_size=2, num_workers=0, max_unreadable=1.0))
    with pytest.raises(InputError, match="at most 0 of 1"):
        epoch_of(make_loader(images.select([0]), EVALUATION, batch_size=2, num_workers=0))


def test_an_error_of_the_transform_is_no_unreadable_image(data: Path) -> None:
    def broken(image: Image.Image) -> Tensor:
        raise ValueError("a bug")

    loader = make_loader(list_images(data, "val", 3), broken, batch_size=2, num_workers=0)
    with pytest.raises(ValueError, match="a bug"):
        epoch_of(loader)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 .* got -1"),
        ({"max_unreadable": 1.5}, r"max_unreadable must be a share in \[0, 1\], got 1.5"),
        ({"prefetch": 0}, "prefetch must be 1 batch or more, got 0"),
        ({"max_pixels": 0}, "max_pixels must be 1 or more, got 0"),
        ({"rank": 2, "world": 2}, "rank must be a number from 0 to world - 1, got rank 2 of world 2"),
        ({"rank": -1}, "got rank -1 of world 1"),
        ({"world": 0}, "got rank 0 of world 0"),
        ({"world": 10, "shuffle": True}, "one image for each process at least, got 9 images for 10"),
    ],
)
def test_bad_loader_options_are_refused(data: Path, options: dict[str, Any], text: str) -> None:
    images = list_images(data, "val", 3)
    with pytest.raises(InputError, match=text):
        make_loader(images, EVALUATION, **{"batch_size": 2, "num_workers": 0, **options})


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(InputError, match="got 0 images"):
        make_loader(ImageList(Path(), (), ()), EVALUATION, batch_size=2, num_workers=0)
