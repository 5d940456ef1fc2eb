"""The kept list of a folder's images: `<split>_index.tsv` in the data folder, text with a checksum.

The first line says what the list was made from: the class count and, with their modification times, every
folder that was read, or the samples file. The check on the next run looks at those alone, which costs one
call a folder instead of one a file. A folder's time changes when an entry is added, removed or renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

_log = logging.getLogger(__name__)

Table = TypeVar("Table")
_ESCAPE = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_UNESCAPE = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}


def read_rows(
    file: Path, magic: str, parse: Callable[[Mapping[str, Any], Iterator[list[str]]], Table | None]
) -> Table | None:
    """Return what `parse` makes of the first line's values and the rows; None if the file is damaged or missing.

    Args:
        file: What `write_rows` wrote.
        magic: How the first line begins, with the version of the format.
        parse: Gives `None` if the table is out of date, and raises `ValueError`, `LookupError` or `TypeError` on
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
        _log.warning("%s cannot be used (%s); the images are listed anew", file, error)
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
        _log.info("%s is not kept (%s); the images are listed on each run", file, error.strerror or error)


def _fields(row: str) -> list[str]:
    return [_unescape(field) if "\\" in field else field for field in row.split("\t")]


def _unescape(field: str) -> str:
    return re.sub(r"\\(.)", lambda match: _UNESCAPE[match[1]], field)


_MAGIC = "#vbp-image-index 1 "


@dataclass(frozen=True)
class Source:
    """What a listing depends on.

    Attributes:
        num_classes: The labels of one folder differ with the class count of the model.
        samples_file: Size in bytes and modification time in nanoseconds, if there is such a file.
        directories: Modification time in nanoseconds of each folder read, by path relative to the data.
    """

    num_classes: int
    samples_file: tuple[int, int] | None
    directories: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, samples_file: Path, num_classes: int) -> Source:
        """Return the state at this moment, before any folder is read."""
        if not samples_file.is_file():
            return cls(num_classes, None)
        status = samples_file.stat()
        return cls(num_classes, (status.st_size, status.st_mtime_ns))


@dataclass(frozen=True)
class Listing:
    """Paths and labels with what they were made from."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    source: Source


def index_file(data_path: Path, split: str) -> Path:
    """Return where the list of this split is kept."""
    return data_path / f"{split}_index.tsv"


def read_index(data_path: Path, split: str, source: Source) -> Listing | None:
    """Return the kept list, or `None` if there is none, or it is damaged, or the data changed since."""
    listing = read_rows(index_file(data_path, split), _MAGIC, _parse)
    if listing is None:
        return None
    kept = listing.source
    if (kept.num_classes, kept.samples_file) != (source.num_classes, source.samples_file):
        return None
    return listing if _unchanged(data_path, kept.directories) else None


def write_index(data_path: Path, split: str, listing: Listing) -> None:
    """Keep the list for the next run, whole or not at all; a folder that cannot be written to is no error."""
    source = listing.source
    values = {
        "num_classes": source.num_classes,
        "samples_file": source.samples_file,
        "directories": source.directories,
    }
    rows = zip(listing.labels, listing.paths, strict=True)
    write_rows(index_file(data_path, split), _MAGIC, values, rows)


def _parse(values: Mapping[str, Any], rows: Iterator[list[str]]) -> Listing:
    samples = values["samples_file"]
    source = Source(values["num_classes"], None if samples is None else tuple(samples), dict(values["directories"]))
    labels: list[int] = []
    paths: list[str] = []
    for label, path in rows:
        labels.append(int(label))
        paths.append(path)
    return Listing(tuple(paths), tuple(labels), source)


def _unchanged(data_path: Path, directories: dict[str, int]) -> bool:
    try:
        return all((data_path / name).stat().st_mtime_ns == time for name, time in directories.items())
    except (OSError, ValueError):  # gone, or no possible path
        return False
