"""Figures of a run: accuracy, cost and latency, fine-tuning over time, and a bar for each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from vbp.report.finished_run import FinishedRun
from vbp.report.published import PAPER_POINTS, SOURCE
from vbp.report.run_report import Measured, RunReport
from vbp.report.spectrum import short_names, site_errors
from vbp.report.style import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    Drawing,
    canvas,
    error_bars,
    labelled_bars,
    render,
)
from vbp.runtime.tables import format_count, standard_error, with_error

# Columns of the table of epochs after the validation accuracies, each with its format.
_CURVES: Final = {"train_top1": ".2f", "train_loss": ".4f", "lr": ".3g"}
_ERRORS: Final = "Lines over accuracies are one standard error over the validation images to both sides."
_COLOURS: Final = {
    "base": GREY, "uncompensated": ORANGE, "pruned": BLUE, "tuned": GREEN, "best": GREEN, "final": GREEN,
}  # fmt: skip
_MARKERS: Final = {"DeiT-S": "^", "DeiT-B": "s", "Swin-T": "D", "ConvNeXt-T": "P"}


def training_curves(run: RunReport, epochs: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Draw accuracy and loss over the epochs; None with fewer than two epochs of fine-tuning."""
    tuned, images = [row for row in epochs if row["epoch"] > 0], run.base.images
    if len(tuned) < 2 or not run.classifies:
        return None
    with canvas(4.0, nrows=2, sharex=True, height_ratios=(3, 2)) as (figure, (above, below)):
        above.axhline(run.base.score, color=GREY, linestyle="--", linewidth=1.2, label="dense, validation")
        for axes, rows, name, marker, colour, label in (
            (above, epochs, "top1", "o-", GREEN, "validation"),
            (above, tuned, "train_top1", "s:", ORANGE, "training"),
            (below, tuned, "train_loss", "s-", ORANGE, "training loss"),
        ):
            values = [row.get(name, float("nan")) for row in rows]
            axes.plot([row["epoch"] for row in rows], values, marker, color=colour, markersize=3.5, label=label)
        places, heights = zip(*((row["epoch"], row["top1"]) for row in epochs), strict=True)
        error_bars(above, places, heights, [standard_error(top1, images) for top1 in heights], GREEN)
        figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=3)
        above.set_ylabel("top-1 (%)")
        below.set_ylabel("training loss")
        below.set_xlabel("epoch")
        below.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    best = run.best
    return Drawing(
        "training",
        "Fine-tuning",
        f"Accuracy and loss over the epochs; epoch 0 is the pruned model. {_ERRORS} Training accuracy is measured on "
        "augmented images while the weights change, so it may lie below.",
        f"Validation top-1 goes from {with_error(epochs[0]['top1'], images)} % to "
        f"{with_error(tuned[-1]['top1'], images)} % in {tuned[-1]['epoch']} epochs; the best is {best.top1_text} % "
        f"after epoch {best.epoch}.",
        ("Epoch", "Top-1 (%)", "Top-5 (%)", "Training top-1 (%)", "Training loss", "Learning rate"),
        tuple(
            (
                str(row["epoch"]),
                *(with_error(row[name], images) if name in row else "" for name in ("top1", "top5")),
                *(f"{row[name]:{form}}" if name in row else "" for name, form in _CURVES.items()),
            )
            for row in epochs
        ),
        *render(figure, "training"),
    )


