"""Files are whole or not there, whatever goes wrong, and a folder that cannot take them is known before any work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import pytest
import torch

from vbp import InputError, OutputError
from vbp.runtime.files import check_folder, clear_folder, write_atomically, write_bytes, write_json

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a file that an earlier run wrote."""
    earlier = tmp_path / "result.bin"
    earlier.write_bytes(b"earlier")
    return earlier


def untouched(path: Path) -> bool:
    """Return whether the earlier file is whole and nothing else is left in its folder."""
    return path.read_bytes() == b"earlier" and [entry.name for entry in path.parent.iterdir()] == [path.name]


def failing(error: BaseException, before: bytes = b"half of i") -> Callable[..., NoReturn]:
    """Return a writer, or a function of the system, that fails midway."""

    def fail(*arguments: Any, **_: Any) -> NoReturn:
        if arguments and hasattr(arguments[0], "write"):
            arguments[0].write(before)
        raise error

    return fail


def test_a_written_file_holds_its_content_alone(path: Path) -> None:
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    write_atomically(path.with_name("two"), lambda file: [file.write(part) for part in (b"a", b"b" * 100_000)])
    assert path.with_name("two").read_bytes() == b"a" + b"b" * 100_000
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["result.bin", "two"]


def test_json_reads_back_and_keeps_its_letters(tmp_path: Path) -> None:
    value = {"größe": [1, 2.5, None], "nested": {"true": True}}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_bytes().decode("utf-8")
    assert json.loads(text) == value
    assert "größe" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("before", [b"", b"some", b"x" * 1_000_000])
@pytest.mark.parametrize("error", [FULL, RuntimeError("PytorchStreamWriter failed writing file data/0")])
def test_a_failed_write_is_one_error_and_leaves_the_earlier_file(path: Path, error: Exception, before: bytes) -> None:
    with pytest.raises(OutputError, match=r"result\.bin could not be written .*earlier files are whole") as caught:
        write_atomically(path, failing(error, before))
    assert str(error) in str(caught.value)
    assert caught.value.__cause__ is error
    assert untouched(path)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), TypeError("not plain data")])
