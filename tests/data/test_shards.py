"""WebDataset shards: webdataset's own reader is the oracle for what a whole shard holds."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from vbp.data.data_path import check_data_path, list_images
from vbp.data.images import Images
from vbp.data.loader import make_loader
from vbp.data.tar_scan import SampleFormat, scan_shard
from vbp.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

Files = list[tuple[str, bytes]]


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((2, 2, 3), number, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def sample(number: int) -> Files:
    return [(f"{number:03}.png", png(number)), (f"{number:03}.cls", str(number % 5).encode())]


def write_shard(shard: Path, files: Files) -> Path:
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return shard


def write_shards(folder: Path, sizes: list[int], split: str = "train", first: int = 0) -> int:
    for number, size in enumerate(sizes):
        files = [file for index in range(first, first + size) for file in sample(index)]
        write_shard(folder / f"pets-{split}-{number:04}.tar", files)
        first += size
    return first


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    write_shards(folder, [4, 1, 0, 6])
    write_shards(folder, [3], "val", first=100)
    return folder


def numbers(images: Images) -> list[int]:
    return [Image.open(images.read(index)).getpixel((0, 0))[0] for index in range(len(images))]


def first_pixel(image: Image.Image) -> Tensor:
    return torch.full((3, 1, 1), float(image.getpixel((0, 0))[0]))


def loaded(images: Images, **options: Any) -> list[int]:
    loader = make_loader(images, first_pixel, batch_size=2, **options)
    return [int(number) for batch, _ in loader for number in batch[:, 0, 0, 0]]


# --- the grammar


def test_samples_are_those_that_webdataset_reads(shards: Path) -> None:
    with tarfile.open(shards / "pets-train-0003.tar", "a") as tar:
        for name, content in [("__notes__/a.txt", b""), ("a/b.c/x.Png", png(77)), ("a/b.c/x.json", b"{}")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, content in [("a/b.c/x.cls", b" 2\n"), ("a/b.c/x.mask.png", b"-")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        tar.addfile(tarfile.TarInfo("README"))
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    images = list_images(f"wds/{shards}", "train", 5)
    files = sorted(shards.glob("*train*.tar"))
    with contextlib.ExitStack() as stack:
        sources = [{"url": file, "stream": stack.enter_context(file.open("rb"))} for file in files]
        oracle = list(group_by_keys(tar_file_expander(sources)))
    assert [images.read(index).read() for index in range(len(images))] == [each["png"] for each in oracle]
    assert list(images.labels) == [int(each["cls"]) for each in oracle]
    assert images.name(11) == f"a/b.c/x in {shards / 'pets-train-0003.tar'}"
    assert images.name(0) == f"000 in {shards / 'pets-train-0000.tar'}"


@pytest.mark.parametrize(
    ("path", "train"),
    [
        ("wds/{}", range(11)),
        ("wds/{}?train=pets-train-{{0000..0001}}.tar", range(5)),
        ("wds/{}?train=pets-train-{{0003,0000}}.tar", [*range(5, 11), *range(4)]),
        ("wds/{}?train=train-0003&val=val", range(5, 11)),
        ("wds/{}/pets-{{split}}-0000.tar", range(4)),
        ("wds/{}/*{{split}}*.tar", range(11)),
        ("wds/{}/pets-{{split}}-*.tar?val=val", range(11)),
        ("wds/{}/{{pets,pets}}-{{split}}-0000.tar?image=png&label=cls", None),
    ],
)
def test_each_form_of_the_path(shards: Path, path: str, train: list[int] | None) -> None:
    data_path = path.format(shards)
    if train is None:
        with pytest.raises(
            InputError, match=r"each shard of train must be named once, got pets-train-0000.tar twice"
        ):
            check_data_path(data_path)
        return
    check_data_path(data_path)
    assert numbers(list_images(data_path, "train", 5)) == list(train)
    assert numbers(list_images(data_path, "val", 5)) == [100, 101, 102]


def test_folders_of_splits_and_paths_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "data/train/0.tar", sample(1))
    write_shard(tmp_path / "data/validation/0.tar", sample(2))
    monkeypatch.chdir(tmp_path / "data")
    for data_path in ("wds/{split}/{0..0}.tar?val=validation", "wds/../data/{split}/*.tar?val=validation"):
        check_data_path(data_path)
        assert numbers(list_images(data_path, "train", 5)) == [1]
        assert numbers(list_images(data_path, "val", 5)) == [2]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("wds/", "must say what to read after wds/"),
        ("wds/{}/nowhere", "wds/ must be followed by a folder of shards .*/nowhere does not exist"),
        ("wds/{}/pets-val-0000.tar", r"a pattern of shards must hold \{{split\}}"),
        ("wds/{}?trian=a", "must be train=..., val=..., image=..., label=.* got 'trian=a'"),
        ("wds/{}?train=", "got 'train='"),
        ("wds/{}?train=a&train=b", "got 'train=b'"),
        ("wds/{}?val=test", r"must hold shards of val, found none in .* for \*test\*.tar; name them with \?val="),
        ("wds/{}?val=pets-{{0..3.tar", "the braces of a shard pattern must read"),
        (
            "wds/{}?val=pets-val-{{0000..0002}}.tar",
            "shards of val must exist, 2 of 3 do not, the first is .*val-0001.tar",
        ),
        ("wds/{}?val=pets", "train and val must have no shard in common, got pets-train-0000.tar in both"),
        ("wds/{}/pets-{{split}}-0000.tar?val=x.tar", "val= must be the split's name in the pattern"),
        ("wds/https://host/{{split}}.tar", "the data must lie in local files, got https://host"),
        ("wds/pipe:cat {{split}}.tar", "the data must lie in local files, got pipe:cat"),
    ],
)
def test_bad_paths_are_refused_before_any_work(shards: Path, path: str, text: str) -> None:
    with pytest.raises(InputError, match=text.replace("{{", "{").replace("}}", "}")):
        check_data_path(path.format(shards))


def test_a_missing_package_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for path, package in ((f"wds/{shards}", "webdataset"), ("hfds/owner/name", "datasets")):
        with pytest.raises(InputError, match=rf"needs the package {package}, .* pip install 'vbp-pruning\[data\]'"):
            check_data_path(path)


# --- labels and images


def test_labels_from_a_field_and_images_by_extension(tmp_path: Path) -> None:
    files = [("a.seg.png", b"-"), ("a.png", png(1)), ("a.JPG", png(2)), ("a.json", b'{"label": 3, "text": "x"}')]
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}.tar", files)
    images = list_images(f"wds/{tmp_path}?image=webp,jpg&label=json:label", "train", 5)
    assert (numbers(images), images.labels) == ([2], (3,))
    # The kept list of other options must not be taken for this one's.
    assert numbers(list_images(f"wds/{tmp_path}?image=png&label=json:label", "train", 5)) == [1]
    with pytest.raises(InputError, match=r"must have one image .* got jpg, json, png, seg.png for a in .*train.tar"):
        list_images(f"wds/{tmp_path}?label=json:label", "train", 5)
    with pytest.raises(InputError, match=r"the field text in the json of a in .*train.tar must be .* got 'x'"):
        list_images(f"wds/{tmp_path}?image=png&label=json:text", "train", 5)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ([("a.png", png(1))], r"must have one image \(jpg, .*\) and a label \(cls\), got png for a in"),
        ([("a.cls", b"1")], "got cls for a in"),
        ([*sample(1), ("a.txt", b"")], "got txt for a in"),
        ([("a.png", png(1)), *sample(1), ("a.cls", b"1")], "got png for a in"),
        ([*sample(1), *sample(2), *sample(1)], "each key must be once in a shard, .* got 001 again"),
        ([*sample(1), ("001.CLS", b"1")], "must be there once, got 001.CLS twice"),
        ([("a.png", png(1)), ("a.cls", b"one")], r"the label of a in .* whole number as text, got b'one'"),
        ([("a.png", png(1)), ("a.cls", b"1.0")], r"got b'1.0'"),
        ([("a.png", png(1)), ("a.cls", b"")], r"got b''"),
        ([*sample(1), ("a.png", png(1)), ("a.cls", b"5")], r"from 0 to 4, .* got 5 for a in .*\(1 of 2 labels"),
        ([("a.png", png(1)), ("a.cls", b"-1")], "from 0 to 4, .* got -1 for a in"),
        ([], "the shards of train in .* must hold samples, got none"),
    ],
)
def test_bad_samples_are_refused(tmp_path: Path, files: Files, text: str) -> None:
    shard = write_shard(tmp_path / "train.tar", files)
    with pytest.raises(InputError, match=text) as caught:
        list_images(f"wds/{tmp_path}", "train", 5)
    assert not files or str(shard) in str(caught.value)


@pytest.mark.parametrize("text", [b"{", b"[3]", b'{"label": true}', b'{"label": 3.0}', b"[" * 100_000])
def test_bad_fields_are_refused(tmp_path: Path, text: bytes) -> None:
    write_shard(tmp_path / "train.tar", [("a.png", png(1)), ("a.json", text)])
    with pytest.raises(InputError, match=r"json of a in .*train.tar must be"):
        list_images(f"wds/{tmp_path}?label=json:label", "train", 5)


# --- damage


def test_a_shard_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "train.tar", [file for number in range(3) for file in sample(number)])
    content = shard.read_bytes()
    form = SampleFormat.of(None, None)
    with tarfile.open(shard) as tar:
        tar.getmembers()
        end = tar.offset + tarfile.BLOCKSIZE
    # Python's own reader takes a cut in a header for the end, and loses the samples behind it silently.
    for size in range(0, end, 128):
        shard.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"shard .*train.tar must be a whole, uncompressed tar file"):
            list(scan_shard(shard, form))
    for size in (end, len(content)):
        shard.write_bytes(content[:size])
        assert len(list(scan_shard(shard, form))) == 3


def damage_header(content: bytes) -> bytes:
    second = content.index(b"001.png")
    return content[:second] + b"9" + content[second + 1 :]


@pytest.mark.parametrize("damage", [damage_header, lambda content: content * 2, gzip.compress, lambda _: b"no tar"])
def test_a_damaged_shard_is_refused(shards: Path, damage: Callable[[bytes], bytes]) -> None:
    shard = shards / "pets-train-0000.tar"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(InputError, match=r"shard .*train-0000.tar must be a whole, uncompressed tar file"):
        list_images(f"wds/{shards}", "train", 5)


def test_an_image_that_cannot_be_decoded_or_is_gone_is_an_unreadable_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [*sample(1), ("x.png", b"<html>"), ("x.cls", b"1"), *sample(2), *sample(3)]
    shard = write_shard(tmp_path / "train.tar", files)
    images = list_images(f"wds/{tmp_path}/{{split}}.tar", "train", 5)
    assert loaded(images, num_workers=0) == [1, 2, 3]
    assert f"cannot read the image x in {shard} (UnidentifiedImageError: none of the formats JPEG, " in caplog.text
    shard.write_bytes(shard.read_bytes()[: int(images.places[3, 1]) + 10])  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=rf"at most 1 of 4 images .* x in {shard}, 003 in {shard}; repair"):
        loaded(images, num_workers=0)


# --- shares


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sizes", [[11], [1, 7, 0, 3]])
def test_no_image_is_lost_or_doubled(tmp_path: Path, sizes: list[int], workers: int) -> None:
    count = write_shards(tmp_path, sizes)
    images = list_images(f"wds/{tmp_path}", "train", 5)
    for world in (1, 2, 5):
        shares = [loaded(images, num_workers=workers, rank=rank, world=world) for rank in range(world)]
        assert sorted(itertools.chain(*shares)) == list(range(count))
    epoch = [loaded(images, num_workers=workers, shuffle=True, rank=rank, world=2) for rank in range(2)]
    once = Counter(itertools.chain(*epoch))
    assert set(once.values()) == {1}
    assert len(once) == count - (count % 4 == 1)


def test_images_travel_to_other_processes_and_places(shards: Path) -> None:
    images = list_images(f"wds/{shards}", "train", 5)
    sent = pickle.loads(pickle.dumps(images))
    assert (numbers(sent), sent.labels, sent.fingerprint()) == (numbers(images), images.labels, images.fingerprint())
    moved = shards.rename(shards.parent / "moved")
    assert list_images(f"wds/{moved}", "train", 5).fingerprint() == images.fingerprint()
    chosen = images.select([7, 2])
    assert (chosen.labels, len(chosen), chosen.name(0).split()[0]) == ((2, 2), 2, "007")
    fingerprints = {each.fingerprint() for each in (images, chosen, images.select([2, 7]), images.select(range(10)))}
    assert len(fingerprints) == 4


# --- the kept list


def count_scans(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    scans: Counter[str] = Counter()

    def counted(shard: Path, form: SampleFormat) -> Any:
        scans[shard.name] += 1
        return scan_shard(shard, form)

    monkeypatch.setattr("vbp.data.shards.scan_shard", counted)
    return scans


def test_the_list_is_made_once_and_anew_when_a_shard_changes(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = count_scans(monkeypatch)
    first = list_images(f"wds/{shards}", "train", 5)
    again = list_images(f"wds/{shards}", "train", 5)
    assert set(scans.values()) == {1}
    assert (numbers(again), again.labels, again.fingerprint()) == (numbers(first), first.labels, first.fingerprint())
    shard = shards / "pets-train-0001.tar"
    write_shard(shard, sample(9))  # as long as before
    os.utime(shard, (1, 1))
    assert numbers(list_images(f"wds/{shards}", "train", 5))[4] == 9
    write_shards(shards, [2, 2])
    assert numbers(list_images(f"wds/{shards}", "train", 5))[:4] == [0, 1, 2, 3]
    (shards / "pets-train-0002.tar").unlink()
    assert len(list_images(f"wds/{shards}", "train", 5)) == 10
    # Labels are looked at for each model, whatever the list was made for.
    with pytest.raises(InputError, match="from 0 to 2"):
        list_images(f"wds/{shards}", "train", 3)


def test_a_list_that_cannot_be_kept_or_used_is_made_anew(
    shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    expected = numbers(list_images(f"wds/{shards}", "train", 5))
    kept = shards / "train_shards.jsonl"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-9])
    assert numbers(list_images(f"wds/{shards}", "train", 5)) == expected
    assert f"{kept} cannot be used (" in caplog.text
    assert kept.read_bytes() == whole
    kept.unlink()
    shards.chmod(0o555)
    try:
        assert numbers(list_images(f"wds/{shards}", "train", 5)) == expected
    finally:
        shards.chmod(0o755)
    assert not kept.exists()
    header = json.loads(whole.split(b"\n")[0])["made_from"]
    assert header["shards"][1][0] == "pets-train-0001.tar"


def test_processes_that_list_at_once_see_the_same(shards: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        listed = pool.starmap(list_images, [(f"wds/{shards}", "train", 5)] * 12, chunksize=1)
    assert {images.fingerprint() for images in listed} == {list_images(f"wds/{shards}", "train", 5).fingerprint()}
    assert [file.name for file in shards.iterdir() if file.suffix != ".tar"] == ["train_shards.jsonl"]
