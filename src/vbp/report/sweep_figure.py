"""Accuracy against MACs, parameters and latency, beside published points."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from vbp.report.sweep_report import SweepReport

# Okabe and Ito's colours, which all kinds of colour vision tell apart; the markers go on where they are used up.
_COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")


_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")


_GREY: Final = "#76808a"


_STYLE: Final[dict[Any, Any]] = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#d9dde2", "grid.linewidth": 0.7, "legend.frameon": False, "svg.fonttype": "none",
    "svg.hashsalt": "vbp", "text.parse_math": False,
}  # fmt: skip


_PANELS: Final = {"macs": "MACs left (%)", "params": "parameters left (%)", "latency": "latency left (%)"}


@dataclass(frozen=True)
class ReferencePoint:
    """A published pruned model, relative to its dense one, to draw beside a sweep.

    Attributes:
        label: Points of one label are joined by a line.
        top1: Top-1 left, in percent of the dense model's.
        macs: MACs left in percent; None where it is not published.
        params: Parameters left in percent.
        latency: Latency left in percent.
        source: Where it was published.
    """

    label: str
    top1: float
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    source: str = ""


def draw_sweep(report: SweepReport, references: Sequence[ReferencePoint] = ()) -> Figure:
    """Draw what is left of the dense model's top-1 against what is left of its cost, a line for each method.

    A panel without any point is left out.

    Args:
        report: Of a sweep.
        references: Published points of the same model.
    """
    lines = _lines(report)
    costs = [
        cost
        for cost in _PANELS
        if any(points for points in lines[cost].values()) or any(_at(point, cost) is not None for point in references)
    ]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.2 * max(1, len(costs)), 4.6), layout="constrained")
        panels = figure.subplots(1, max(1, len(costs)), sharey=True, squeeze=False)[0]
        for axes, cost in zip(panels, costs, strict=False):
            _references(axes, cost, references)
            for number, (method, points) in enumerate(lines[cost].items()):
                axes.plot(
                    *zip(*points, strict=True), marker=_MARKERS[number // len(_COLOURS) % len(_MARKERS)],
                    color=_COLOURS[number % len(_COLOURS)], markersize=4, linewidth=1.6, label=method,
                )  # fmt: skip
            axes.set_xlabel(_PANELS[cost])
        panels[0].set_ylabel("top-1 left (% of dense)")
        handles = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(4, len(handles)))
        sources = dict.fromkeys(point.source for point in references if point.source)
        if sources:
            figure.suptitle("Published points: " + "; ".join(sources), fontsize=7, color=_GREY, wrap=True)
    return figure


def render_sweep(figure: Figure) -> tuple[bytes, bytes]:
    """Return a figure as SVG and PNG; the same figure gives the same bytes."""
    svg, png = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(_STYLE):
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
        figure.set_dpi(150)
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return svg.getvalue(), png.getvalue()


def _lines(report: SweepReport) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return for each cost the points of each method, the cheapest model first."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {cost: {} for cost in _PANELS}
    for row in report.rows:
        share = report.share(row)
        for cost, methods in found.items():
            left, top1 = share[cost], share["top1"]
            if left is not None and top1 is not None:
                methods.setdefault(row.setting.method, []).append((100 * left, 100 * top1))
    return {cost: {method: sorted(points) for method, points in methods.items()} for cost, methods in found.items()}


def _references(axes: Axes, cost: str, references: Sequence[ReferencePoint]) -> None:
    by_label: dict[str, list[tuple[float, float]]] = {}
    for point in references:
        left = _at(point, cost)
        if left is not None:
            by_label.setdefault(point.label, []).append((left, point.top1))
    for (label, points), dashes in zip(by_label.items(), ("--", ":", "-.", "-") * len(by_label), strict=False):
        axes.plot(
            *zip(*sorted(points), strict=True), dashes, marker="o", markerfacecolor="none", color=_GREY, markersize=4,
            linewidth=1, label=label,
        )  # fmt: skip


def _at(point: ReferencePoint, cost: str) -> float | None:
    return {"macs": point.macs, "params": point.params, "latency": point.latency}[cost]
