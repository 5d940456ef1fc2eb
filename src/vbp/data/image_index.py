"""The kept list of a split's images: `<split>_index.tsv` in the data folder.

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
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

_MAGIC = "#vbp-image-index 1 "
_ESCAPE = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_UNESCAPE = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}


@dataclass(frozen=True)
class Source:
    """What a listing depends on.

    Attributes:
        num_classes: the labels of one folder differ with the class count of the model.
        samples_file: size in bytes and modification time in nanoseconds, if there is such a file.
        directories: modification time in nanoseconds of each folder read, by path relative to the data.
    """

    num_classes: int
    samples_file: tuple[int, int] | None
    directories: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, samples_file: Path, num_classes: int) -> Source:
        """The state at this moment, before any folder is read."""
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
    """Where the list of this split is kept."""
    return data_path / f"{split}_index.tsv"


def read_index(data_path: Path, split: str, source: Source) -> Listing | None:
    """The kept list, or `None` if there is none, or it is damaged, or the data changed since."""
    file = index_file(data_path, split)
    if not file.exists():
        return None
    try:
        header, _, body = file.read_bytes().partition(b"\n")
        if not header.startswith(_MAGIC.encode()):
            raise ValueError("its first line is not that of this version")
        values = json.loads(header[len(_MAGIC) :])
        if hashlib.sha256(body).hexdigest() != values["sha256"]:
            raise ValueError("its checksum does not fit")
        samples = values["samples_file"]
        kept = Source(values["num_classes"], None if samples is None else tuple(samples), dict(values["directories"]))
        listing = _parse(body, kept)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s cannot be used (%s); the images are listed anew", file, error)
        return None
    if (kept.num_classes, kept.samples_file) != (source.num_classes, source.samples_file):
        return None
    return listing if _unchanged(data_path, kept.directories) else None


def write_index(data_path: Path, split: str, listing: Listing) -> None:
    """Keep the list for the next run, whole or not at all; a folder that cannot be written to is no error."""
    file = index_file(data_path, split)
    rows = (
        f"{label}\t{path.translate(_ESCAPE)}\n" for path, label in zip(listing.paths, listing.labels, strict=True)
    )
    body = "".join(rows).encode(errors="surrogateescape")
    values = {
        "num_classes": listing.source.num_classes,
        "samples_file": listing.source.samples_file,
        "directories": listing.source.directories,
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    header = f"{_MAGIC}{json.dumps(values)}\n".encode()
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        # The superuser can write anywhere; a folder that its owner marked as read-only is still left alone.
        if not data_path.stat().st_mode & 0o222:
            raise PermissionError("the folder is read-only")
        try:
            temporary.write_bytes(header + body)
            # Replacing is atomic: another run reads the earlier list or this one, never a part.
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        logger.info("%s is not kept (%s); the images are listed on each run", file, error.strerror or error)


def _parse(body: bytes, source: Source) -> Listing:
    labels: list[int] = []
    paths: list[str] = []
    # Only "\n" ends a row: splitlines would also split at the rarer line ends that a file name may hold.
    for row in body.decode(errors="surrogateescape").split("\n")[:-1]:
        label, _, path = row.partition("\t")
        labels.append(int(label))
        paths.append(_unescape(path) if "\\" in path else path)
    return Listing(tuple(paths), tuple(labels), source)


def _unescape(path: str) -> str:
    return re.sub(r"\\(.)", lambda match: _UNESCAPE[match[1]], path)


def _unchanged(data_path: Path, directories: dict[str, int]) -> bool:
    try:
        return all((data_path / name).stat().st_mtime_ns == time for name, time in directories.items())
    except (OSError, ValueError):  # gone, or no possible path
        return False
