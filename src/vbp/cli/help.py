"""Write the help of a command: its call, its flags in groups, what each expects, its defaults. It needs no torch."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence, Set
from typing import Any, Final, Literal

import tyro

from vbp.cli.flags import ARGUMENTS, GROUPS

# Column in which the texts begin.
_TEXT: Final = 30
_POSITIONAL: Final = typing.get_args(tyro.conf.Positional[str])[1]
_CONFIG: Final = (
    "Read settings from a YAML file, or from the config.json of an earlier run; what is typed beside it counts."
)


def command_help(kind: type, prog: str, own: Mapping[str, Any], values: Mapping[str, Any], *, file: bool) -> str:
    """Return the help of a command.

    Args:
        kind: The class of its flags.
        prog: How it is called: `vbp run`, or the path of a script.
        own: Defaults of this command in the place of those of the class.
        values: Those, and what a file of settings says.
        file: Whether `--config FILE` is a flag of it.
    """
    width = min(120, max(64, shutil.get_terminal_size((100, 24)).columns))
    fields = {field.name: values.get(field.name, _default(field)) for field in dataclasses.fields(kind)}
    marked, hints = typing.get_type_hints(kind, include_extras=True), typing.get_type_hints(kind)
    words = [name for name in fields if _POSITIONAL in getattr(marked[name], "__metadata__", ())]
    lines = _heading(kind, prog, own, [*(ARGUMENTS[name] for name in words), *_required(fields, hints, words)], width)
    groups = {"arguments": words, **_groups(fields.keys() - set(words))}
    for group, names in groups.items():
        lines += ["", f"{group}:"] if names else []
        for name in names:
            flag = ARGUMENTS[name] if name in words else _flag(name, hints[name], fields[name])
            lines += _entry(flag, _text(kind, name, fields[name]), width)
    lines += ["", "settings and help:", *(_entry("--config FILE", _CONFIG, width) if file else ())]
    return "\n".join([*lines, *_entry("-h, --help", "Show this text.", width)])


def _heading(kind: type, prog: str, own: Mapping[str, Any], needed: list[str], width: int) -> list[str]:
    """Return how a command is called, what it does, and its example."""
    ways = [prog]
    if prog.endswith(".py"):
        ways = [f"torchrun --nproc_per_node=N {prog}", f"python {prog} --disable_ddp"]
    call = " ".join([*needed, "[flags]"])
    about, _, example = inspect.cleandoc(kind.__doc__ or "").partition("Example:")
    lines = ["usage: " + "\n       ".join(f"{way} {call}" for way in ways), "", *textwrap.wrap(about, width)]
    if own:
        differing = ", ".join(f"{name} {_shown(value)}" for name, value in own.items())
        lines += textwrap.wrap(f"Other defaults than those of vbp run, as in the paper: {differing}.", width)
    if example:
        lines += ["", "Example: " + " ".join(example.split()).replace("vbp run", ways[-1])]
    return lines


def _required(fields: Mapping[str, Any], hints: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """Return the flags without which a command does not run, as they are typed."""
    return [
        _flag(name, hints[name], value)
        for name, value in fields.items()
        if value is dataclasses.MISSING and name not in words
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _groups(names: Set[str]) -> dict[str, list[str]]:
    """Return the flags of a command by group, those of no group last."""
    grouped = {group: [name for name in flags if name in names] for group, flags in GROUPS.items()}
    rest = names - {name for flags in grouped.values() for name in flags}
    return {**grouped, "other": sorted(rest)}


def _flag(name: str, hint: Any, default: Any) -> str:
    """Return a flag as it is typed: with its choices, or with what is expected."""
    if isinstance(default, bool):
        return f"--no_{name}" if default else f"--{name}"
    expected = next((flags[name] for flags in GROUPS.values() if name in flags), name.upper())
    words = [expected] if expected else list(map(str, typing.get_args(hint)))
    for kind in typing.get_args(hint):  # as auto beside a number
        words += typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return f"--{name} " + "|".join(words)


def _text(kind: type, name: str, default: Any) -> str:
    """Return what a flag does, and its default where that says something."""
    text = field_text(kind, name)
    if default is True:
        return f"Turn off what is on by default: {text[:1].lower()}{text[1:]}"
    if default is dataclasses.MISSING:
        return f"{text} (required)"
    shown = _shown(default)
    return f"{text} (default: {shown})" if shown else text


def _shown(value: Any) -> str:
    """Return a default as it is typed; nothing for a flag that is off unless given."""
    if value is None or value is False:
        return ""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return json.dumps(value) if value else ""
    return str(value)


def field_text(kind: type, name: str) -> str:
    """Return the documentation of a setting: the string after its field, in the class that says it last."""
    for owner in kind.__mro__:
        if name in vars(owner).get("__annotations__", {}):
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
            assert isinstance(body, ast.ClassDef)
            for field, after in zip(body.body, body.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and field.target.id == name
                    and isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                ):
                    return " ".join(str(after.value.value).split())
    return ""


def _entry(flag: str, text: str, width: int) -> list[str]:
    """Return a flag and its text in two columns; a long flag has a line of its own."""
    wrapped = textwrap.wrap(text, width - _TEXT, break_long_words=False, break_on_hyphens=False) or [""]
    first = f"  {flag}".ljust(_TEXT)
    rest = [" " * _TEXT + line for line in wrapped]
    return [f"  {flag}", *rest] if len(first) > _TEXT or len(flag) > _TEXT - 4 else [first + wrapped[0], *rest[1:]]
