"""Figures with a bar for each site: readable from one site to some hundred."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from vbp.drawing import BLUE, FAINT, ORANGE, Drawing, canvas, render
from vbp.run_folder import RunFolder
from vbp.run_summary import RunSummary
from vbp.spectra import short_names, site_errors


def kept_channels(run: RunSummary) -> Drawing | None:
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
        svg, png = render(figure)
    least, most = min(sites, key=lambda site: site[1] / site[2]), max(sites, key=lambda site: site[1] / site[2])
    return Drawing(
        "kept_channels",
        "Kept channels",
        "Each bar is a site as wide as in the dense model; the dark part stays.",
        f"{len(sites)} sites. {least[0]} keeps least, {least[1]} of {least[2]} channels; {most[0]} keeps most, "
        f"{most[1]} of {most[2]}.",
        ("Site", "Kept", "Of", "Share"),
        tuple((name, str(kept), str(total), f"{kept / total:.1%}") for name, kept, total in sites),
        svg,
        png,
    )


def reconstruction_errors(run: RunFolder) -> Drawing | None:
    """Draw the error that is left at each site; None where nothing tells it."""
    found = site_errors(run)
    if found is None:
        return None
    errors = found.errors
    compensated = run.summary.config["compensation"] != "none" or found.at == "output"
    before = "mean shift" if compensated else "no compensation"
    refit = any(error.refit is not None for error in errors)
    with canvas(_height(len(errors))) as (figure, axes):
        places = np.arange(len(errors))
        axes.barh(places, [100 * error.before for error in errors], color=ORANGE, height=0.72, label=before)
        if refit:
            axes.barh(
                places, [100 * (error.refit or 0.0) for error in errors], color=BLUE, height=0.36, label="refit"
            )
        _site_axis(axes, [error.site for error in errors])
        axes.set_xlim(0, max(1e-3, *(100 * error.before for error in errors)) * 1.05)
        axes.set_xlabel("squared error (% of the variance)")
        figure.legend(loc="outside upper center", ncols=2)
        svg, png = render(figure)
    worst = max(errors, key=lambda error: error.before if error.refit is None else error.refit)
    caption = (
        "Variance of the error at the output of the layer that reads the channels, as a share of that output's own "
        "variance, before fine-tuning."
        if found.at == "output"
        else "Mean squared error of the hidden channels that were removed, as a share of the variance of all "
        "channels of the site, before fine-tuning. It comes from the statistics; what the next layer makes of "
        "it may differ."
    )
    return Drawing(
        "reconstruction",
        "Reconstruction error",
        caption,
        f"The largest error is left at {worst.site}: "
        f"{100 * (worst.before if worst.refit is None else worst.refit):.1f} % of the variance.",
        ("Site", f"Error with {before} (%)", *(("Error with refit (%)",) if refit else ())),
        tuple(
            (
                error.site,
                f"{100 * error.before:.2f}",
                *(("" if error.refit is None else f"{100 * error.refit:.2f}",) if refit else ()),
            )
            for error in errors
        ),
        svg,
        png,
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
