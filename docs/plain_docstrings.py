"""Make docstrings readable as Markdown.

Help texts are written for the terminal, where `<class>` is no tag. And griffe knows a section `Examples:`, which it
shows as code, but not `Example:`.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# Code in backticks and in examples is left alone; there Markdown escapes by itself.
_CODE_OR_TAG = re.compile(r"(`[^`]*`|^ *>>>.*$)|<(?=\w)", re.MULTILINE)


class PlainDocstrings(griffe.Extension):
    """Escapes what would be read as a tag, and names sections of examples as griffe does."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the text of one docstring."""
        if obj.docstring is not None:
            text = _CODE_OR_TAG.sub(lambda found: found[1] or "&lt;", obj.docstring.value)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
