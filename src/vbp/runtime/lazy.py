"""Import the names of a package when they are first used (PEP 562)."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package, and with them its `__all__`.

    Its names are those that it imports as themselves, `from room.module import name as name`, under
    `if TYPE_CHECKING:`. Type checkers and editors read these lines, and so does this: there is one list of names.
    """

    @functools.cache
    def origins() -> dict[str, str]:
        lines = re.findall(r"^    from (\S+) import (\w+) as \2$", Path(file).read_text(encoding="utf-8"), re.M)
        return {name: module for module, name in lines}

    def getattr_(name: str) -> Any:
        if name == "__all__":
            return sorted(origins())
        if name not in origins():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(origins()[name]), name)
        setattr(importlib.import_module(package), name, value)
        return value

    def dir_() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), "__all__", *origins()})

    return getattr_, dir_
