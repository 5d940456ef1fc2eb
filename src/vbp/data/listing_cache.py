"""Keep the list of a split's images beside them: JSON lines, the first one with a checksum of the others.

The first line also says what the list was made from, such as sizes and modification times. The check on the next run
looks at those alone, which costs one call a folder instead of one a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vbp.runtime.decode import read_json_lines
from vbp.runtime.files import LOCK, clear_leftovers, leftovers, try_lock, write_bytes

_log = logging.getLogger(__name__)
Row = Sequence[Any]


def read_rows(
    file: Path, format_name: str, is_row: Callable[[Row], bool], is_current: Callable[[Mapping[str, Any]], bool]
) -> tuple[dict[str, Any], list[Row]] | None:
    """Return what `write_rows` wrote; None if the file is missing, damaged or out of date.

    `is_row` tells whether a list can be a row; `is_current` is called with what the list was made from.
    """
    _clear_leftovers(file)
    if not file.exists():
        return None
    try:
        pieces = read_json_lines(file)
        start, (values, *rows) = next(pieces)
        if values["format"] != format_name:
            raise ValueError("its format is not that of this version")
        if not is_current(values["made_from"]):
            return None
        digest = hashlib.sha256(start.partition(b"\n")[2])
        for piece, more in pieces:
            digest.update(piece)
            rows += more
        if digest.hexdigest() != values["sha256"]:
            raise ValueError("its checksum does not fit")
        if not all(isinstance(row, list) and is_row(row) for row in rows):
            raise ValueError("a row of it is damaged")
        return values["made_from"], rows
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        _log.warning("%s cannot be used (%s); the images are listed anew", file, error)
        return None


def write_rows(file: Path, format_name: str, made_from: Mapping[str, Any], rows: Iterable[Row]) -> None:
    """Keep the rows for the next run, whole or not at all; a folder that cannot be written to is no error."""
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    header = {"format": format_name, "sha256": hashlib.sha256(body).hexdigest(), "made_from": made_from}
    try:
        # The superuser can write anywhere; a folder that its owner marked as read-only is still left alone.
        if not file.parent.stat().st_mode & 0o222:
            raise PermissionError("the folder is read-only")
        with try_lock(file.parent) as held:
            if not held:
                _log.info("%s is not kept: another process is writing into %s", file, file.parent)
                return
            # Another process reads the earlier list or this one, never a part.
            write_bytes(file, json.dumps(header).encode() + b"\n" + body)
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        _log.info("%s is not kept (%s); the images are listed on each run", file, cause.strerror or cause)


def _clear_leftovers(file: Path) -> None:
    """Remove what a killed process left beside the list, unless another one is writing there."""
    if leftovers(file.parent, of=file.name) or (file.parent / LOCK).exists():
        with contextlib.suppress(OSError), try_lock(file.parent) as held:  # what stays does no harm
            if held:
                clear_leftovers(file.parent, of=file.name)
