"""Turn frozen dataclasses into plain JSON data and back; what is read is checked against the declared types."""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vbp.errors import InputError
from vbp.runtime.files import is_regular, open_regular

T = TypeVar("T")
LARGEST_JSON = 2**25
_PIECE = 2**22
_LARGEST_FLOAT, _LARGEST_INT = sys.float_info.max, 2**63
_LONGEST_TEXT, _LONGEST_LIST = 4096, 800
_PLAIN: Final[Mapping[Any, str]] = {bool: "true or false", int: "a whole number", str: "text", NoneType: "null"}


class _MismatchError(Exception):
    """A value is not what is declared; `place` says which one, as in `sites[0].keep`."""

    def __init__(self, place: str, text: str) -> None:
        super().__init__(text)
        self.place, self.text = place, text


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds; raise ValueError if it is none, too long, or nested too deep to be read."""
    if len(text) > LARGEST_JSON:
        raise ValueError(f"it has {len(text)} bytes, allowed are {LARGEST_JSON}")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; raise OSError or ValueError if it is no file, too large, or no JSON."""
    if not is_regular(path):  # a pipe or a device could be endless
        raise OSError("there is no such file")
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"it has {size} bytes, allowed are {LARGEST_JSON}")
    return parse_json(path.read_bytes().decode())


def read_json_lines(path: Path) -> Iterator[tuple[bytes, list[Any]]]:
    """Yield a file in pieces of whole lines, and what the lines of each hold as JSON; raise as `read_json`.

    The file may be of any size: the pieces have a limit.
    """
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            piece += file.readline(LARGEST_JSON)
            # One call for many lines, which is several times as fast as one for each.
            yield piece, parse_json(b"[" + b",".join(line for line in piece.splitlines() if line.strip()) + b"]")


def to_json(value: Any) -> Any:
    """Return plain JSON data: dataclasses and mappings as objects, tuples as lists, paths as text."""
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    # A version is a kind of text of its own, which safe unpickling refuses.
    return str(value) if isinstance(value, Path | str) else value


def from_json(
    kind: type[T],
    value: Any,
    what: str,
    remedy: str = "make it again",
    *,
    use_defaults: bool = False,
    wrong: str = "is damaged: it",
) -> T:
    """Return the dataclass whose plain JSON data this is.

    Fields may be numbers, text, Literals, Optionals, tuples, mappings from text, paths, other dataclasses, or Any.

    `what`, such as `the plan`, and `wrong` begin the error text, and `remedy` ends it. With `use_defaults` a field
    that has a default may be missing.

    Raises:
        InputError: A name is missing or unknown, or a value is of another type; numbers must be finite.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Crop:
        ...     size: tuple[int, int]
        ...     mode: Literal["center", "border"] = "center"
        >>> from_json(Crop, {"size": [224, 224], "mode": "border"}, "the crop")
        Crop(size=(224, 224), mode='border')
    """
    try:
        decoded: T = _decoded(kind, value, "", use_defaults)
    except _MismatchError as error:
        place = f"must hold a {error.place}, which " if error.place else ""
        raise InputError(f"{what} {wrong} {place}{error.text}; {remedy}") from None
    return decoded


def _decoded(kind: Any, value: Any, place: str, use_defaults: bool) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _dataclass(kind, value, place, use_defaults)
    if origin in (Union, UnionType):
        return _either(arguments, value, place, use_defaults)
    if origin is Literal:
        fits = any(value == allowed and type(value) is type(allowed) for allowed in arguments)
        return _checked(value, fits, place, f"one of {', '.join(map(str, arguments))}")
    if origin in (tuple, Sequence):
        return _list(arguments, value, place, use_defaults)
    if origin in (dict, Mapping):
        fits = isinstance(value, Mapping) and all(isinstance(key, str) and len(key) <= _LONGEST_TEXT for key in value)
        _checked(value, fits, place, "an object")
        return {key: _decoded(arguments[1], item, f"{place}[{key!r}]", use_defaults) for key, item in value.items()}
    if kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_FLOAT
        return _checked(value, fits, place, "a finite number")
    if kind is Path:
        return Path(_decoded(str, value, place, use_defaults))
    _checked(value, type(value) is kind, place, _PLAIN[kind])
    if kind is str:
        return _checked(value, len(value) <= _LONGEST_TEXT, place, f"text of at most {_LONGEST_TEXT} letters")
    return _checked(value, kind is not int or abs(value) < _LARGEST_INT, place, f"below {_LARGEST_INT}")


def _checked(value: Any, fits: bool, place: str, allowed: str) -> Any:
    if not fits:
        raise _MismatchError(place, f"must be {allowed}, got {reprlib.repr(value)}")
    return value


def _either(kinds: Sequence[Any], value: Any, place: str, use_defaults: bool) -> Any:
    if value is None and NoneType in kinds:
        return None
    mismatches = []
    for kind in kinds:
        if kind is not NoneType:
            try:
                return _decoded(kind, value, place, use_defaults)
            except _MismatchError as error:
                mismatches.append(error)
    if len(mismatches) == 1:
        raise mismatches[0]
    raise _MismatchError(place, " or ".join(error.text for error in mismatches))


def _list(kinds: Sequence[Any], value: Any, place: str, use_defaults: bool) -> tuple[Any, ...]:
    _checked(value, isinstance(value, list | tuple), place, "a list")
    if len(kinds) == 1 or kinds[1] is Ellipsis:
        kinds = [kinds[0]] * len(value)
    _checked(value, len(value) == len(kinds), place, f"a list of {len(kinds)} entries")
    return tuple(
        _decoded(kind, item, f"{place}[{index}]", use_defaults)
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _dataclass(kind: Any, value: Any, place: str, use_defaults: bool) -> Any:
    _checked(value, isinstance(value, Mapping), place, "an object")
    hints = _hints(kind)
    optional = {
        field.name
        for field in fields(kind)
        if use_defaults and (field.default is not MISSING or field.default_factory is not MISSING)
    }
    missing, unknown = [name for name in hints if name not in value and name not in optional], value.keys() - hints
    if missing or unknown:
        raise _MismatchError(
            place,
            f"must hold {_listed(hints)}, got {_shortened(_listed(map(str, value)))} (missing: "
            f"{', '.join(missing) or 'none'}; unknown: {_shortened(', '.join(sorted(map(str, unknown))) or 'none')})",
        )
    dot = f"{place}." if place else ""
    return kind(**{name: _decoded(hints[name], item, dot + name, use_defaults) for name, item in value.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _shortened(text: str) -> str:
    return " ".join(text[:_LONGEST_LIST].split()) + ("..." if len(text) > _LONGEST_LIST else "")


def _listed(names: Any) -> str:
    *most, last = [*names] or ["nothing"]
    return f"{', '.join(most)} and {last}" if most else str(last)
