"""Data of strangers: kin to reports of lists, shards and indexes of kilobytes that took gigabytes or ran code."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory import at_most
from PIL import Image

from vbp import InputError, list_images
from vbp.data.data_path import check_data_path


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.png").write_bytes(png())
    return tmp_path


# --- pickled lists

_LISTS: dict[str, tuple[bytes, str]] = {
    "a memo place": (b"\x80\x02]r\x00\x00\x00\x10.", "an empty list"),
    "text of gigabytes": (b"\x80\x04X\xff\xff\xff\x7fabc.", "EOFError"),
    "text of terabytes": (b"\x80\x04\x8d" + struct.pack("<Q", 2**42) + b"abc.", "EOFError"),
    "bytes of gigabytes": (b"\x80\x05\x96" + struct.pack("<Q", 2**32) + b"abc.", "operation 150"),
    "a frame of gigabytes": (b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"].", "an empty list"),
    "a table": (b"\x80\x02}.", "got a dict"),
    "code": (b"cos\nsystem\n(S'true'\ntR.", "operation 99"),
    "nothing": (b"", "empty file"),
    "a number of 10,000 digits": (b"I" + b"9" * 10**4 + b"\n.", "4300 digits"),
    "a line without end": (b"I" + b"9" * 10**6, "4300 digits"),
    "a tower": (b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".", "got a list"),
    "a long path": (pickle.dumps([("x" * 5000, 0)]), "may have 4096 letters"),
}


@pytest.mark.parametrize("name", list(_LISTS))
def test_a_pickled_list_takes_no_more_memory_than_it_has_bytes(name: str, data: Path) -> None:
    content, text = _LISTS[name]
    (data / "train_samples.pkl").write_bytes(content)
    with at_most(200), pytest.raises(InputError, match=text) as refused:
        list_images(data, "train", 2)
    assert ": ;" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_error_without_text_is_named_by_its_kind(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kin to messages that ended in `cannot be read: ;`: some errors have no text."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    (data / "train_samples.pkl").write_bytes(pickle.dumps([("train/a/1.png", 0)]))
    monkeypatch.setattr("mmap.mmap", fail)
    with pytest.raises(InputError, match="cannot be read: MemoryError; write it anew"):
        list_images(data, "train", 2)


# --- the index of a folder and of shards


def sealed(path: Path, change: Callable[[Any], object]) -> None:
    """Change the rows of an index, and write it with a digest that fits."""
    header, *rows = map(json.loads, path.read_text().splitlines())
    change(rows)
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    header["sha256"] = hashlib.sha256(body).hexdigest()
    path.write_bytes(json.dumps(header).encode() + b"\n" + body)


@pytest.mark.parametrize(
    "row", [3, None, [], [0], [0, "a", 1], ["0", "a"], [True, "a"], [9, "a"], [-1, "a"], [0, None], [0, "a\0"]]
)
def test_an_index_with_rows_that_cannot_be_is_made_anew(row: Any, data: Path) -> None:
    expected = list_images(data, "train", 2)
    path = data / "train_index.jsonl"
    whole = path.read_bytes()
    sealed(path, lambda rows: rows.append(row))
    assert list_images(data, "train", 2) == expected
    assert path.read_bytes() == whole


def test_a_pipe_in_the_place_of_an_index_is_not_opened(data: Path) -> None:
    expected = list_images(data, "train", 2)
    (data / "train_index.jsonl").unlink()
    os.mkfifo(data / "train_index.jsonl")
    assert list_images(data, "train", 2) == expected


def test_an_index_of_zeros_is_not_read_to_its_end(data: Path) -> None:
    expected = list_images(data, "train", 2)
    with (data / "train_index.jsonl").open("wb") as file:
        file.truncate(2**33)
    with at_most(400):
        assert list_images(data, "train", 2) == expected


# --- shards


def write_shard(path: Path, members: list[tuple[str, bytes]], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}.tar", [("1.png", png()), ("1.cls", b"0")])
    return tmp_path


@pytest.mark.parametrize(
    "pattern", ["{0..999999999}", "{a,b}" * 40, "{{0..999},{0..99999999}}", "{0..9999}{0..9999}", "{000..999999999}"]
)
def test_a_pattern_is_not_expanded_without_end(pattern: str, shards: Path) -> None:
    with at_most(50), pytest.raises(InputError, match="a shard pattern may stand for 1000000 names, got "):
        check_data_path(f"wds/{shards}/{{split}}-{pattern}.tar")


def test_patterns_that_people_write_are_counted_right(shards: Path) -> None:
    for pattern, count in (("{0..9}{a,b}", 20), ("{a{1..10},b{1..10}}", 20), ("{a,{b,c}}{d,e}", 6), ("{9..0}", 10)):
        with pytest.raises(InputError, match=f"shards of train must exist, {count} of {count} do not"):
            check_data_path(f"wds/{shards}/{{split}}-{pattern}.tar")


def sparse_header(kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo("./header")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("held", [False, True])
def test_a_header_of_gigabytes_is_not_read(kind: bytes, held: bool, shards: Path) -> None:
    with (shards / "train.tar").open("wb") as file:
        file.write(sparse_header(kind, 2**33))
        if held:  # without blocks on the disk: the system reads zeros
            file.truncate(2**33 + 2**20)
    with at_most(50), pytest.raises(InputError, match=r"a header has \d+ bytes, allowed are"):
        list_images(f"wds/{shards}", "train", 1)


def test_fields_of_the_whole_shard_are_few(shards: Path) -> None:
    """Kin to archives whose global header is copied to each of their files."""
    fields = {f"a{number}": "b" for number in range(500)}
    members = [(f"{number}.png", b"") for number in range(2000)]
    write_shard(shards / "train.tar", members, format=tarfile.PAX_FORMAT, pax_headers=fields)
    with at_most(50), pytest.raises(InputError, match="has 500 fields in its header, allowed are 64"):
        list_images(f"wds/{shards}", "train", 1)


@pytest.mark.parametrize("name", ["1.png", "1.cls"])
def test_images_and_labels_of_gigabytes_are_refused(name: str, shards: Path) -> None:
    member, other = tarfile.TarInfo(name), "1.cls" if name == "1.png" else "1.png"
    member.size = 2**34
    with (shards / "train.tar").open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.seek(member.size, os.SEEK_CUR)
        file.write(tarfile.TarInfo(other).tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with at_most(50), pytest.raises(InputError, match=rf"{name} in .* may have \d+ bytes, got {2**34}"):
        list_images(f"wds/{shards}", "train", 1)


def test_a_shard_that_is_packed_or_a_pipe_is_refused(shards: Path) -> None:
    (shards / "train.tar").write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(InputError, match="must be a whole, uncompressed tar file"):
        list_images(f"wds/{shards}", "train", 1)
    (shards / "train.tar").unlink()
    os.mkfifo(shards / "train.tar")
    with pytest.raises(InputError, match="the shards of train must exist"):
        list_images(f"wds/{shards}", "train", 1)


@pytest.mark.parametrize(
    "row", [[0, "k"], [1, "k", 0, 1, 0], [0, "k", -1, 1, 0], [0, "k", 0, 2**40, 0], [0, "k", 10**30, 1, 0], [[]] * 5]
)
def test_an_index_of_shards_with_rows_that_cannot_be_is_made_anew(row: Any, shards: Path) -> None:
    expected = list_images(f"wds/{shards}", "train", 1).fingerprint()
    sealed(shards / "train_shards.jsonl", lambda rows: rows.append(row))
    assert list_images(f"wds/{shards}", "train", 1).fingerprint() == expected


# --- names of datasets


@pytest.mark.parametrize(
    "name", ["../x", "~", "a\nb", "a/b/c", "-a/b", "a--b/c", "a/.b", "https:/x", "x" * 97, "a b", "\u202e/x"]
)
def test_a_dataset_name_that_is_none_is_refused_before_anything_is_sought(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="hfds/ must be followed by") as refused:
        check_data_path(f"hfds/{name}")
    assert "\n" not in str(refused.value)


def test_a_script_in_the_place_of_a_dataset_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text("raise SystemExit")
    with pytest.raises(InputError, match="scripts are no longer supported"):
        check_data_path("hfds/x.py")
