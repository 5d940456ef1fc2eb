"""Which tar shards make up a split."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path

from vbp.data.images import SPLITS
from vbp.errors import InputError

_MARK = "{split}"


def find_shards(place: str, options: Mapping[str, str], split: str) -> tuple[Path, tuple[str, ...]]:
    """Give a folder and the names in it of a split's shards, in order.

    Args:
        place: a folder of shards, or a pattern with `{split}`.
        options: for each split its name, or a pattern inside the folder.
        split: which of the two.

    Raises:
        InputError: there is none, one is missing, or one would be read twice.
    """
    root, names = _candidates(place, options, split)
    if not names:
        raise InputError(
            f"wds/{place} must hold shards of {split}, found none in {root} for {_sought(place, options, split)}; "
            f"name them with ?{split}="
        )
    missing = [name for name in names if not (root / name).is_file()]
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
        found = "is no folder" if root.exists() else "does not exist"
        raise InputError(
            f"wds/ must be followed by a folder of shards or a pattern that ends in .tar, {place} {found}"
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

    try:
        names = expand_urls(pattern)
    except (ValueError, AssertionError) as error:
        raise InputError(f"the braces of a shard pattern must read {{0000..0009}} or {{a,b}}, got {error}") from error
    found: list[str] = []
    for name in names:
        # Unlike pathlib's star this one finds no hidden files, such as a half copied shard.
        found += sorted(glob.glob(name, root_dir=root)) if "*" in name else [name]  # noqa: PTH207
    return tuple(found)
