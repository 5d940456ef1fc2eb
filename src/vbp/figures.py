"""Figures of a whole run: accuracy, cost, latency."""

from __future__ import annotations

from typing import Final

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from vbp.cost import format_count
from vbp.drawing import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PINK, Drawing, canvas, labelled_bars, render
from vbp.paper_points import PAPER_POINTS, SOURCE
from vbp.run_summary import RunSummary, Step

_COLOURS: Final = {"base": GREY, "uncompensated": ORANGE, "pruned": BLUE, "best": GREEN, "final": GREEN}
_MARKERS: Final = {"DeiT-S": "^", "DeiT-B": "s", "Swin-T": "D", "ConvNeXt-T": "P"}


def accuracy_steps(run: RunSummary) -> Drawing:
    """Draw the top-1 accuracy after each step."""
    steps = run.steps
    with canvas(0.75 + 0.42 * len(steps)) as (figure, axes):
        labels = [_two_lines(step.label) for step in steps]
        texts = [f"{step.top1:.2f}" for step in steps]
        labelled_bars(axes, labels, [step.top1 for step in steps], [_COLOURS[step.name] for step in steps], texts)
        axes.set_xlabel("top-1 accuracy (%)")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        svg, png = render(figure)
    return Drawing(
        "accuracy",
        "Accuracy step by step",
        "Top-1 accuracy on the validation images: what pruning costs, and what compensation and fine-tuning give "
        "back.",
        "Bars of top-1 accuracy: " + ", ".join(f"{step.label} {step.top1:.2f} %" for step in steps) + ".",
        ("Model", "Top-1 (%)", "Top-5 (%)", "Change in top-1"),
        tuple(
            (step.label, f"{step.top1:.2f}", f"{step.top5:.2f}", f"{step.top1 - steps[0].top1:+.2f}")
            for step in steps
        ),
        svg,
        png,
    )


def accuracy_against_macs(run: RunSummary) -> Drawing | None:
    """Draw what is left of accuracy against what is left of the MACs, beside the paper's points."""
    base = run.models["base"]
    if base.top1 <= 0 or base.macs <= 0:
        return None
    with canvas(4.1) as (figure, axes):
        _paper(axes)
        pruned, best = (_relative(run.models[name], base) for name in ("pruned", "best"))
        axes.plot(*zip((100, 100), pruned, strict=True), color=BLUE, linewidth=1, linestyle=":")
        axes.plot(*pruned, "o", color=BLUE, markersize=9, label="this run, pruned")
        if run.models["final"].epoch:
            axes.plot(*best, "*", color=GREEN, markersize=15, label="this run, best", markeredgecolor=INK)
        axes.set_xlabel("MACs left (% of dense)")
        axes.set_ylabel("top-1 left (% of dense)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        svg, png = render(figure)
    rows = [
        ("this run", f"{100 * (1 - run.keep_ratio):.0f}", f"{pruned[0]:.1f}", f"{pruned[1]:.1f}", f"{best[1]:.1f}")
    ]
    rows += [
        (point.model, str(point.removed), f"{point.macs:.1f}",
         "" if point.pruned is None else f"{point.pruned:.1f}", f"{point.tuned:.1f}")
        for point in PAPER_POINTS
        if point.removed
    ]  # fmt: skip
    return Drawing(
        "accuracy_macs",
        "Accuracy against MACs",
        f"Both relative to the dense model, so that models compare. Published points: {SOURCE}. They compare with "
        "this run only as far as its data and its fine-tuning are alike.",
        f"This run keeps {pruned[0]:.1f} % of the MACs, with {pruned[1]:.1f} % of the top-1 accuracy right after "
        f"pruning and {best[1]:.1f} % at best; the published points of the paper lie beside it.",
        ("Model", "Removed (%)", "MACs left (%)", "Top-1 left, pruned (%)", "Top-1 left, best (%)"),
        tuple(rows),
        svg,
        png,
    )


def _paper(axes: Axes) -> None:
    curve = [point for point in PAPER_POINTS if point.model == "DeiT-T"]
    macs = [point.macs for point in curve]
    axes.plot(macs, [point.tuned for point in curve], ".-", color=GREY, linewidth=1, label="paper: DeiT-T, tuned")
    axes.plot(
        macs, [point.pruned or 0 for point in curve], ".--", color=GREY, linewidth=1, label="paper: DeiT-T, pruned"
    )
    for model, marker in _MARKERS.items():
        points = [point for point in PAPER_POINTS if point.model == model]
        axes.plot(
            [point.macs for point in points], [point.tuned for point in points], marker, color=PINK, markersize=6,
            markerfacecolor="none", label=f"paper: {model}, tuned",
        )  # fmt: skip


def _relative(step: Step, base: Step) -> tuple[float, float]:
    return 100 * step.macs / base.macs, 100 * step.top1 / base.top1


def latency_bars(run: RunSummary) -> Drawing | None:
    """Draw the measured latency beside the one that MACs promise; None where it was not measured."""
    base, pruned = run.models["base"], run.models["pruned"]
    if not base.latency_ms or not pruned.latency_ms or not base.macs or not pruned.macs:
        return None
    ideal = base.latency_ms * pruned.macs / base.macs
    rows = (
        ("dense", base.latency_ms, GREY),
        ("pruned", pruned.latency_ms, BLUE),
        ("if time followed MACs", ideal, FAINT),
    )
    with canvas(2.0) as (figure, axes):
        labelled_bars(
            axes, [label.replace("time ", "time\n") for label, _, _ in rows], [value for _, value, _ in rows],
            [colour for _, _, colour in rows], [f"{value:.2f} ms" for _, value, _ in rows],
        )  # fmt: skip
        axes.set_xlabel("milliseconds a batch (median)")
        svg, png = render(figure)
    speedup = base.latency_ms / pruned.latency_ms
    return Drawing(
        "latency",
        "Latency",
        f"Median time of a batch of {run.latency_batch} images on {run.device}, dense and pruned taking turns, and "
        "the time that the smaller number of MACs would allow.",
        f"Dense {base.latency_ms:.2f} ms, pruned {pruned.latency_ms:.2f} ms: {speedup:.2f} times as fast, where the "
        f"MACs would allow {base.macs / pruned.macs:.2f} times.",
        ("Model", "Latency (ms)", "Speed-up"),
        tuple((label, f"{value:.2f}", f"{base.latency_ms / value:.2f}x") for label, value, _ in rows),
        svg,
        png,
    )


def cost_rows(run: RunSummary) -> tuple[tuple[str, ...], ...]:
    """Give MACs and parameters before and after, as rows of text: what, dense, pruned, saved."""
    base, pruned = run.models["base"], run.models["pruned"]
    pairs = (("MACs of one image", base.macs, pruned.macs), ("Parameters", base.params, pruned.params))
    return tuple(
        (what, format_count(before), format_count(after), f"{100 * (1 - after / before):.1f} %" if before else "")
        for what, before, after in pairs
    )


def _two_lines(label: str) -> str:
    return label.replace(", ", ",\n", 1)
