"""Read the flags of a command: typed ones, on top of those of a file, on top of the defaults; its help in groups."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from vbp.errors import InputError, one_line
from vbp.runtime.decode import from_json
from vbp.runtime.files import check_path, open_regular

T = TypeVar("T")

# One of them takes the place of another.
_BUDGETS: Final = ("keep_ratio", "target_macs", "target_params", "target_latency_ms", "target_speedup")
_FLAG: Final = "--config"
# Names of models, which may be paths.
_NAMES: Final = ("model", "artifact", "dense", "teacher")
_FLOAT: Final = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


def parse(kind: type[T], arguments: Sequence[str], prog: str, defaults: Mapping[str, Any] | None = None) -> T:
    """Read a configuration from command-line arguments; usage errors exit with code 2, and --help with 0.

    `defaults` hold where nothing is typed and `--config FILE` says nothing, in the place of those of the kind.

    Raises:
        InputError: The file cannot be read, or holds what is no setting of the kind.
    """
    import tyro

    from vbp.cli.help import command_help

    words, values, file = list(arguments), dict(defaults or {}), None
    if takes_file(kind):
        words, file = _without_file(words)
        if file is not None:
            typed = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
            values |= read_settings(kind, file, replaced=_BUDGETS if typed & {*_BUDGETS} else ())
    if {"-h", "--help"} & {*words}:
        sys.stdout.write(command_help(kind, prog, defaults or {}, values, file=takes_file(kind)) + "\n")
        raise SystemExit(0)
    given: dict[str, Any] = {}
    if values:
        # What has no default stays required.
        required = {
            field.name: tyro.MISSING
            for field in dataclasses.fields(kind)  # type: ignore[arg-type]
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        given["default"] = kind(**{**required, **values})
    # A switch that a file turns on can be turned off, and one that is on may be typed all the same.
    switches = () if file is not None else (tyro.conf.FlagCreatePairsOff,)
    config: T = tyro.cli(kind, prog=prog, args=words, use_underscores=True, config=switches, **given)
    _check_paths(config)
    return config


def _check_paths(config: Any) -> None:
    """Raise InputError for a path that no file system takes."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) or field.name in _NAMES:
                check_path(path, field.name)


def takes_file(kind: type) -> bool:
    """Return whether the flags of a command may come from a file: those of the long jobs."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {"data_path", "save_dir"} <= names


def read_settings(kind: type, file: Path, *, replaced: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings in a file, checked, without those that are replaced.

    Raises:
        InputError: It cannot be read, or holds an unknown name or a value of another type.
    """
    import yaml

    # In which 1e-4 is a number, and which leaves the library as it is.
    reader: Any = type("Reader", (yaml.SafeLoader,), {})
    reader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    try:
        with open_regular(file) as stream:
            content = yaml.load(stream, reader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{_FLAG} must be a YAML or JSON file of settings, got {file}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{_FLAG} must hold settings by name, got {type(content).__name__} in {file}")
    allowed = [field.name for field in dataclasses.fields(kind)]
    if unknown := [str(name) for name in content if name not in allowed]:
        raise InputError(f"{file} must hold settings of this command, got unknown {', '.join(unknown)}")
    missing = {
        field.name: ""
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    checked: Any = from_json(kind, {**missing, **content}, f"the settings in {file}", "correct it", use_defaults=True,
                        wrong="are wrong: they")  # fmt: skip
    return {name: getattr(checked, name) for name in content if name not in replaced}


def _without_file(words: list[str]) -> tuple[list[str], Path | None]:
    """Return the arguments without `--config FILE`, and the file."""
    rest, file = list[str](), None
    place = iter(words)
    for word in place:
        flag, equals, value = word.partition("=")
        if flag != _FLAG:
            rest.append(word)
            continue
        text = value if equals else next(place, "")
        if not text:
            raise InputError(f"{_FLAG} needs a file, got none; write {_FLAG} run.yaml")
        file = Path(text)
    return rest, file
