"""Keeps `<class>` in docstrings: help texts are written for the terminal, where Markdown's HTML is no matter."""

from __future__ import annotations

import re
from typing import Any

import griffe

# Code in backticks is left alone; there Markdown escapes by itself.
_CODE_OR_TAG = re.compile(r"(`[^`]*`)|<(?=\w)")


class PlainDocstrings(griffe.Extension):
    """Escapes what would be read as a tag."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the text of one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _CODE_OR_TAG.sub(lambda found: found[1] or "&lt;", obj.docstring.value)
