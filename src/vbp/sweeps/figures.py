"""Two figures of a sweep: the Pareto front of accuracy and cost, and a curve for each method."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vbp.report.published import PublishedPoint
from vbp.report.style import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SKY, Drawing, canvas, error_bars, render
from vbp.runtime.tables import format_count
from vbp.sweeps.report import Cost, SweepReport
from vbp.sweeps.rows import STAGES, OverSeeds, SettingRows, Stage

FIGURES: Final = ("pareto", "sweep")
_COLOURS: Final = (BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY)
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<")
_DASHES: Final = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 2.5)))
_PANELS: Final[dict[Cost, str]] = {
    "macs": "MACs left (%)", "params": "parameters left (%)", "latency": "latency left (%)",
}  # fmt: skip
_TITLES: Final[dict[Stage, str]] = {"pruned": "right after pruning", "tuned": "after fine-tuning"}
_UNITS: Final = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
# In small letters as wide as one panel and a half.
_TITLE_LETTERS: Final = 100
_ERRORS: Final = "Thin vertical lines are one standard error over the validation images to both sides"
_DEVIATIONS: Final = "; broad pale ones one standard deviation over the seeds"


def draw(report: SweepReport, references: Sequence[PublishedPoint] = ()) -> dict[str, Drawing]:
    """Draw both figures, by name; the references are points of the same model."""
    errors = _ERRORS + (_DEVIATIONS if report.seeds > 1 else "")
    drawings = (_pareto_drawing(report, errors), _sweep_drawing(report, references, errors))
    return {drawing.name: drawing for drawing in drawings}


def draw_pareto(report: SweepReport) -> Figure:
    """Draw the accuracy of all models that come out against their MACs and latency, and the line of the front."""
    costs: list[Cost] = ["macs", *(["latency"] if any(row.latency for row in report.rows) else [])]  # type: ignore[list-item]
    styles, dense = _styles(report), report.dense
    scale, unit = next((scale, unit) for scale, unit in _UNITS if dense.macs >= scale or scale == 1.0)
    with canvas(4.4, len(costs), 5.2 * len(costs), sharey=True, squeeze=False) as (figure, ((*panels,),)):
        for axes, cost in zip(panels, costs, strict=True):
            factor = dense.macs / scale if cost == "macs" else 100
            front = report.front(cost)
            steps = [(factor * place.left, place.top1.mean) for place in _places(report, front, cost)]
            if not steps or dense.score > steps[-1][1]:
                steps.append((factor, dense.score))
            axes.step(
                *zip(*steps, strict=True), where="post", color=GREY, linewidth=1.4, zorder=1, label="Pareto front"
            )
            for place in _places(report, report.settings, cost):
                colour, style = styles[place.group.setting.method]
                axes.plot([factor * place.left], [place.top1.mean], **style | {"linestyle": "none"})
                _bars(axes, factor * place.left, place.top1, 1.0, colour)
            axes.plot([factor], [dense.score], "*", color=INK, markersize=11, linestyle="none", label="dense")
            error_bars(axes, [factor], [dense.score], [dense.top1_error])
            axes.set_xlabel(f"MACs of one image ({unit})".replace(" ()", "") if cost == "macs" else _PANELS[cost])
        panels[0].set_ylabel("top-1 (%)")
        _legend(figure, panels)
        figure.suptitle(f"{_model(report)}: accuracy against cost", fontsize=11)
    return figure


def draw_sweep(report: SweepReport, references: Sequence[PublishedPoint] = ()) -> Figure:
    """Draw what is left of the dense model's top-1 against what is left of its cost, a curve for each method.

    A row of panels is right after pruning, a second one after fine-tuning. A panel without points is left out.
    Curves may coincide: of two the first is broader, with larger markers, and the later lies on it in dashes.
    """
    stages = [stage for stage in STAGES if stage == "pruned" or report.is_tuned]
    references = [point for point in references if point.pruned is not None or len(stages) > 1]
    known = {cost for cost in _PANELS for _ in _places(report, report.settings, cost)}
    costs = [cost for cost in _PANELS if cost in known or cost == "macs"]
    styles = _styles(report)
    size = (4.0 * len(stages) + 0.8, len(costs), 4.2 * len(costs))
    with canvas(*size, nrows=len(stages), sharex="col", sharey="row", squeeze=False) as (figure, grid):
        for panels, stage in zip(grid, stages, strict=True):
            for axes, cost in zip(panels, costs, strict=True):
                if cost == "macs":
                    _references(axes, references, stage)
                for method, style in styles.items():
                    _curve(axes, report, method, style, stage, cost)
                _dense_point(axes, report)
                axes.set_title(_TITLES[stage], fontsize=9, loc="left")
            panels[0].set_ylabel("top-1 left (% of dense)")
        for axes, cost in zip(grid[-1], costs, strict=True):
            axes.set_xlabel(_PANELS[cost])
        sources = "; ".join(dict.fromkeys(point.source for point in references))
        _legend(figure, grid.flat, f"Published points: {sources}" if sources else "")
        figure.suptitle(f"{_model(report)}: top-1 left against cost left", fontsize=11)
    return figure


@dataclass(frozen=True)
class _Place:
    """Where one setting stands: what is left of the dense model's cost as a share, with quartiles; its top-1."""

    group: SettingRows
    left: float
    quartiles: tuple[float, float] | None
    top1: OverSeeds


