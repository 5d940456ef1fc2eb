"""The mathematics stands alone: `vbp.method` imports torch and the errors, and no other part of the package."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vbp.method

# jaxtyping writes shapes into annotations; allocation and the draws of images' random numbers are on NumPy arrays.
ALLOWED = {"torch", "jaxtyping", "numpy", "vbp.errors", "vbp.method"}
FILES = sorted(Path(vbp.method.__path__[0]).glob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Return the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_method_imports_torch_and_the_errors_alone(path: Path) -> None:
    for name in imported(path):
        parts = name.split(".")
        roots = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
        assert parts[0] in sys.stdlib_module_names or roots & ALLOWED, name
