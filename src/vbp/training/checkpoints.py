"""Training checkpoints: whole or not there, the newest two kept, a damaged one never taken for a whole one."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vbp.errors import InputError, OutputError, first_line
from vbp.runtime.files import clear_folder, clear_leftovers, is_regular, write_atomically
from vbp.runtime.sealed import READING_ERRORS, load_plain, seal_fault, write_sealed

_log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
FORMAT = "vbp-checkpoint/1"
_KEPT = 2

# What values of another kind, another shape or none lead to.
_CONTENT_ERRORS = (AttributeError, LookupError, TypeError, ValueError, RuntimeError, ArithmeticError)
_NAME = re.compile(r"(tuning-)?epoch(\d+)-batch(\d+)\.pt")


def save_checkpoint(
    save_dir: Path, state: Mapping[str, Any], *, epoch: int, batch: int, tuning: bool = False
) -> Path:
    """Write a checkpoint of a run, then remove those that are no longer needed; one process of a job calls it.

    Those of tuning without labels come before all of fine-tuning. Older checkpoints go only when two newer ones are
    whole, this one included. Later ones go too: training was taken up before them.

    Raises:
        OutputError: The file could not be written; earlier ones are whole.
        TypeError: The state holds more than tensors, numbers, text, None, and lists, tuples and dictionaries of
            them; nothing is written.
    """
    folder = save_dir / CHECKPOINTS
    path = folder / f"{'tuning-' if tuning else ''}epoch{epoch:04d}-batch{batch:06d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} could not be written ({error}); choose another folder") from error
    clear_leftovers(folder)
    write_atomically(path, lambda file: write_sealed(file, {"format": FORMAT, "state": dict(state)}, FORMAT))
    whole = 0
    for other in reversed([file for file in _files(folder) if _position(file) is not None]):
        if _place(other) > _place(path):
            _log.warning("%s is removed: training went on from before it", other)
            clear_folder(folder, [other.name])
        elif whole >= _KEPT:
            clear_folder(folder, [other.name])
        elif other == path or checkpoint_fault(other) is None:
            whole += 1
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the state in a checkpoint onto the CPU; nothing in it is run as code."""
    fault = checkpoint_fault(path)
    if fault is not None:
        raise InputError(f"{path} is no checkpoint that can be continued: {fault}")
    try:
        state: dict[str, Any] = load_plain(path)["state"]
    except READING_ERRORS as error:
        raise InputError(
            f"{path} is no checkpoint that can be continued: it cannot be read ({first_line(error)})"
        ) from error
    return state


@contextmanager
def checked_content(path: Path) -> Iterator[None]:
    """Raise InputError if what is done here with the state of a checkpoint shows that it is not that of a run."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path} is no checkpoint that can be continued: {error}") from error
    except _CONTENT_ERRORS as error:
        raise InputError(
            f"{path} is no checkpoint that can be continued: its content is not that of a run ({error!r:.300}); give "
            "another, or start over"
        ) from error


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder that can be read; None if there is no file.

    Each newer one that cannot be read is named in a warning.

    Raises:
        InputError: There are files, but none can be read.
    """
    files = _files(folder)
    for path in reversed(files):
        try:
            read_checkpoint(path)
        except InputError as error:
            _log.warning("%s; the one before it is tried", error)
        else:
            return path
    if files:
        names = ", ".join(path.name for path in files[-5:])
        raise InputError(
            f"{folder} must hold a checkpoint that can be continued, got {len(files)} files that are none ({names}); "
            "bring a whole one back, or start over with --overwrite and without --resume"
        )
    return None


def has_checkpoints(folder: Path) -> bool:
    """Return whether a folder holds a file with the name of a checkpoint, whole or not."""
    return newest_name(folder) is not None


def newest_name(folder: Path) -> str | None:
    """Return the name of the newest checkpoint in a folder, whole or not; None if there is none."""
    return next((path.name for path in reversed(_files(folder)) if _position(path) is not None), None)


def clear_checkpoints(save_dir: Path, after: Path | None = None) -> None:
    """Remove the checkpoints of an earlier run, or those `after` one; and what a killed run left half written."""
    folder = save_dir / CHECKPOINTS
    for path in _files(folder):
        if _position(path) is not None and (after is None or _place(path) > _place(after)):
            clear_folder(folder, [path.name])
    clear_leftovers(folder)


def checkpoint_fault(path: Path) -> str | None:
    """Return what is wrong with a file, without loading it; None if it is whole and ours."""
    if not is_regular(path):
        return "there is no such file; check the path"
    return seal_fault(path, FORMAT)


def _files(folder: Path) -> list[Path]:
    """List the files of a folder in the order of training; those with another name stand before all."""
    if not folder.is_dir():
        return []
    # Hidden files are halves left by a killed run, or the file system's own.
    return sorted((path for path in folder.iterdir() if path.is_file() and path.name[0] != "."), key=_place)


def _position(path: Path) -> tuple[int, int, int] | None:
    match = _NAME.fullmatch(path.name)
    return None if match is None else (int(match[1] is None), int(match[2]), int(match[3]))


def _place(path: Path) -> tuple[tuple[int, int, int], str]:
    return _position(path) or (-1, -1, -1), path.name