def plan_convergence(run: RunReport) -> Drawing | None:
    """Draw how the plan converged as the calibration images doubled; None with fewer than two doublings."""
    stages = [] if run.convergence is None else run.convergence["stages"]
    changes = [(stage["images"], 100 * stage["changed"]) for stage in stages if stage["changed"] is not None]
    if run.convergence is None or len(changes) < 2:
        return None
    converged = run.convergence["converged"]
    with canvas(2.8) as (figure, axes):
        axes.plot(*zip(*changes, strict=True), "o-", color=BLUE, markersize=5)
        axes.set_xscale("log", base=2)
        axes.set_xticks([images for images, _ in changes], [f"{images:,}" for images, _ in changes])
        axes.minorticks_off()
        axes.set_ylim(0, max(0.1, *(changed for _, changed in changes)) * 1.15)
        if converged is not None:
            axes.axvline(converged, color=GREEN, linestyle="--", linewidth=1.2)
            axes.annotate(
                "converged", (converged, 1), (-4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
                color=GREEN, fontsize=9, rotation=90, ha="right", va="top",
            )  # fmt: skip
        axes.set_xlabel("calibration images")
        axes.set_ylabel("channels that changed (%)")
    said = "The plan did not converge." if converged is None else f"The plan converged at {converged:,} images."
    return Drawing(
        "convergence",
        "Convergence of the plan",
        "Share of all channels that the plan kept with half the images, and did not keep any more with this many. "
        "Where it is small, more calibration images would change little.",
        f"{said} The last doubling, to {changes[-1][0]:,} images, changed {changes[-1][1]:.2f} % of the channels.",
        ("Images", "Channels that changed (%)"),
        tuple((f"{images:,}", f"{changed:.2f}") for images, changed in changes),
        *render(figure, "convergence"),
    )


def accuracy_steps(run: RunReport) -> Drawing | None:
    """Draw the top-1 accuracy after each step; None where none was measured."""
    if not run.classifies:
        return None
    steps = [(label, run.models[name]) for name, label in run.steps.items()]
    with canvas(0.75 + 0.42 * len(steps)) as (figure, axes):
        labels = [label.replace(", ", ",\n", 1) for label, _ in steps]
        texts = [model.top1_text for _, model in steps]
        colours = [_COLOURS[name] for name in run.steps]
        spans = [
            None if (error := model.top1_error) is None else (model.score - error, model.score + error)
            for _, model in steps
        ]
        labelled_bars(axes, labels, [model.score for _, model in steps], colours, texts, spans)
        axes.set_xlabel("top-1 accuracy (%)")
        # The texts beside the bars need room beyond 100 %.
        axes.set_xticks([tick for tick in MaxNLocator(5).tick_values(*axes.get_xlim()) if 0 <= tick <= 100])
    return Drawing(
        "accuracy",
        "Accuracy step by step",
        "Top-1 accuracy on the validation images: what pruning costs, and what compensation and fine-tuning give "
        f"back. {_ERRORS}",
        "Bars of top-1 accuracy: " + ", ".join(f"{label} {model.top1_text} %" for label, model in steps) + ".",
        ("Model", "Top-1 (%)", "Top-5 (%)", "Change in top-1"),
        tuple(
            (label, model.top1_text, model.top5_text, f"{model.score - run.base.score:+.2f}")
            for label, model in steps
        ),
        *render(figure, "accuracy"),
    )


def accuracy_against_macs(run: RunReport) -> Drawing | None:
    """Draw what is left of accuracy against what is left of the MACs beside the paper's points; None off ImageNet."""
    base = run.base
    if not run.imagenet or not run.classifies or base.score <= 0 or base.macs <= 0:
        return None
    with canvas(4.1) as (figure, axes):
        _paper(axes)
        pruned, best = (_relative(model, base) for model in (run.pruned, run.best))
        for model in (run.pruned, run.best) if run.final.epoch else (run.pruned,):
            left, top1 = _relative(model, base)
            error = model.top1_error
            error_bars(axes, [left], [top1], [None if error is None else 100 * error / base.score])
        axes.plot(*zip((100, 100), pruned, strict=True), color=BLUE, linewidth=1, linestyle=":")
        axes.plot(100, 100, "o", color=INK, markersize=6, label="dense")
        axes.plot(*pruned, "o", color=BLUE, markersize=9, label="this run, pruned")
        if run.final.epoch:
            axes.plot(*best, "*", color=GREEN, markersize=15, label="this run, best", markeredgecolor=INK)
        axes.set_xlabel("MACs left (% of dense)")
        axes.set_ylabel("top-1 left (% of dense)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
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
        f"Both relative to the dense model, so that models compare. {_ERRORS} Published points: {SOURCE}. "
        "They compare with this run only as far as its data and its fine-tuning are alike.",
        f"This run keeps {pruned[0]:.1f} % of the MACs, with {pruned[1]:.1f} % of the top-1 accuracy right after "
        f"pruning and {best[1]:.1f} % at best; the published points of the paper lie beside it.",
        ("Model", "Removed (%)", "MACs left (%)", "Top-1 left, pruned (%)", "Top-1 left, best (%)"),
        tuple(rows),
        *render(figure, "accuracy_macs"),
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


def _relative(model: Measured, base: Measured) -> tuple[float, float]:
    return 100 * model.macs / base.macs, 100 * model.score / base.score


def latency_bars(run: RunReport) -> Drawing | None:
    """Draw the measured latency beside the one that MACs promise; None where it was not measured."""
    timed = run.latency
    if timed is None or not run.base.macs or not run.pruned.macs:
        return None
    dense, pruned, by_macs = timed.dense_ms, timed.pruned_ms, run.base.macs / run.pruned.macs
    rows = (
        ("dense", dense.median, GREY, (dense.low, dense.high), "1.00x"),
        ("pruned", pruned.median, BLUE, (pruned.low, pruned.high), timed.speedup_text),
        ("if time followed MACs", dense.median / by_macs, FAINT, None, f"{by_macs:.2f}x"),
    )
    with canvas(2.0) as (figure, axes):
        labelled_bars(
            axes, [row[0].replace("time ", "time\n") for row in rows], [row[1] for row in rows],
            [row[2] for row in rows], [f"{row[1]:.2f} ms" for row in rows], [row[3] for row in rows],
        )  # fmt: skip
        axes.set_xlabel("milliseconds a batch (median and quartiles)")
    return Drawing(
        "latency",
        "Latency",
        f"Time of a batch at {timed.conditions}, dense and pruned taking turns: median and quartiles, and the time "
        "that the smaller number of MACs would allow. The speed-up is the median of the rounds' own ratios.",
        f"Dense and pruned: {timed.latency_text}, a speed-up of {timed.speedup_text}, where the MACs would allow "
        f"{by_macs:.2f}x.",
        ("Model", "Latency (ms)", "Speed-up (quartiles)"),
        tuple((row[0], f"{row[1]:.2f}", row[4]) for row in rows),
        *render(figure, "latency"),
    )


def cost_rows(run: RunReport) -> tuple[tuple[str, ...], ...]:
    """Return MACs and parameters before and after, as rows of text: what, dense, pruned, saved."""
    base, pruned = run.base, run.pruned
    pairs = (("MACs of one image", base.macs, pruned.macs), ("Parameters", base.params, pruned.params))
    return tuple(
        (what, format_count(before), format_count(after), f"{100 * (1 - after / before):.1f} %" if before else "")
        for what, before, after in pairs
    )


def kept_channels(run: RunReport) -> Drawing | None:
    """Draw how many channels each site keeps; None without sites."""
    sites = [(name, kept, total) for name, (kept, total) in run.sites.items()]
    if not sites:
        return None
    with canvas(_height(len(sites))) as (figure, axes):
        places = np.arange(len(sites))
        axes.barh(places, [total for _, _, total in sites], color=FAINT, height=0.72, label="removed")
        axes.barh(places, [kept for _, kept, _ in sites], color=BLUE, height=0.72, label="kept")
        widest = max(total for _, _, total in sites)
        for place, (_, kept, total) in zip(places, sites, strict=True):
            axes.annotate(
                f"{kept / total:.0%}", (total, place), (3, 0), textcoords="offset points", va="center",
                fontsize=_label_size(len(sites)),
            )  # fmt: skip
        _site_axis(axes, [name for name, _, _ in sites])
        axes.set_xlim(0, widest * 1.12)
        axes.set_xlabel("hidden channels")
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside upper center", ncols=2)
    least, most = min(sites, key=lambda site: site[1] / site[2]), max(sites, key=lambda site: site[1] / site[2])
    return Drawing(
        "kept_channels",
        "Kept channels",
        "Each bar is a site as wide as in the dense model; the dark part stays.",
        f"{len(sites)} sites. {least[0]} keeps least, {least[1]} of {least[2]} channels; {most[0]} keeps most, "
        f"{most[1]} of {most[2]}.",
        ("Site", "Kept", "Of", "Share"),
        tuple((name, str(kept), str(total), f"{kept / total:.1%}") for name, kept, total in sites),
        *render(figure, "kept_channels"),
    )


def reconstruction_errors(run: FinishedRun) -> Drawing | None:
    """Draw the error that is left at each site; None where it is not known."""
    errors_of_sites = site_errors(run)
    if errors_of_sites is None:
        return None
    errors = errors_of_sites.errors
    compensated = run.report.config["compensation"] != "none" or errors_of_sites.at == "output"
    before = "mean shift" if compensated else "no compensation"
    refit = errors[0].refit is not None
    with canvas(_height(len(errors))) as (figure, axes):
        places = np.arange(len(errors))
        axes.barh(places, [100 * error.before for error in errors], color=ORANGE, height=0.72, label=before)
        if refit:
            axes.barh(places, [100 * error.left for error in errors], color=BLUE, height=0.36, label="refit")
        _site_axis(axes, [error.site for error in errors])
        axes.set_xlim(0, max(1e-3, *(100 * error.before for error in errors)) * 1.05)
        axes.set_xlabel("squared error (% of the variance)")
        figure.legend(loc="outside upper center", ncols=2)
    worst = max(errors, key=lambda error: error.left)
    caption = (
        "Variance of the error at the output of the layer that reads the channels, as a share of that output's own "
        "variance, before fine-tuning."
        if errors_of_sites.at == "output"
        else "Mean squared error of the hidden channels that were removed, as a share of the variance of all "
        "channels of the site, before fine-tuning. It comes from the statistics; what the next layer makes of "
        "it may differ."
    )
    return Drawing(
        "reconstruction",
        "Reconstruction error",
        caption,
        f"The largest error is left at {worst.site}: {100 * worst.left:.1f} % of the variance.",
        ("Site", f"Error with {before} (%)", *(("Error with refit (%)",) if refit else ())),
        tuple(
            (error.site, f"{100 * error.before:.2f}", *((f"{100 * error.left:.2f}",) if refit else ()))
            for error in errors
        ),
        *render(figure, "reconstruction"),
    )


def _height(sites: int) -> float:
    return 1.3 + sites * (0.2 if sites <= 60 else 12 / sites)


def _label_size(sites: int) -> float:
    return 8 if sites <= 60 else max(3.0, 480 / sites)


def _site_axis(axes: Axes, names: list[str]) -> None:
    pattern, labels = short_names(names)
    axes.set_yticks(range(len(names)), labels, fontsize=_label_size(len(names)))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    if pattern:
        axes.set_title(f"sites {pattern}", fontsize=9, loc="left")
