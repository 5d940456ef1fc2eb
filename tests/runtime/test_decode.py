"""What a dataclass was is what is read; whatever does not fit its declared types is one clear error."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from memory import at_most

from vbp import InputError
from vbp.runtime.decode import from_json, read_json, read_json_lines, to_json


@dataclass(frozen=True)
class Inner:
    """One entry."""

    name: str
    share: float | None = None


@dataclass(frozen=True)
class Outer:
    """One of every kind of field."""

    entries: tuple[Inner, ...]
    size: tuple[int, int]
    mode: Literal["a", "b"]
    widths: Mapping[str, tuple[int, float]]
    folder: Path | None
    exact: bool
    either: int | str
    free: Any = None


@dataclass(frozen=True)
class Numbers:
    """A count and a fraction."""

    count: int
    share: float


OUTER = Outer((Inner("x", 1.5), Inner("y")), (3, 4), "b", {"fc": (1, 0.5)}, Path("a/b"), True, "text", {"k": [1]})


def test_what_was_written_is_read() -> None:
    assert from_json(Outer, json.loads(json.dumps(to_json(OUTER))), "it") == OUTER
    # A whole number stands for a fraction too, and stays what it is: JSON text comes back unchanged.
    inner = from_json(Inner, {"name": "x", "share": 1}, "it")
    assert json.dumps(to_json(inner)) == '{"name": "x", "share": 1}'


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"entries": [{"name": 3, "share": None}]}, r"it must hold a entries\[0\]\.name, which must be text, got 3"),
        ({"entries": 3}, "entries, which must be a list, got 3"),
        ({"entries": ["x"]}, r"entries\[0\], which must be an object"),
        ({"entries": [{"name": "x"}]}, r"must hold name and share, got name \(missing: share; unknown: none\)"),
        ({"entries": [{"name": "x", "share": float("nan")}]}, r"share, which must be a finite number, got nan"),
        ({"size": [1, 2, 3]}, "size, which must be a list of 2 entries"),
        ({"size": [1, True]}, r"size\[1\], which must be a whole number, got True"),
        ({"size": [1, 2.0]}, r"size\[1\], which must be a whole number, got 2.0"),
        ({"mode": "c"}, "mode, which must be one of a, b, got 'c'"),
        ({"mode": ["a"]}, "mode, which must be one of a, b"),
        ({"widths": {"fc": [1, "x"]}}, r"widths\['fc'\]\[1\], which must be a finite number"),
        ({"widths": {1: [1, 1.0]}}, "widths, which must be an object"),
        ({"folder": 3}, "folder, which must be text, got 3"),
        ({"exact": 1}, "exact, which must be true or false, got 1"),
        ({"either": None}, "either, which must be a whole number, got None or must be text, got None"),
        ({"extra": 1}, "missing: none; unknown: extra"),
        ({3: 1}, "missing: none; unknown: 3"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(changed: dict[Any, Any], text: str) -> None:
    with pytest.raises(InputError, match=rf"^the thing is damaged: .*{text}.*; do so$"):
        from_json(Outer, to_json(OUTER) | changed, "the thing", "do so")


@pytest.mark.parametrize("value", [None, 3, "text", [], ["entries"]])
def test_only_an_object_is_a_dataclass(value: Any) -> None:
    with pytest.raises(InputError, match="it is damaged: it must be an object, got"):
        from_json(Outer, value, "it")


@pytest.mark.parametrize(("kind", "value"), [("count", 10**400), ("count", 2**63), ("share", 10**400)])
def test_a_number_of_many_digits_is_none(kind: str, value: int) -> None:
    """Kin to reports of sizes that no float can hold, which ended in an OverflowError much later."""
    with pytest.raises(InputError, match=f"{kind}, which must be"):
        from_json(Numbers, {"count": 1, "share": 0.5, kind: value}, "it")


def test_json_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(ValueError, match="it has 17179869184 bytes, allowed are"):
        read_json(path)
    with at_most(400), pytest.raises(ValueError, match=r"Expecting value|it has .* bytes"):
        list(read_json_lines(path))
    path.unlink()
    os.mkfifo(path)
    for read in (read_json, lambda path: list(read_json_lines(path))):
        with pytest.raises(OSError, match=r"no such file|it is a pipe"):
            read(path)


def test_lines_come_in_pieces_of_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [[number, "x" * 100] for number in range(60_000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n  \n[1]")
    pieces = [*read_json_lines(path)]
    assert len(pieces) > 1
    assert b"".join(piece for piece, _ in pieces) == path.read_bytes()
    assert [row for _, own in pieces for row in own] == [*rows, [1]]


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(InputError) as caught:
        from_json(Inner, {"name": list(range(10**4)), "share": "x" * 10**4}, "it")
    assert len(str(caught.value)) < 200


def test_defaults_stand_in_only_where_they_may() -> None:
    with pytest.raises(InputError, match="missing: share"):
        from_json(Inner, {"name": "x"}, "it")
    assert from_json(Inner, {"name": "x"}, "it", use_defaults=True) == Inner("x")
    with pytest.raises(InputError, match="missing: name"):
        from_json(Inner, {}, "it", use_defaults=True)
