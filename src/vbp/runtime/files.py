"""Write files whole or not at all, and find out early whether they can be written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, BinaryIO, Final

from vbp.errors import InputError, OutputError, some_of

# What Linux takes, in bytes, less some for the files in a folder; and how much of a name its temporary name has.
_LONGEST_NAME, _LONGEST_PATH, _LONGEST_START = 255, 4000, 48

_KINDS: Final = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_path(path: Path | str, what: str) -> None:
    """Raise InputError for a path that no file system takes, or not every library: safetensors wants UTF-8."""
    try:
        whole = str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} must be a path in UTF-8, got {path}; rename the folder") from None
    longest = max(whole.split(b"/"), key=len)
    if len(longest) > _LONGEST_NAME or len(whole) > _LONGEST_PATH:
        raise InputError(
            f"{what} must be a path of at most {_LONGEST_PATH} bytes, with at most {_LONGEST_NAME} between two "
            f"slashes, got {len(whole)} and {len(longest)} ({str(path)[:40]}...); choose a shorter one"
        )


def is_regular(path: Path) -> bool:
    """Return whether a path leads to a regular file; not to a pipe or a device, nor to a name that cannot be one."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it.

    Raises:
        OSError: It cannot be read, or is none: a pipe would wait for its writer, and a device may never end. Neither
            is opened.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError(f"it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, and only regular files are read")
    return path.open("rb")


def read_regular(path: Path) -> bytes:
    """Return the content of a file; raise OSError as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file, then put it in the place of `path` in one step.

    Raises:
        OutputError: The disk is full or cannot be written. The earlier file of that name stays whole.
    """
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name[:_LONGEST_START]}.", suffix=".part", delete=False
        ) as file:
            temporary = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private by default; the file that stays follows the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        # torch.save reports a failed write as RuntimeError of its zip writer.
        if isinstance(error, OSError | RuntimeError):
            raise OutputError(
                f"{path} could not be written ({error}); earlier files are whole; free space or choose another folder"
            ) from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes whole or not at all."""
    write_atomically(path, lambda file: file.write(content))


def text_bytes(text: str) -> bytes:
    r"""Return a text as UTF-8; bytes of a file name that are none become escapes, `\udcff`, as JSON has them."""
    return text.encode(errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON whole or not at all."""
    write_bytes(path, text_bytes(json.dumps(value, indent=2, ensure_ascii=False) + "\n"))


def check_folder(folder: Path, *, overwrite: bool, needed_bytes: int) -> None:
    """Create a folder if missing, and stop before any work if results cannot or may not be written into it.

    With `overwrite` results of another run may be there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe.") as probe:
            probe.write(b"0" * 4096)
            probe.flush()
        free = shutil.disk_usage(folder).free
        present = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise InputError(
            f"save_dir must be a folder that can be written, got {folder} ({error}); choose another --save_dir"
        ) from error
    if free < needed_bytes:
        raise InputError(
            f"save_dir needs about {needed_bytes / 2**20:.0f} MiB, got {free / 2**20:.0f} MiB free in {folder}; "
            "free some space or choose another --save_dir"
        )
    if present and not overwrite:
        raise InputError(
            f"save_dir must be empty or new, got {folder} with {some_of(present)}; choose another --save_dir "
            "or pass --overwrite to replace the results in it"
        )


def clear_folder(folder: Path, names: Iterable[str]) -> None:
    """Remove the results of an earlier run, so that no file of it is taken for one of this run."""
    for name in names:
        try:
            # A killed run leaves the half of a file under its temporary name.
            for file in (folder / name, *folder.glob(f".{name}.*.part")):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{folder / name} could not be removed ({error}); choose another folder") from error
