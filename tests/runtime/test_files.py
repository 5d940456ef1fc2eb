"""Files are whole or not there, whatever goes wrong, and a folder that cannot take them is known before any work."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import pytest
import torch

from vbp import InputError, OutputError
from vbp.runtime.files import (
    LOCK,
    check_folder,
    clear_folder,
    clear_leftovers,
    folder_lock,
    try_lock,
    write_atomically,
    write_bytes,
    write_json,
)

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


LEFT_BY_A_KILL = (LOCK, ".probe.x1y2", ".best.pth.x1y2.part", "checkpoints/.epoch0001-batch000000.pt.x1y2.part")


def test_what_a_kill_leaves_counts_as_nothing_and_is_removed_by_who_goes_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in (*LEFT_BY_A_KILL, ".keep", "plan.part"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"with \.keep, checkpoints, plan\.part;"):
        check_folder(tmp_path, overwrite=False, needed_bytes=0)
    clear_leftovers(tmp_path, of="best.pth")
    assert not (tmp_path / ".best.pth.x1y2.part").exists()
    assert (tmp_path / ".probe.x1y2").exists()
    clear_leftovers(tmp_path)
    # The lock is removed by who takes it.
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, ".keep", "plan.part", "checkpoints"}
    with folder_lock(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".keep", "plan.part", "checkpoints"}


HOLD = """
import os, sys, time
from pathlib import Path
from vbp.runtime.files import folder_lock
with folder_lock(Path(sys.argv[1])):
    if os.fork() == 0:  # as the processes that read images are forked
        print("held", flush=True)
    time.sleep(30)
"""


def test_another_process_is_refused_until_the_holder_ends_however_it_does(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        message = (
            rf"save_dir must be a folder into which no other job writes, got {folder}, .*process {holder.pid} on"
        )
        with pytest.raises(InputError, match=message + r".* writes; wait .* --save_dir$"), folder_lock(folder):
            pass
        with try_lock(folder) as held:
            assert not held
        holder.kill()
        holder.wait()
        # The fork is still there.
        with folder_lock(folder):
            write_bytes(folder / "result", b"")
    finally:
        os.killpg(holder.pid, 9)
        holder.stdout.close()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "a/b"):
        check_folder(tmp_path / "a/b", overwrite=False, needed_bytes=0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with folder_lock(tmp_path / "empty"), folder_lock(tmp_path / "a/c"):
        (tmp_path / "a/c/file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "c", "empty", "file"]


def test_a_folder_that_cannot_be_locked_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match="save_dir must be a folder that can be written"), folder_lock(path):
        pass
    assert untouched(path)
    caplog.set_level(logging.WARNING)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", failing(OSError(errno.ENOLCK, "No locks available")))
        with folder_lock(path.parent):
            pass
    assert "cannot be locked (No locks available): see that no other job writes into it" in caplog.text
    assert untouched(path)


def test_the_end_of_a_reading_process_during_a_write_is_no_full_disk(path: Path) -> None:
    error = RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. ")
    with pytest.raises(InputError, match=r"process 77, which read images .* \(Killed\), .*--num_workers"):
        write_atomically(path, failing(error))
    assert untouched(path)
