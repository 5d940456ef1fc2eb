"""Accuracy against MACs, parameters and latency, beside published points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vbp.report.published import PublishedPoint
from vbp.report.style import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SKY, canvas, error_bars
from vbp.report.sweep_report import SweepReport

# After the last colour come the same colours with another marker.
_COLOURS: Final = (BLUE, ORANGE, GREEN, PINK, SKY, RED, INK)
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
_PANELS: Final = {"macs": "MACs left (%)", "params": "parameters left (%)", "latency": "latency left (%)"}


def draw_sweep(report: SweepReport, references: Sequence[PublishedPoint] = ()) -> Figure:
    """Draw what is left of the dense model's top-1 against what is left of its cost, a line for each method.

    Vertical lines are one standard error of the pruned model's top-1, horizontal ones the quartiles of the latency.
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
                colour = _COLOURS[number % len(_COLOURS)]
                left, top1 = [point.left for point in points], [point.top1 for point in points]
                axes.plot(
                    left, top1, marker=_MARKERS[number // len(_COLOURS) % len(_MARKERS)], color=colour, markersize=4,
                    linewidth=1.6, label=method,
                )  # fmt: skip
                error_bars(axes, left, top1, [point.error for point in points], colour)
                for point in points:
                    if point.quartiles is not None:
                        axes.hlines(point.top1, *point.quartiles, color=colour, linewidth=1.1)
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


@dataclass(frozen=True)
class _Point:
    """What is left of the dense model in percent: of its cost, of its top-1; the standard error, the quartiles."""

    left: float
    top1: float
    error: float | None
    quartiles: tuple[float, float] | None


def _lines(report: SweepReport) -> dict[str, dict[str, list[_Point]]]:
    """Return for each cost the points of each method, the cheapest model first."""
    lines: dict[str, dict[str, list[_Point]]] = {cost: {} for cost in _PANELS}
    for row in report.rows:
        share, error = report.share(row), row.measured.top1_error
        for cost, by_method in lines.items():
            left, top1, quartiles = share[cost], share["top1"], None
            if left is None or top1 is None:
                continue
            if cost == "latency" and row.latency is not None:
                quartiles = 100 / row.latency.speedup.high, 100 / row.latency.speedup.low
            relative = None if error is None else 100 * error / report.dense.score
            by_method.setdefault(row.setting.method, []).append(_Point(100 * left, 100 * top1, relative, quartiles))
    return {
        cost: {
            method: sorted(points, key=lambda point: (point.left, point.top1)) for method, points in methods.items()
        }
        for cost, methods in lines.items()
    }


def _references(axes: Axes, references: Sequence[PublishedPoint]) -> None:
    by_model: dict[str, list[tuple[float, float]]] = {}
    for point in references:
        by_model.setdefault(point.model, []).append((point.macs, point.pruned or 0.0))
    for (model, points), dashes in zip(by_model.items(), ("--", ":", "-.", "-") * len(by_model), strict=False):
        axes.plot(
            *zip(*sorted(points), strict=True), dashes, marker="o", markerfacecolor="none", color=GREY, markersize=4,
            linewidth=1, label=model,
        )  # fmt: skip
