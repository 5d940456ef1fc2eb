"""A table kept beside the data, so that the next run need not make it: text, with a checksum."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Table = TypeVar("Table")

_ESCAPE = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_UNESCAPE = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}


def read_rows(
    file: Path, magic: str, parse: Callable[[Mapping[str, Any], Iterator[list[str]]], Table | None]
) -> Table | None:
    """What `parse` makes of the first line's values and the rows; or `None` if it is damaged or not there.

    Args:
        file: what `write_rows` wrote.
        magic: how the first line begins, with the version of the format.
        parse: gives `None` if the table is out of date, and raises `ValueError`, `LookupError` or `TypeError` on
            values that are none of its own.
    """
    if not file.exists():
        return None
    try:
        header, _, body = file.read_bytes().partition(b"\n")
        if not header.startswith(magic.encode()):
            raise ValueError("its first line is not that of this version")
        values = json.loads(header[len(magic) :])
        if hashlib.sha256(body).hexdigest() != values["sha256"]:
            raise ValueError("its checksum does not fit")
        # Only "\n" ends a row: splitlines would also split at the rarer line ends that a file name may hold.
        rows = body.decode(errors="surrogateescape").split("\n")[:-1]
        return parse(values, (_fields(row) for row in rows))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        logger.warning("%s cannot be used (%s); the images are listed anew", file, error)
        return None


def write_rows(file: Path, magic: str, values: Mapping[str, Any], rows: Iterable[Sequence[object]]) -> None:
    """Keep the rows for the next run, whole or not at all; a folder that cannot be written to is no error."""
    lines = ("\t".join(str(value).translate(_ESCAPE) for value in row) + "\n" for row in rows)
    body = "".join(lines).encode(errors="surrogateescape")
    header = f"{magic}{json.dumps({**values, 'sha256': hashlib.sha256(body).hexdigest()})}\n".encode()
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        # The superuser can write anywhere; a folder that its owner marked as read-only is still left alone.
        if not file.parent.stat().st_mode & 0o222:
            raise PermissionError("the folder is read-only")
        try:
            temporary.write_bytes(header + body)
            # Replacing is atomic: another process reads the earlier list or this one, never a part.
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        logger.info("%s is not kept (%s); the images are listed on each run", file, error.strerror or error)


def _fields(row: str) -> list[str]:
    return [_unescape(field) if "\\" in field else field for field in row.split("\t")]


def _unescape(field: str) -> str:
    return re.sub(r"\\(.)", lambda match: _UNESCAPE[match[1]], field)
