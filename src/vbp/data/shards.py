"""List the images in WebDataset tar shards; each is then read alone, so that any process can take any of them."""

from __future__ import annotations

import dataclasses
import glob
import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vbp.data.images import SPLITS
from vbp.data.labels import check_labels
from vbp.data.listing_cache import Row, read_rows, write_rows
from vbp.data.tar_scan import LARGEST_IMAGE, SampleFormat, scan_shard
from vbp.errors import InputError
from vbp.runtime.files import is_regular, open_regular
from vbp.runtime.fingerprints import text_fingerprint

_log = logging.getLogger(__name__)
_MARK = "{split}"
_MOST_SHARDS = 10**6
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})")


def find_shards(place: str, options: Mapping[str, str], split: str) -> tuple[Path, tuple[str, ...]]:
    """Return a folder and the names in it of a split's shards, in order; each must exist, and be there once.

    `place` is a folder of shards or a pattern with `{split}`; options hold the split's name or a pattern inside it.
    """
    root, names = _candidates(place, options, split)
    if not names:
        raise InputError(
            f"wds/{place} must hold shards of {split}, found none in {root} for {_sought(place, options, split)}; "
            f"name them with ?{split}="
        )
    missing = [name for name in names if not is_regular(root / name)]
    if missing:
        raise InputError(
            f"the shards of {split} must exist, {len(missing)} of {len(names)} do not, "
            f"the first is {root / missing[0]}"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"each shard of {split} must be named once, got {twice} twice in wds/{place}")
    [other] = (each for each in SPLITS if each != split)
    shared = sorted(set(names) & set(_candidates(place, options, other)[1]))
    if shared:
        raise InputError(
            f"train and val must have no shard in common, got {shared[0]} in both; name them with ?train=...&val=..."
        )
    return root, names


def _candidates(place: str, options: Mapping[str, str], split: str) -> tuple[Path, tuple[str, ...]]:
    sought = _sought(place, options, split)
    if place.endswith(".tar"):
        if _MARK not in place:
            raise InputError(
                f"a pattern of shards must hold {_MARK}, got wds/{place}; write it where the split's name is"
            )
        # The folder is what stands before the first part that differs between shards.
        fixed = os.path.dirname(place[: min(place.find(mark) for mark in "{*" if mark in place)])  # noqa: PTH120
        root = Path(fixed or ".")
        return root, _expand(root, sought.removeprefix(f"{fixed}/") if fixed else sought)
    root = Path(place)
    if not root.is_dir():
        fault = "is no folder" if root.exists() else "does not exist"
        raise InputError(
            f"wds/ must be followed by a folder of shards or a pattern that ends in .tar, {place} {fault}"
        )
    return root, _expand(root, sought)


def _sought(place: str, options: Mapping[str, str], split: str) -> str:
    name = options.get(split, split)
    if not place.endswith(".tar"):
        return name if name.endswith(".tar") else f"*{name}*.tar"
    if name.endswith(".tar"):
        raise InputError(
            f"{split}= must be the split's name in the pattern wds/{place}, got {name}; "
            "give the folder before the question mark to name shards after it"
        )
    return place.replace(_MARK, name)


def _expand(root: Path, pattern: str) -> tuple[str, ...]:
    from webdataset.shardlists import expand_urls

    if (count := _alternatives(pattern)) > _MOST_SHARDS:
        raise InputError(f"a shard pattern may stand for {_MOST_SHARDS} names, got {count} of {pattern[:80]}")
    try:
        names = expand_urls(pattern)
    except (ValueError, AssertionError) as error:
        raise InputError(f"the braces of a shard pattern must read {{0000..0009}} or {{a,b}}, got {error}") from error
    shards: list[str] = []
    for name in names:
        # Unlike pathlib's star this one finds no hidden files, such as a half copied shard.
        shards += sorted(glob.glob(name, root_dir=root)) if "*" in name else [name]  # noqa: PTH207
    return tuple(shards)


