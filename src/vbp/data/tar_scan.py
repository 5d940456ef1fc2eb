"""List the samples of a tar shard in one pass over its headers, or say what is wrong with it."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vbp.data.formats import IMAGE_EXTENSIONS
from vbp.errors import InputError, one_line
from vbp.runtime.decode import parse_json
from vbp.runtime.files import open_regular

_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own notes, which are no samples
_NUMBER = re.compile(rb"\s*-?[0-9]{1,18}\s*")

# Bytes of an encoded image, of a label, and of one header with long names and further fields of a file; and how many
# of these fields a file may have.
LARGEST_IMAGE, LARGEST_LABEL = 2**30, 2**20
_LARGEST_HEADER, _MOST_FIELDS = 2**15, 64


@dataclass(frozen=True)
class SampleFormat:
    """Extensions of the image, any one of which will do, and of the label.

    `field` names the label in a JSON file; without it the file is the number as text.
    """

    image: tuple[str, ...]
    label: str
    field: str | None

    @classmethod
    def of(cls, image: str | None, label: str | None) -> SampleFormat:
        """Read the options `image=jpg,png` and `label=cls` or `label=json:label`."""
        extensions = image.split(",") if image else [extension.removeprefix(".") for extension in IMAGE_EXTENSIONS]
        name, _, field = (label or "cls").partition(":")
        return cls(tuple(extension.lower() for extension in extensions), name.lower(), field or None)


class Place(NamedTuple):
    """A sample: where its image lies in the shard, in bytes, and which label it has."""

    key: str
    offset: int
    size: int
    label: int


def scan_shard(shard: Path, form: SampleFormat) -> Iterator[Place]:
    """Return the samples of a shard in their order; it must be whole, and each sample complete and there once."""
    try:
        with open_regular(shard) as stream, tarfile.open(fileobj=_ShortReads(stream), mode="r:") as tar:
            # All headers first: what a torn shard lacks must not be blamed on a sample.
            members = [_checked(member) for member in tar]
            _check_end(tar, shard)
            for key, files in _grouped(members, shard):
                yield _place(stream, shard, key, files, form)
    except InputError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        raise InputError(
            f"the shard {shard} must be a whole, uncompressed tar file, got: {one_line(error)}; make it anew"
        ) from error


class _ShortReads(io.RawIOBase):
    """A file of which little is read at once: tarfile takes a header for as long as it says that it is."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header has {size} bytes, allowed are {_LARGEST_HEADER}")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def _checked(member: tarfile.TarInfo) -> tarfile.TarInfo:
    # Fields of the whole shard are copied to each of its files.
    if len(member.pax_headers) > _MOST_FIELDS:
        raise tarfile.ReadError(
            f"{member.name[:80]} has {len(member.pax_headers)} fields in its header, allowed are {_MOST_FIELDS}"
        )
    return member


def _grouped(members: list[tarfile.TarInfo], shard: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    # The format's own rule: the key is the path up to the first dot of the file name, the rest is the extension.
    from webdataset.tariterators import base_plus_ext

    wanted = [member for member in members if member.isreg() and not _META.match(member.name)]
    named = [(*base_plus_ext(member.name), member) for member in wanted]
    seen: set[str] = set()
    for key, group in groupby((each for each in named if each[0] is not None), key=itemgetter(0)):
        if key in seen:
            raise InputError(
                f"each key must be once in a shard, with its files side by side, got {key} again in {shard}"
            )
        seen.add(key)
        files: dict[str, tarfile.TarInfo] = {}
        for _, extension, member in group:
            if extension.lower() in files:
                raise InputError(f"each file of a sample must be there once, got {member.name} twice in {shard}")
            files[extension.lower()] = member
        yield key, files


def _place(
    shard_file: BinaryIO, shard: Path, key: str, files: dict[str, tarfile.TarInfo], form: SampleFormat
) -> Place:
    images = [extension for extension in form.image if extension in files]
    if len(images) != 1 or form.label not in files:
        wanted = f"one image ({', '.join(form.image)}) and a label ({form.label})"
        raise InputError(
            f"each sample must have {wanted}, got {', '.join(sorted(files))} for {key} in {shard}; "
            "name the extensions with ?image=...&label=..."
        )
    image, label = files[images[0]], files[form.label]
    for file, most in ((image, LARGEST_IMAGE), (label, LARGEST_LABEL)):
        if file.issparse():
            raise InputError(f"images must be stored whole, got the sparse file {file.name} in {shard}; make it anew")
        if file.size > most:
            raise InputError(f"{file.name} in {shard} may have {most} bytes, got {file.size}; make it anew")
    shard_file.seek(label.offset_data)
    text = shard_file.read(label.size)
    return Place(key, image.offset_data, image.size, _label(text, form, f"{key} in {shard}"))


def _label(text: bytes, form: SampleFormat, name: str) -> int:
    if form.field is None:
        if not _NUMBER.fullmatch(text):
            raise InputError(f"the label of {name} must be a whole number as text, got {text[:40]!r}; use ?label=")
        return int(text)
    try:
        value: Any = parse_json(text)
    except ValueError as error:
        raise InputError(f"the {form.label} of {name} must be JSON, got {error}") from error
    label = value.get(form.field) if isinstance(value, dict) else None
    if not isinstance(label, int) or isinstance(label, bool) or label.bit_length() > 63:
        raise InputError(
            f"the field {form.field} in the {form.label} of {name} must be a whole number, got {str(label)[:40]!r}"
        )
    return label


def _check_end(tar: tarfile.TarFile, shard: Path) -> None:
    """Refuse what `tarfile` takes for the end: a torn or damaged header, or a second archive behind the first."""
    with open_regular(shard) as stream:
        stream.seek(tar.offset)
        block = stream.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
            raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")
        while block := stream.read(2**20):
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"more data behind its end at byte {tar.offset}")
