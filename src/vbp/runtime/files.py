"""Write files whole or not at all, one job in a folder at a time, and find out early whether they can be written."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, Final

from vbp.errors import InputError, OutputError, some_of
from vbp.runtime.signals import killed_reader

_log = logging.getLogger(__name__)

# Names that a killed process may leave in a folder: its lock, the halves of files, and what tried whether a folder
# can be written. All code that makes, passes over or removes such a file goes by these.
LOCK: Final = ".vbp.lock"
# Held for moments, by one of several jobs that share a folder.
SHORT_LOCK: Final = ".vbp.short.lock"
_PROBE: Final = ".probe."
_HALF: Final = ".part"

# Between two tries to hold a lock.
_WAIT_STEP_S: Final = 0.05

# Open files of the locks that this process holds. A process that reads images is a fork of this one, and would hold
# them too, for seconds after this one was killed.
_held: set[int] = set()


def _let_go_in_child() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@contextlib.contextmanager
def try_lock(folder: Path, *, shared: bool = False, name: str = LOCK) -> Iterator[bool]:
    """Hold the lock of a folder for the length of the block, if no other process holds it; say whether.

    Several processes can hold a `shared` lock, while none has it alone. The lock ends with the process, however that
    ends. The folder is made if it is missing; what was made goes again if nothing was written into it.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    descriptor = None
    try:
        descriptor = _lock(folder, name, shared=shared)
        yield descriptor is not None
    finally:
        if descriptor is not None:
            if not shared or _is_last(descriptor):
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
            _held.discard(descriptor)
            os.close(descriptor)
        with contextlib.suppress(OSError):
            for place in missing:
                place.rmdir()


@contextlib.contextmanager
def folder_lock(folder: Path, *, shared: bool = False, name: str = LOCK, wait_seconds: float = 0.0) -> Iterator[None]:
    """Let no other job write into a folder for the length of the block, but those that share it; as `try_lock`.

    Raises:
        InputError: Another process writes there, after the wait still; or the folder cannot be written.
    """
    end = time.monotonic() + wait_seconds
    with contextlib.ExitStack() as stack:
        try:
            while not (held := stack.enter_context(try_lock(folder, shared=shared, name=name))):
                if time.monotonic() >= end:
                    break
                time.sleep(_WAIT_STEP_S)
        except OSError as error:
            raise _not_writable(folder, error) from error
        if not held:
            raise folder_in_use(folder)
        yield


def _is_last(descriptor: int) -> bool:
    """Return whether no other process holds a shared lock: if so it is held alone now, if not it may be lost."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lock(folder: Path, name: str, *, shared: bool) -> int | None:
    """Return the open file that holds the lock of a folder; None if another process has it."""
    import fcntl  # not on every system

    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # a job that has just ended took the empty folder away
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return None
        except OSError as error:
            _log.warning("%s cannot be locked (%s): see that no other job writes into it", folder, error.strerror)
        # The file may have been removed by the job that held it, and made anew by a third.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), (folder / name).stat()):
                _held.add(descriptor)
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        os.close(descriptor)


def folder_in_use(folder: Path, flag: str = "--save_dir") -> InputError:
    """Return the error to raise where another process holds the lock of a folder."""
    holder = ""
    with contextlib.suppress(OSError):
        holder = (folder / LOCK).read_text(errors="replace")[:100]
    return InputError(
        f"{flag.lstrip('-')} must be a folder into which no other job writes, got {folder}, into which "
        f"{holder or 'another process'} writes; wait until it has ended, or choose another {flag}"
    )


def leftovers(folder: Path, of: str = "*") -> list[Path]:
    """Return what killed processes left in a folder: halves of the file of this name, or all that they left."""
    patterns = [f".{of[:_LONGEST_START]}.*{_HALF}", *([f"{_PROBE}*"] if of == "*" else [])]
    return [file for pattern in patterns for file in folder.glob(pattern)]


def clear_leftovers(folder: Path, of: str = "*") -> None:
    """Remove what killed processes left in a folder; for who knows that no other process writes there."""
    _remove(leftovers(folder, of))


def is_leftover(name: str) -> bool:
    """Return whether a file has the name of something that a killed process left, and that may be removed."""
    return name in (LOCK, SHORT_LOCK) or name.startswith(_PROBE) or (name.startswith(".") and name.endswith(_HALF))


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
            dir=path.parent, prefix=f".{path.name[:_LONGEST_START]}.", suffix=_HALF, delete=False
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
        # PyTorch reports the end of a process that reads images in whatever line is just executed.
        if killed := killed_reader(error):
            raise killed from error
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

    With `overwrite` results of another run may be there. What a killed process left half written is nothing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=_PROBE) as probe:
            probe.write(b"0" * 4096)
            probe.flush()
        free = shutil.disk_usage(folder).free
        present = sorted(entry.name for entry in folder.iterdir() if not is_leftover(entry.name))
    except OSError as error:
        raise _not_writable(folder, error) from error
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


def _not_writable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"save_dir must be a folder that can be written, got {folder} ({error}); choose another --save_dir"
    )


def clear_folder(folder: Path, names: Iterable[str]) -> None:
    """Remove the results of an earlier run, so that no file of it is taken for one of this run."""
    for name in names:
        _remove([folder / name])
        clear_leftovers(folder, of=name)


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{file} could not be removed ({error}); choose another folder") from error
