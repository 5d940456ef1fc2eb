"""Figures of what changed over time: fine-tuning, and how the plan settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vbp.drawing import BLUE, GREEN, GREY, ORANGE, Drawing, canvas, render
from vbp.run_summary import RunSummary


def training_curves(run: RunSummary, epochs: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Draw accuracy and loss over the epochs; None where nothing was fine-tuned."""
    tuned = [row for row in epochs if row["epoch"] > 0]
    if not tuned:
        return None
    with canvas(4.0) as (figure, _):
        _curves(figure, run.models["base"].top1, epochs, tuned)
        svg, png = render(figure)
    best = run.models["best"]
    return Drawing(
        "training",
        "Fine-tuning",
        "Accuracy and loss over the epochs; epoch 0 is the pruned model. Training accuracy is measured on augmented "
        "images while the weights change, so it may lie below.",
        f"Validation top-1 goes from {epochs[0]['top1']:.2f} % to {tuned[-1]['top1']:.2f} % in {tuned[-1]['epoch']} "
        f"epochs; the best is {best.top1:.2f} % after epoch {best.epoch}.",
        ("Epoch", "Top-1 (%)", "Top-5 (%)", "Training top-1 (%)", "Training loss", "Learning rate"),
        tuple(
            (str(row["epoch"]), f"{row['top1']:.2f}", f"{row['top5']:.2f}" if "top5" in row else "",
             f"{row['train_top1']:.2f}" if "train_top1" in row else "",
             f"{row['train_loss']:.4f}" if "train_loss" in row else "", f"{row['lr']:.3g}" if "lr" in row else "")
            for row in epochs
        ),
        svg,
        png,
    )  # fmt: skip


def _curves(
    figure: Figure, dense: float, epochs: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]
) -> None:
    figure.clear()
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    above.axhline(dense, color=GREY, linestyle="--", linewidth=1.2, label="dense, validation")
    for axes, rows, name, marker, colour, label in (
        (above, epochs, "top1", "o-", GREEN, "validation"),
        (above, tuned, "train_top1", "s:", ORANGE, "training"),
        (below, tuned, "train_loss", "s-", ORANGE, "training loss"),
    ):
        values = [row.get(name, float("nan")) for row in rows]
        axes.plot([row["epoch"] for row in rows], values, marker, color=colour, markersize=3.5, label=label)
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    above.set_ylabel("top-1 (%)")
    below.set_ylabel("training loss")
    below.set_xlabel("epoch")
    below.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def plan_convergence(run: RunSummary) -> Drawing | None:
    """Draw how the plan settled as the calibration images doubled; None with fewer than two stages."""
    stages = [] if run.convergence is None else run.convergence["stages"]
    changes = [(stage["images"], 100 * stage["changed"]) for stage in stages if stage["changed"] is not None]
    if run.convergence is None or not changes:
        return None
    settled = run.convergence["settled"]
    with canvas(2.8) as (figure, axes):
        axes.plot(*zip(*changes, strict=True), "o-", color=BLUE, markersize=5)
        axes.set_xscale("log", base=2)
        axes.set_xticks([images for images, _ in changes], [f"{images:,}" for images, _ in changes])
        axes.minorticks_off()
        axes.set_ylim(0, max(0.1, *(changed for _, changed in changes)) * 1.15)
        if settled is not None:
            axes.axvline(settled, color=GREEN, linestyle="--", linewidth=1.2)
            axes.annotate(
                "settled", (settled, 1), (-4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
                color=GREEN, fontsize=9, rotation=90, ha="right", va="top",
            )  # fmt: skip
        axes.set_xlabel("calibration images")
        axes.set_ylabel("channels that changed (%)")
        svg, png = render(figure)
    said = "The plan did not settle." if settled is None else f"The plan settled at {settled:,} images."
    return Drawing(
        "convergence",
        "How the plan settled",
        "Share of all channels that the plan kept with half the images, and did not keep any more with this many. "
        "Where it is small, more calibration images would change little.",
        f"{said} The last doubling, to {changes[-1][0]:,} images, changed {changes[-1][1]:.2f} % of the channels.",
        ("Images", "Channels that changed (%)"),
        tuple((f"{images:,}", f"{changed:.2f}") for images, changed in changes),
        svg,
        png,
    )
