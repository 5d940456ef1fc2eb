"""The grammar of `data_path`: a folder, `hfds/...` or `wds/...`, with options after a question mark."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vbp.errors import InputError

# The package that each kind needs; a folder needs none.
_PACKAGES = {"hfds": "datasets", "wds": "webdataset"}
_OPTIONS = ("train", "val", "image", "label")


@dataclass(frozen=True)
class DataPath:
    """A data path, taken apart.

    Attributes:
        kind: how the images are kept.
        place: the folder, dataset id or pattern.
        options: what stands after the question mark.
    """

    kind: Literal["folder", "hfds", "wds"]
    place: str
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, data_path: Path | str) -> DataPath:
        """Take a data path apart; a `Path` is always a folder.

        Raises:
            InputError: it does not follow the grammar, or needs a package that is not installed.
        """
        kind, slash, rest = str(data_path).partition("/")
        if isinstance(data_path, Path) or not slash or kind not in _PACKAGES:
            return cls("folder", _local(str(data_path)))
        place, _, query = rest.partition("?")
        if not place:
            raise InputError(f"data_path must say what to read after {kind}/, got {data_path!r}")
        if importlib.util.find_spec(_PACKAGES[kind]) is None:
            raise InputError(
                f"data_path {data_path} needs the package {_PACKAGES[kind]}, which is not installed; "
                "pip install 'vbp-pruning[data]'"
            )
        return cls("hfds" if kind == "hfds" else "wds", _local(place), _options(query, str(data_path)))


def _options(query: str, data_path: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in query.split("&") if query else []:
        name, _, value = part.partition("=")
        if name not in _OPTIONS or not value or name in options:
            raise InputError(
                f"the options of data_path must be {', '.join(f'{option}=...' for option in _OPTIONS)}, each once at "
                f"most and joined by &, got {part!r} in {data_path}"
            )
        options[name] = value
    return options


def _local(place: str) -> str:
    if "://" in place or place.startswith("pipe:"):
        raise InputError(f"the data must lie in local files, got {place}; copy it to a local disk first")
    return place
