"""The variance spectrum of each site with the cut: a panel a site, from one to some hundred."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection

from vbp.drawing import BLUE, GREY, INK, ORANGE, Drawing, canvas, render
from vbp.run_folder import RunFolder
from vbp.spectra import Spectrum, short_names, spectra

# Drawn over as many decades as the largest values need; what lies below is drawn at the bottom.
_DECADES: Final = 8
_GAP: Final = (0.12, 0.55)


def variance_spectra(run: RunFolder) -> Drawing | None:
    """Draw the spectrum of each site with the cut; None without plan or statistics."""
    found = spectra(run)
    if not found:
        return None
    columns = _columns(found)
    rows = -(-len(found) // columns)
    top = max(float(spectrum.scores[0]) for spectrum in found)
    high = np.ceil(np.log10(top)) if top > 0 else 0.0
    smallest = min((float(s.scores[s.scores > 0].min()) for s in found if (s.scores > 0).any()), default=1.0)
    low = max(float(np.floor(np.log10(smallest))), high - _DECADES, -300.0)
    low = min(low, high - 1)
    with canvas(0.7 + rows * (1.35 if columns < 3 else 1.05 if columns == 3 else 0.92)) as (figure, axes):
        _panels(axes, found, columns, low, high)
        figure.legend(loc="outside upper center", ncols=3)
        svg, png = render(figure)
    query_key = any(entry.site.kind == "query_key" for entry in (run.plan.sites if run.plan else ()))
    return Drawing(
        "spectrum",
        "Variance spectrum of each site",
        "Channels of a site from the largest variance to the smallest (logarithmic, the same scale in all panels); "
        "the line is the cut. Where the ranking is not by variance alone, both colours lie on both sides of it."
        + (" Query/key channels show the product of their mean squares instead." if query_key else ""),
        f"Spectra of {len(found)} sites, from {10**low:.0e} to {10**high:.0e}; each falls from left to right, and "
        "what lies right of its cut was removed.",
        ("Site", "Channels", "Kept", "Largest", "Median", "Smallest", "Smallest kept", "Largest removed"),
        tuple(_spectrum_row(spectrum) for spectrum in found),
        svg,
        png,
        wide=True,
    )


def _spectrum_row(spectrum: Spectrum) -> tuple[str, ...]:
    scores, kept = spectrum.scores, spectrum.kept
    removed = scores[~kept]
    numbers = (scores[0], np.median(scores), scores[-1], scores[kept].min())
    texts = [f"{number:.3g}" for number in numbers] + ["" if len(removed) == 0 else f"{removed.max():.3g}"]
    return (spectrum.site, str(len(scores)), str(int(kept.sum())), *texts)


def _panels(axes: Axes, found: tuple[Spectrum, ...], columns: int, low: float, high: float) -> None:
    """Draw all spectra into one pair of axes: hundreds of axes would take half a minute."""
    pattern, labels = short_names([spectrum.site for spectrum in found])
    samples = int(np.clip(3000 / len(found), 24, 120))
    areas: dict[bool, list[npt.NDArray[np.float64]]] = {True: [], False: []}
    cuts, floors = [], []
    size = 8.5 if columns < 3 else 7.5
    for index, (spectrum, label) in enumerate(zip(found, labels, strict=True)):
        left = (index % columns) * (1 + _GAP[0])
        bottom = -(index // columns) * (1 + _GAP[1])
        for kept, area in _areas(spectrum, samples, low, high):
            areas[kept].append(area + np.array([left, bottom]))
        cut = left + spectrum.kept.mean()
        cuts.append([(cut, bottom), (cut, bottom + 1)])
        floors.append([(left, bottom), (left + 1, bottom)])
        axes.text(left, bottom + 1.06, f"{label}: {spectrum.kept.mean():.0%} kept", fontsize=size, va="bottom")
        if index % columns == 0:
            for place, exponent in ((0, low), (1, high)):
                axes.text(left - 0.03, bottom + place, _power(exponent), fontsize=7, ha="right", va="center")
    for kept, colour, label in ((True, BLUE, "kept"), (False, ORANGE, "removed")):
        axes.add_collection(PolyCollection(areas[kept], facecolor=colour, edgecolor="none", label=label))
    axes.add_collection(LineCollection(cuts, color=INK, linewidth=1, label="cut"))
    axes.add_collection(LineCollection(floors, color=GREY, linewidth=0.7))
    rows = -(-len(found) // columns)
    axes.set_xlim(-0.02, columns * (1 + _GAP[0]) - _GAP[0] + 0.02)
    axes.set_ylim(-(rows - 1) * (1 + _GAP[1]) - 0.05, 1.4)
    axes.set_axis_off()
    axes.set_title(f"sites {pattern}" if pattern else "", fontsize=9, loc="left")


def _areas(spectrum: Spectrum, samples: int, low: float, high: float) -> list[tuple[bool, npt.NDArray[np.float64]]]:
    """Give the filled pieces below a spectrum in a unit square, one for each run of kept or of removed channels."""
    channels = len(spectrum.scores)
    # All channels where there are few; the cut is at its place in any case, for it is an edge.
    edges = np.unique(np.linspace(0, channels, min(samples, channels) + 1).round().astype(int))
    cut = int(spectrum.kept.sum())
    edges = np.unique(np.append(edges, cut))
    starts, widths = edges[:-1], np.diff(edges)
    scores = np.clip(np.log10(np.maximum(spectrum.scores, 1e-300)), low, high)
    heights = np.add.reduceat(scores, starts) / widths
    kept = np.add.reduceat(spectrum.kept.astype(float), starts) / widths >= 0.5
    heights = np.maximum((heights - low) / (high - low), 0.004)
    pieces = []
    bounds = np.flatnonzero(np.diff(kept)) + 1
    for first, last in zip([0, *bounds], [*bounds, len(kept)], strict=True):
        x = np.repeat(edges[first : last + 1], 2)[1:-1] / channels
        y = np.repeat(heights[first:last], 2)
        outline = np.column_stack([np.concatenate([x[:1], x, x[-1:]]), np.concatenate([[0.0], y, [0.0]])])
        pieces.append((bool(kept[first]), outline))
    return pieces


def _columns(found: tuple[Spectrum, ...]) -> int:
    if len(found) <= 4:
        return min(2, len(found))
    # Long names need room beside each other.
    longest = max(len(label) for label in short_names([spectrum.site for spectrum in found])[1])
    return 2 if longest > 14 else 3 if longest > 6 or len(found) <= 12 else 4


def _power(exponent: float) -> str:
    return "1" if exponent == 0 else f"1e{exponent:.0f}"