def test_other_interruptions_pass_and_leave_the_earlier_file(path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        write_atomically(path, failing(error))
    assert caught.value is error
    assert untouched(path)


class FullDisk:
    """A file on a disk that takes so many bytes and no more."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: bytes) -> int:
        self.room -= len(content)
        if self.room < 0:
            raise OSError(*FULL.args)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


@pytest.mark.parametrize("room", [0, 100, 5_000])
def test_torch_save_on_a_full_disk_leaves_the_earlier_file(path: Path, room: int) -> None:
    value = {"weight": torch.zeros(2_000)}
    with pytest.raises(OutputError, match="could not be written"):
        write_atomically(path, lambda file: torch.save(value, FullDisk(file, room)))  # type: ignore[arg-type]
    assert untouched(path)
    write_atomically(path, lambda file: torch.save(value, FullDisk(file, 100_000)))  # type: ignore[arg-type]
    assert torch.equal(torch.load(path, weights_only=True)["weight"], value["weight"])


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("error", [FULL, PermissionError(errno.EACCES, "Permission denied")])
def test_a_failing_system_call_leaves_the_earlier_file(
    path: Path, step: str, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, step, failing(error))
    with pytest.raises(OutputError, match="could not be written"):
        write_bytes(path, b"new")
    assert untouched(path)


def test_the_content_is_on_disk_before_it_takes_the_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[object] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append(os.fstat(file).st_size), fsync(file))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), replace(*names))[1])
    write_bytes(path, b"new content")
    assert order == [len(b"new content"), "replace"]


def test_a_missing_folder_and_a_folder_in_the_place_are_errors(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="could not be written"):
        write_bytes(tmp_path / "missing" / "file", b"x")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="could not be written"):
        write_bytes(tmp_path / "taken", b"x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_values_that_are_no_json_leave_the_earlier_file(path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(path, {"tensor": torch.zeros(1)})
    assert untouched(path)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """Return `os.umask`, put back afterwards."""
    mask = os.umask(0o022)
    yield os.umask
    os.umask(mask)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_the_mode_of_a_file_follows_the_umask(path: Path, umask: Callable[[int], int], mask: int, mode: int) -> None:
    path.chmod(0o604)
    umask(mask)
    write_bytes(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert os.umask(mask) == mask


def test_a_new_folder_is_made_and_the_probe_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    check_folder(folder, overwrite=False, needed_bytes=1)
    assert list(folder.iterdir()) == []
    check_folder(folder, overwrite=False, needed_bytes=1)


def test_a_folder_with_results_needs_overwrite_and_is_left_alone(path: Path) -> None:
    with pytest.raises(InputError, match=r"save_dir must be empty or new, got .* with result\.bin; .*--overwrite"):
        check_folder(path.parent, overwrite=False, needed_bytes=0)
    check_folder(path.parent, overwrite=True, needed_bytes=0)
    assert untouched(path)


def test_a_hidden_file_counts_as_a_result_too(tmp_path: Path) -> None:
    (tmp_path / ".keep").touch()
    with pytest.raises(InputError, match=r"with \.keep;"):
        check_folder(tmp_path, overwrite=False, needed_bytes=0)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_file_in_the_way_is_no_folder(path: Path, below: str, overwrite: bool) -> None:
    with pytest.raises(InputError, match=r"save_dir must be a folder that can be written, got .*result\.bin"):
        check_folder(path / below, overwrite=overwrite, needed_bytes=0)
    assert untouched(path)


def test_too_little_space_is_said_in_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))(total=2**40, used=2**40 - 50 * 2**20, free=50 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check_folder(tmp_path, overwrite=False, needed_bytes=50 * 2**20)
    with pytest.raises(InputError, match=r"save_dir needs about 51 MiB, got 50 MiB free"):
        check_folder(tmp_path, overwrite=False, needed_bytes=51 * 2**20)
    # Space is asked about the folder itself: it may be another disk than the one we stand on.
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: (asked.append(Path(folder)), usage)[1])
    check_folder(tmp_path / "new", overwrite=False, needed_bytes=0)
    assert asked == [tmp_path / "new"]


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), FULL])
@pytest.mark.parametrize("step", ["open", "mkdir", "list"])
def test_a_folder_that_cannot_be_written_is_an_input_error(
    tmp_path: Path, step: str, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Injected, because the superuser may write anywhere.
    owner, name = {
        "open": (tempfile, "NamedTemporaryFile"),
        "mkdir": (Path, "mkdir"),
        "list": (Path, "iterdir"),
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(error))
        with pytest.raises(
            InputError, match=r"save_dir must be a folder that can be written, got .*--save_dir"
        ) as got:
            check_folder(tmp_path, overwrite=True, needed_bytes=0)
    assert error.strerror in str(got.value)
    assert list(tmp_path.iterdir()) == []


def test_clearing_removes_the_given_names_alone(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("plan.json", "plan.json.bak", "notes.txt", "sub/plan.json"):
        (tmp_path / name).touch()
    clear_folder(tmp_path, ["plan.json", "summary.json"])
    left = sorted(str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*"))
    assert left == ["notes.txt", "plan.json.bak", "sub", "sub/plan.json"]


def test_what_cannot_be_cleared_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(OutputError, match=r"plan\.json could not be removed"):
        clear_folder(tmp_path, ["plan.json"])
    assert (tmp_path / "plan.json").is_dir()


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path: Path) -> None:
    for name in ("best.pth", ".best.pth.x1.part", ".other.x1.part", "best.pth.part"):
        (tmp_path / name).write_text(name)
    clear_folder(tmp_path, ["best.pth"])
    assert {entry.name for entry in tmp_path.iterdir()} == {".other.x1.part", "best.pth.part"}