def _places(
    report: SweepReport, groups: Sequence[SettingRows], cost: Cost, stage: Stage | None = None
) -> Iterator[_Place]:
    """Yield the settings whose cost is known, without a stage with the model that comes out."""
    for group in groups:
        top1 = group.final_top1 if stage is None else group.top1(stage)
        shares = [left for row in group.rows if (left := report.share(row)[cost]) is not None]
        if top1 is None or not shares:
            continue
        speeds = [row.latency.speedup for row in group.rows if row.latency is not None] if cost == "latency" else []
        quartiles = (fmean(1 / one.high for one in speeds), fmean(1 / one.low for one in speeds)) if speeds else None
        yield _Place(group, fmean(shares), quartiles, top1)


def _styles(report: SweepReport) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return for each method its colour, and how its curve is drawn: later ones thinner, on top of earlier ones."""
    methods = list(dict.fromkeys(row.setting.method for row in report.rows))
    styles = {}
    for number, method in enumerate(methods):
        colour = _COLOURS[number % len(_COLOURS)]
        broad = (len(methods) - 1 - number) / max(1, len(methods) - 1)
        styles[method] = colour, {
            "color": colour, "marker": _MARKERS[number % len(_MARKERS)], "linestyle": _DASHES[number % len(_DASHES)],
            "linewidth": 1.3 + 2.2 * broad, "markersize": 4 + 5 * broad, "markerfacecolor": "none",
            "markeredgewidth": 1.3, "zorder": 2 + number / len(methods), "label": method,
        }  # fmt: skip
    return styles


def _curve(
    axes: Axes, report: SweepReport, method: str, style: tuple[str, dict[str, Any]], stage: Stage, cost: Cost
) -> None:
    """Draw one method, the cheapest model first; horizontal lines are the quartiles of the latency."""
    if not report.dense.score:
        return
    groups = [group for group in report.settings if group.setting.method == method]
    places = sorted(_places(report, groups, cost, stage), key=lambda place: (place.left, place.top1.mean))
    if not places:
        return
    scale, (colour, drawn) = 100 / report.dense.score, style
    left, heights = [100 * place.left for place in places], [scale * place.top1.mean for place in places]
    axes.plot(left, heights, **drawn)
    for place, x, height in zip(places, left, heights, strict=True):
        _bars(axes, x, place.top1, scale, colour)
        if place.quartiles is not None:
            low, high = place.quartiles
            axes.hlines(height, 100 * low, 100 * high, color=colour, linewidth=1.1)


def _bars(axes: Axes, x: float, top1: OverSeeds, scale: float, colour: str) -> None:
    """Draw standard error and standard deviation over seeds of one accuracy."""
    height = scale * top1.mean
    error_bars(axes, [x], [height], [None if top1.error is None else scale * top1.error], colour)
    if top1.deviation is not None:
        spread = scale * top1.deviation
        axes.vlines(x, height - spread, height + spread, color=colour, linewidth=5, alpha=0.35, zorder=1)


def _dense_point(axes: Axes, report: SweepReport) -> None:
    error, top1 = report.dense.top1_error, report.dense.score
    if top1:
        axes.plot([100], [100], "*", color=INK, markersize=11, linestyle="none", label="dense", zorder=4)
        error_bars(axes, [100], [100], [None if error is None else 100 * error / top1])


def _references(axes: Axes, references: Sequence[PublishedPoint], stage: Stage) -> None:
    by_model: dict[str, list[tuple[float, float]]] = {}
    for point in references:
        top1, name = (point.pruned, point.model) if stage == "pruned" else (point.tuned, f"{point.model}, tuned")
        if top1 is not None:
            by_model.setdefault(name.replace(", pruned, tuned", ", tuned"), []).append((point.macs, top1))
    for (model, points), dashes in zip(by_model.items(), ("--", ":", "-.", "-") * len(by_model), strict=False):
        axes.plot(
            *zip(*sorted(points), strict=True), dashes, marker="o", markerfacecolor="none", color=GREY, markersize=4,
            linewidth=1, label=model,
        )  # fmt: skip


def _legend(figure: Figure, panels: Any, title: str = "") -> None:
    """Draw one legend under all panels, its title in small letters."""
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=min(4, len(handles)),
            title=textwrap.fill(title, _TITLE_LETTERS) or None, title_fontsize=7,
        )  # fmt: skip


def _model(report: SweepReport) -> str:
    return str(report.about.get("model_name", "") or "model").rpartition("/")[2]


def _pareto_drawing(report: SweepReport, errors: str) -> Drawing:
    front = report.front("macs")
    rows = []
    for group in front:
        top1 = group.final_top1
        macs = format_count(round(group.mean(lambda row: row.measured.macs)))
        rows.append((f"{group.setting.method}, keep_ratio {group.setting.keep_ratio:g}", top1.text, macs))
    best = f"{rows[-1][0]} with {rows[-1][1]} %" if rows else "none: no pruned model is on it"
    return Drawing(
        "pareto",
        "Accuracy against cost",
        "Every model that comes out, and the dense one. No other model costs no more and is at least as accurate as "
        f"one on the line. {errors}.",
        f"{len(rows)} of {len(report.settings)} settings are on the Pareto front of top-1 and MACs; the most "
        f"accurate of them is {best}, where the dense model has {report.dense.top1_text} %.",
        ("On the front", "Top-1 (%)", "MACs"),
        (*rows, ("dense", report.dense.top1_text, format_count(report.dense.macs))),
        *render(draw_pareto(report), "pareto"),
        wide=True,
    )


def _sweep_drawing(report: SweepReport, references: Sequence[PublishedPoint], errors: str) -> Drawing:
    heading, *rows = report.table_rows()
    timed = any(row.latency for row in report.rows)
    return Drawing(
        "sweep",
        "Each method at each ratio",
        "What is left of the dense model's top-1 against what is left of its cost. Where curves coincide, the later "
        f"one lies in dashes on the broader one. {errors}{'; horizontal ones quartiles of the latency' * timed}.",
        f"{len(rows) - 1} pruned models of {len({row.setting.method for row in report.rows})} methods; the table "
        "holds their accuracies and costs.",
        tuple(heading),
        tuple(map(tuple, rows)),
        *render(draw_sweep(report, references), "sweep"),
        wide=True,
    )