def _alternatives(pattern: str) -> int:
    """Return how many names a pattern with braces stands for, without making them."""
    # Of each open brace: the names of the alternatives before the last comma, those of the last, and where it began.
    levels = [(0, 1, 0)]
    for place, sign in enumerate(pattern):
        total, last, start = levels[-1]
        if sign == "{":
            levels.append((0, 1, place + 1))
        elif sign == "," and len(levels) > 1:
            levels[-1] = (total + last, 1, start)
        elif sign == "}" and len(levels) > 1:
            levels.pop()
            numbers = _RANGE.match(pattern[start:place])
            inside = abs(int(numbers[1]) - int(numbers[2])) + 1 if numbers else total + last
            total, last, start = levels[-1]
            levels[-1] = (total, last * inside, start)
    return sum(last for _, last, _ in levels) + sum(total for total, _, _ in levels)


_FORMAT = "vbp-shard-index/2"


@dataclass(frozen=True, eq=False)
class ShardImages:
    """Samples of tar shards, in the order of the shards.

    `places` holds for each sample the number of its shard, and the image's offset and size in it, in bytes.
    """

    root: Path
    shards: tuple[str, ...]
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    places: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, index: int) -> str:
        """Return the sample's key and its shard."""
        return f"{self.keys[index]} in {self._shard(index)}"

    def read(self, index: int) -> BinaryIO:
        """Return the image's bytes; an OSError says that the shard has gone or has become shorter."""
        _, offset, size = self.places[index].tolist()
        # Opened for each image, as a folder's files are: nothing is shared with other processes, nothing stays open.
        with open_regular(self._shard(index)) as stream:
            stream.seek(offset)
            content = stream.read(size)
        if len(content) < size:
            raise OSError("the shard ends before the image does")
        return io.BytesIO(content)

    def select(self, indices: Sequence[int]) -> ShardImages:
        """Return the samples at these places, in this order."""
        return dataclasses.replace(
            self,
            keys=tuple(self.keys[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            places=self.places[np.asarray(indices, dtype=np.int64)],
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 over label, shard, key and size of each image, in order."""
        samples = zip(self.keys, self.labels, self.places.tolist(), strict=True)
        return text_fingerprint(
            f"{label}\0{self.shards[shard]}\0{key}\0{size}\0" for key, label, (shard, _, size) in samples
        )

    def _shard(self, index: int) -> Path:
        return self.root / self.shards[int(self.places[index, 0])]


def list_samples(place: str, options: Mapping[str, str], split: str, num_classes: int) -> ShardImages:
    """List the samples of a split's shards.

    The list is kept beside the shards in `<split>_shards.jsonl`, and made anew when one of them changes. Options
    hold names of the splits, of the image's extension and of the label's.
    """
    root, shards = find_shards(place, options, split)
    form = SampleFormat.of(options.get("image"), options.get("label"))
    # Taken before the shards are read: a change in between makes the kept list stale, never wrong.
    states = [(root / name).stat() for name in shards]
    made_from = {
        "shards": [[name, state.st_size, state.st_mtime_ns] for name, state in zip(shards, states, strict=True)],
        "format": repr(form),
    }
    file = root / f"{split}_shards.jsonl"
    kept = read_rows(file, _FORMAT, partial(_is_row, len(shards)), lambda kept: kept == made_from)
    rows = [] if kept is None else kept[1]
    if kept is None:
        _log.info("listing the samples of %d shards in %s", len(shards), root)
        rows = [(number, *place) for number, shard in enumerate(shards) for place in scan_shard(root / shard, form)]
        write_rows(file, _FORMAT, made_from, rows)
    places = np.array([(number, offset, size) for number, _, offset, size, _ in rows], dtype=np.int64).reshape(-1, 3)
    keys, labels = tuple(row[1] for row in rows), tuple(row[4] for row in rows)
    images = ShardImages(root, shards, keys, labels, places)
    if len(images) == 0:
        raise InputError(f"the shards of {split} in {root} must hold samples, got none")
    check_labels(images.labels, num_classes, images.name)
    return images


def _is_row(shards: int, row: Row) -> bool:
    if [*map(type, row)] != [int, str, int, int, int]:
        return False
    shard, _, offset, size, label = row
    lowest, highest = (0, 0, 0, -(2**62)), (shards - 1, 2**62, LARGEST_IMAGE, 2**62)
    values = (shard, offset, size, label)
    return all(low <= value <= high for low, value, high in zip(lowest, values, highest, strict=True))


def check_shards(place: str, options: Mapping[str, str]) -> None:
    """Stop unless the shards of both splits are there; none is read."""
    for split in SPLITS:
        find_shards(place, options, split)
