"""Accuracy against MACs, parameters and latency, beside published points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vbp.report.published import PublishedPoint
from vbp.report.style import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SKY, canvas
from vbp.report.sweep_report import SweepReport

# After the last colour come the same colours with another marker.
_COLOURS: Final = (BLUE, ORANGE, GREEN, PINK, SKY, RED, INK)
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
_PANELS: Final = {"macs": "MACs left (%)", "params": "parameters left (%)", "latency": "latency left (%)"}


def draw_sweep(report: SweepReport, references: Sequence[PublishedPoint] = ()) -> Figure:
    """Draw what is left of the dense model's top-1 against what is left of its cost, a line for each method.

    Of the references, points of the same model, those right after pruning are drawn. A panel without points is left
    out.
    """
    references = [point for point in references if point.pruned is not None]
    lines = _lines(report)
    costs = [cost for cost in _PANELS if lines[cost] or (cost == "macs" and references)]
    count = max(1, len(costs))
    with canvas(4.6, count, 4.2 * count, sharey=True, squeeze=False) as (figure, ((*panels,),)):
        for axes, cost in zip(panels, costs, strict=False):
            if cost == "macs":
                _references(axes, references)
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
        if references:
            sources = "; ".join(dict.fromkeys(point.source for point in references))
            figure.suptitle(f"Published points: {sources}", fontsize=7, color=GREY, wrap=True)
    return figure


def _lines(report: SweepReport) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return for each cost the points of each method, the cheapest model first."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {cost: {} for cost in _PANELS}
    for row in report.rows:
        share = report.share(row)
        for cost, by_method in lines.items():
            left, top1 = share[cost], share["top1"]
            if left is not None and top1 is not None:
                by_method.setdefault(row.setting.method, []).append((100 * left, 100 * top1))
    return {cost: {method: sorted(points) for method, points in methods.items()} for cost, methods in lines.items()}


def _references(axes: Axes, references: Sequence[PublishedPoint]) -> None:
    by_model: dict[str, list[tuple[float, float]]] = {}
    for point in references:
        by_model.setdefault(point.model, []).append((point.macs, point.pruned or 0.0))
    for (model, points), dashes in zip(by_model.items(), ("--", ":", "-.", "-") * len(by_model), strict=False):
        axes.plot(
            *zip(*sorted(points), strict=True), dashes, marker="o", markerfacecolor="none", color=GREY, markersize=4,
            linewidth=1, label=model,
        )  # fmt: skip
