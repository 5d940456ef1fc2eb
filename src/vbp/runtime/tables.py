"""Write tables as text, for the terminal with aligned columns or in Markdown, and numbers for people."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Final

from vbp.errors import printable

_NUMBER: Final = re.compile(
    r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?( ± [\d.]+)?( ?(%|x|ms|s|min|h|k|M|G))?( \([\d.]+ to [\d.]+\))?|-?inf|nan"
)


def text_table(rows: Iterable[Sequence[str]], align: str = "l", widths: Sequence[int] = ()) -> str:
    """Return rows as lines with aligned columns, two spaces between them; a heading is the first row.

    `align` holds a letter for each column, `l` for left or `r` for right; further columns are aligned to the right.
    `widths` are the least numbers of characters.

    Example:
        >>> print(text_table([("model", "top-1"), ("dense", "72.02"), ("pruned", "9.50")]))
        model   top-1
        dense   72.02
        pruned   9.50
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sizes[: len(widths)] = map(max, sizes, widths)
    align = align.ljust(len(sizes), "r")
    lines = [
        "  ".join(
            cell.ljust(size) if side == "l" else cell.rjust(size)
            for cell, size, side in zip(row, sizes, align, strict=True)
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() if align.endswith("l") else line for line in lines)


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; a cell's `|`, `<` and line breaks are text."""
    lines = [[_markdown_cell(cell) for cell in row] for row in (heading, *rows)]
    lines.insert(1, ["---"] * len(heading))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_cell(text: str) -> str:
    return " ".join(
        printable(" ".join(text.split())).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split()
    )


def format_count(number: int) -> str:
    """Return a number of MACs or parameters as people read it: 1.26 G, 5.72 M."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)


def format_seconds(seconds: float) -> str:
    """Return a time as people read it: 0.25 s, 7.5 s, 3.2 min, 1.4 h.

    Example:
        >>> format_seconds(7.54), format_seconds(192)
        ('7.5 s', '3.2 min')
    """
    for scale, unit in ((3600, "h"), (60, "min")):
        if seconds >= scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"


def is_number(text: str) -> bool:
    """Return whether a cell of a table holds a number, which is aligned to the right.

    It may have a sign, a standard error, a unit, and quartiles in brackets.

    Example:
        >>> [is_number(cell) for cell in ("97.77 ± 0.49", "3.74 M", "1.26x (1.25 to 1.27)", "2.14.1", "8 sites")]
        [True, True, True, False, False]
    """
    return _NUMBER.fullmatch(text) is not None


def standard_error(percent: float, images: int | None) -> float | None:
    """Return the standard error of an accuracy in percent over so many images.

    None without the number of images, and at 0 and 100 %, where a count does not tell it.

    Source: binomial proportion, sqrt(p (1 - p) / n).
    """
    if not images or not 0 < percent < 100:
        return None
    return math.sqrt(percent * (100 - percent) / images)


def with_error(percent: float, images: int | None) -> str:
    """Return an accuracy in percent as people read it, with its standard error if that is known: 72.02 ± 1.24."""
    error = standard_error(percent, images)
    return f"{percent:.2f}" if error is None else f"{percent:.2f} ± {error:.2f}"
