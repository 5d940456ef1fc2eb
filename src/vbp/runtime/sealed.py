"""Files of torch.save that hold plain data, with a digest as their end; nothing in them is run when they are read."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from vbp.runtime.files import open_regular

# What torch raises on damaged and foreign files.
READING_ERRORS = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError, LookupError),
    *(MemoryError, AssertionError, AttributeError, TypeError, OverflowError, struct.error),
)

# The end of a file is a digest of all before it, kept as the comment of the zip archive that torch.save makes:
# torch.load reads the archive as ever, but looks at no check sum itself and takes flipped bits for weights.
_SEAL = re.compile(rb"([a-z-]{1,40}/\d{1,9}) sha256:([0-9a-f]{64})\Z")
_LONGEST_SEAL = 128
_PIECE = 2**20
_ZIP = b"PK\x03\x04"

# How often, on average, the elements of a file may be there: in tied weights, and in expanded ones.
_MOST_VIEWS = 16


def write_sealed(file: IO[bytes], content: dict[str, Any], format_name: str) -> None:
    """Write a file that torch.load reads, with a digest of all that stands before it as its end.

    Raises:
        TypeError: The content is more than tensors, numbers, text and lists or dictionaries of them.
    """
    torch.save(content, file)
    # The archive's last field is the length of its comment.
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", len(f"{format_name} sha256:") + 64))
    digest = _digest(file, file.tell())
    file.write(f"{format_name} sha256:{digest}".encode())
    file.flush()
    try:
        # Mapped, so that no tensor is read: this asks only whether all types are plain.
        torch.load(file.name, mmap=True, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(
            f"a {format_name} file must hold tensors, numbers, text, lists and dictionaries alone, got more: {error}"
        ) from error


def seal_fault(path: Path, format_name: str) -> str | None:
    """Return what is wrong with a file, without loading it; None if it is whole and of this format."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LONGEST_SEAL))
            seal = _SEAL.search(file.read())
            if seal is None:
                return "it was cut off, or is another kind of file; copy it again or give another"
            written = seal[1].decode()
            if written != format_name:
                return f"it has format {written}, allowed is {format_name}; use the vbp version that wrote it"
            if _digest(file, size - len(seal[0])) != seal[2].decode():
                return "it is damaged (its content does not match its digest); copy it again or give another"
    except OSError as error:
        return f"it cannot be read ({error}); see to the disk"
    return None


def load_plain(path: Path) -> Any:
    """Read a file of torch.save onto the CPU: tensors and plain data alone, which run nothing.

    Raises one of `READING_ERRORS`, too if it would take far more memory than the file has bytes.
    """
    check_plain(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    size, most = 0, _MOST_VIEWS * path.stat().st_size + _PIECE
    for tensor in _tensors(content):
        # Tied and expanded tensors count as often as they are there.
        size += tensor.numel() * tensor.element_size()
        if size > most:
            raise ValueError(f"its tensors have more than {most} bytes, out of proportion to the file")
    return content


def check_plain(path: Path) -> None:
    """Raise ValueError or BadZipFile for a file that torch.load reads and torch.save never writes.

    That are archives that unpack to more than their size, since torch.save compresses nothing; archives of another
    kind; and the one function without tensors that weights-only loading calls with a size from the file.
    """
    size = path.stat().st_size
    with open_regular(path) as file:
        start = file.read(tarfile.BLOCKSIZE)
        with contextlib.suppress(tarfile.HeaderError):
            tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
            raise ValueError("it is a tar archive")
        if start.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError(f"its archive unpacks to {unpacked} bytes, and the file has {size}")
        elif not start.startswith(pickle.PROTO):
            raise ValueError("it does not begin as torch.save does")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"\nbytearray\n") >= 0:
                raise ValueError("it makes a list of bytes")


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested plain data, which may hold itself."""
    seen: set[int] = set()
    rest = [content]
    while rest:
        value = rest.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            rest += value.values() if isinstance(value, dict) else value


def _digest(file: IO[bytes], size: int) -> str:
    """Return the SHA-256 of the first bytes of a file, which stands behind them afterwards."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (piece := file.read(min(size, _PIECE))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()
