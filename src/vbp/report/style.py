"""Turn figures into SVG and PNG: the same bytes each time, one palette, no state left behind in matplotlib."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Okabe and Ito's colours, which all kinds of colour vision tell apart.
BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"
INK, GREY, FAINT, PAPER = "#1f2329", "#76808a", "#d9dde2", "#ffffff"
WIDTH: Final = 4.6
_DPI: Final = 160

# What stands in an SVG file, and what stands for it on the page, which has a style sheet.
_ON_PAGE: Final = {
    INK: "currentColor", GREY: "var(--grey)", FAINT: "var(--faint)", PAPER: "var(--paper)", BLUE: "var(--blue)",
    ORANGE: "var(--orange)", GREEN: "var(--green)", PINK: "var(--pink)", "'DejaVu Sans'": "system-ui",
}  # fmt: skip

_NO_METADATA: Final = dict.fromkeys(("Creator", "Date", "Format", "Type"))

_STYLE: Final[dict[Any, Any]] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10.5, "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 8.5, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.edgecolor": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": FAINT, "grid.linewidth": 0.7, "lines.linewidth": 1.8, "figure.facecolor": PAPER,
    "axes.facecolor": "none", "svg.fonttype": "none",
    # Names come from users: a dollar sign in one begins no formula.
    "text.parse_math": False,
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One figure with all that a reader who cannot see it needs: `alt` says in words what it shows, `caption` how.

    `name` is the stem of its files; `wide` is whether it needs the width of the page.
    """

    name: str
    title: str
    caption: str
    alt: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    svg: bytes
    png: bytes
    wide: bool = False

    @property
    def inline_svg(self) -> str:
        """Return the SVG for a page: colours from its style sheet, text in its font, no needless identifiers."""
        opening, _, body = self.svg.decode().partition("<svg ")[2].partition(">")
        box = opening[opening.index("viewBox") :].split('"')[1]
        body = re.sub(r'<g id="[^"]*"', "<g", body)  # what is referred to has an identifier of its own
        for drawn, on_page in _ON_PAGE.items():
            body = body.replace(drawn, on_page)
        return f'<svg role="img" aria-label="{html.escape(self.alt)}" viewBox="{box}">{body}'


@contextmanager
def canvas(height: float, columns: int = 1, width: float = WIDTH, **options: Any) -> Iterator[tuple[Figure, Any]]:
    """Return an empty figure of this project's style and its axes (several: an array), to draw on within the block.

    Height and width are in inches; the options are those of `Figure.subplots`.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(ncols=columns, **options)


def render(figure: Figure, name: str) -> tuple[bytes, bytes]:
    """Return a figure as SVG and PNG, the same bytes each time; SVGs of other names have other identifiers."""
    svg, png = io.BytesIO(), io.BytesIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # A name in a script that the font lacks shows boxes in the PNG; the SVG has it as text.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        # `savefig` draws everything twice, once to measure, which the layout engine does not need.
        FigureCanvasSVG(figure).print_svg(svg, metadata=_NO_METADATA)  # type: ignore[no-untyped-call]
        # The layout is the same for both files.
        figure.set_layout_engine("none")
        figure.set_dpi(_DPI)
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return svg.getvalue(), png.getvalue()


def error_bars(
    axes: Axes, x: Sequence[float], y: Sequence[float], errors: Sequence[float | None], colour: str = INK
) -> None:
    """Draw a vertical bar of one standard error to both sides of each point whose error is known."""
    for left, height, error in zip(x, y, errors, strict=True):
        if error is not None:
            axes.vlines(left, height - error, height + error, color=colour, linewidth=1.1, zorder=3)


def labelled_bars(
    axes: Axes,
    labels: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    texts: Sequence[str],
    spans: Sequence[tuple[float, float] | None],
) -> None:
    """Draw horizontal bars from the top, each with its number beside it, and with a line over its span if any."""
    places = range(len(labels))
    axes.barh(places, values, color=colours, height=0.66)
    ends = [value if span is None else max(value, span[1]) for value, span in zip(values, spans, strict=True)]
    for place, span in zip(places, spans, strict=True):
        if span is not None:
            axes.hlines(place, *span, color=INK, linewidth=1.4)
    for place, end, text in zip(places, ends, texts, strict=True):
        axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    # A letter of the text takes about 3 % of the axis.
    axes.set_xlim(0, max(1e-9, *ends) * (1.03 + 0.03 * max(map(len, texts))))
