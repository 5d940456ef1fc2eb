"""The variance spectrum of each site with the cut, and the error that is left: as data and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection

from vbp.pruning.criteria import variance_scores
from vbp.report.finished_run import FinishedRun
from vbp.report.style import BLUE, GREY, INK, ORANGE, Drawing, canvas, render


@dataclass(frozen=True)
class Spectrum:
    """The channels of one site from the largest variance to the smallest, and whether each is kept.

    Scores are variances; of query/key channels the product of their mean squares, as in the ranking.
    """

    site: str
    scores: npt.NDArray[np.float64]
    kept: npt.NDArray[np.bool_]

    @property
    def cut(self) -> bool:
        """Return whether a cut separates what is kept from what is removed: whether the ranking is by variance."""
        return bool(self.kept[: self.kept.sum()].all())


def spectra(run: FinishedRun) -> tuple[Spectrum, ...]:
    """Return the spectrum of each site in the order of the plan; none without plan or statistics.

    What is cut in its principal basis is left out: directions went, no channels.
    """
    if run.plan is None or run.statistics is None:
        return ()
    scores = variance_scores(run.statistics)
    spectra_of_sites = []
    for entry in run.plan.sites:
        if entry.basis == "principal":
            continue
        values = scores[entry.site.name].double().cpu().numpy()
        kept = np.zeros(entry.site.hidden, dtype=bool)
        kept[list(entry.keep)] = True
        order = np.lexsort((~kept, -values))  # of equal ones those that are kept come first
        spectra_of_sites.append(Spectrum(entry.site.name, values[order], kept[order]))
    return tuple(spectra_of_sites)


@dataclass(frozen=True)
class SiteError:
    """The squared errors of a site after pruning without and with refit, as shares of the variance that there was."""

    site: str
    before: float
    refit: float | None = None

    @property
    def left(self) -> float:
        """Return the error that is left."""
        return self.before if self.refit is None else self.refit


@dataclass(frozen=True)
class SiteErrors:
    """The errors of all sites: measured at the readers' `output`, or computed for the `hidden` channels."""

    at: Literal["output", "hidden"]
    errors: tuple[SiteError, ...]


def site_errors(run: FinishedRun) -> SiteErrors | None:
    """Return the reconstruction error of each site; None where neither the summary nor statistics have it."""
    measured = run.report.reconstruction
    if measured:
        errors = (
            SiteError(site, _share(one["mean_shift"], one["energy"]), _share(one["refit"], one["energy"]))
            for site, one in measured.items()
        )
        return SiteErrors("output", tuple(errors))
    if run.plan is None or run.statistics is None:
        return None
    compensated = run.report.config["compensation"] != "none"
    hidden_errors = []
    for entry in run.plan.sites:
        moments = run.statistics.moments.get(entry.site.name)
        if moments is None:
            continue  # query/key channels are read by no layer
        variance = moments.m2 / moments.count
        lost = variance if compensated else moments.second_moment
        error = _share(float(lost[list(entry.removed)].sum()), float(variance.sum()))
        hidden_errors.append(SiteError(entry.site.name, error))
    return SiteErrors("hidden", tuple(hidden_errors)) if hidden_errors else None


def _share(part: float, whole: float) -> float:
    # A site whose channels are all constant has nothing to lose.
    return part / whole if whole > 0 else 0.0


def short_names(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the pattern that names share, `*` where they differ (empty if they share none), and the rest of each."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2 or len({len(part) for part in parts}) > 1:
        return "", tuple(names)
    columns = list(zip(*parts, strict=True))
    varies = [len(set(column)) > 1 for column in columns]
    if all(varies):
        return "", tuple(names)
    pattern = ".".join("*" if differs else column[0] for differs, column in zip(varies, columns, strict=True))
    short = tuple(".".join(word for word, differs in zip(part, varies, strict=True) if differs) for part in parts)
    return pattern, short


# Drawn over as many decades as the largest values need; what lies below is drawn at the bottom.
_DECADES: Final = 8
_GAP: Final = (0.14, 0.5)
_WIDTH: Final = 9.6

# What is said of the cut, by whether all panels have one, and whether any has.
_CUT: Final = {
    (True, True): "The line is the cut: what lies right of it was removed.",
    (False, True): "The line is the cut; a panel without one is not ranked by variance alone, and both colours mix.",
    (False, False): "The ranking is not by variance alone, so there is no cut, and both colours mix.",
}


def variance_spectra(run: FinishedRun) -> Drawing | None:
    """Draw the spectrum of each site with the cut; None without plan or statistics."""
    all_spectra = spectra(run)
    if not all_spectra:
        return None
    columns = _columns(all_spectra)
    rows, cuts = -(-len(all_spectra) // columns), [spectrum.cut for spectrum in all_spectra]
    top = max(float(spectrum.scores[0]) for spectrum in all_spectra)
    high = np.ceil(np.log10(top)) if top > 0 else 0.0
    smallest = min((float(s.scores[s.scores > 0].min()) for s in all_spectra if (s.scores > 0).any()), default=1.0)
    low = max(float(np.floor(np.log10(smallest))), high - _DECADES, -300.0)
    low = min(low, high - 1)
    # The height of a panel is about half of its width.
    with canvas(0.9 + rows * (4.6 / columns + 0.35), width=_WIDTH) as (figure, axes):
        _panels(axes, all_spectra, columns, low, high)
        figure.legend(loc="outside upper center", ncols=3)
        figure.supxlabel("channels of a site, the largest variance first", fontsize=9.5)
        figure.supylabel("variance", fontsize=9.5)
    entries = run.plan.sites if run.plan else ()
    query_key = any(entry.site.kind == "query_key" and entry.basis == "channels" for entry in entries)
    principal = any(entry.basis == "principal" for entry in entries)
    return Drawing(
        "spectrum",
        "Variance spectrum of each site",
        "Channels of a site from the largest variance to the smallest (logarithmic, the same scale in all panels). "
        + _CUT[all(cuts), any(cuts)]
        + (" Query/key channels show the product of their mean squares instead." if query_key else "")
        + (" Attention is not shown: it is cut in its principal basis, by directions." if principal else ""),
        f"Spectra of {len(all_spectra)} sites, from {10**low:.0e} to {10**high:.0e}; each falls from left to right. "
        + _CUT[all(cuts), any(cuts)],
        ("Site", "Channels", "Kept", "Largest", "Median", "Smallest", "Smallest kept", "Largest removed"),
        tuple(_spectrum_row(spectrum) for spectrum in all_spectra),
        *render(figure, "spectrum"),
        wide=True,
    )


def _spectrum_row(spectrum: Spectrum) -> tuple[str, ...]:
    scores, kept = spectrum.scores, spectrum.kept
    removed = scores[~kept]
    numbers = (scores[0], np.median(scores), scores[-1], scores[kept].min())
    texts = [f"{number:.3g}" for number in numbers] + ["" if len(removed) == 0 else f"{removed.max():.3g}"]
    return (spectrum.site, str(len(scores)), str(int(kept.sum())), *texts)


def _panels(axes: Axes, all_spectra: tuple[Spectrum, ...], columns: int, low: float, high: float) -> None:
    """Draw all spectra into one pair of axes: hundreds of axes would take half a minute."""
    pattern, labels = short_names([spectrum.site for spectrum in all_spectra])
    samples = int(np.clip(3000 / len(all_spectra), 24, 120))
    areas: dict[bool, list[npt.NDArray[np.float64]]] = {True: [], False: []}
    cuts, floors = [], []
    size = 8.5
    for index, (spectrum, label) in enumerate(zip(all_spectra, labels, strict=True)):
        left = (index % columns) * (1 + _GAP[0])
        bottom = -(index // columns) * (1 + _GAP[1])
        for kept, area in outlines(spectrum, samples, low, high):
            areas[kept].append(area + np.array([left, bottom]))
        if spectrum.cut:
            cut = left + spectrum.kept.mean()
            cuts.append([(cut, bottom), (cut, bottom + 1)])
        floors.append([(left, bottom), (left + 1, bottom)])
        axes.text(left, bottom + 1.06, f"{label}: {spectrum.kept.mean():.0%} kept", fontsize=size, va="bottom")
        if index % columns == 0:
            for place, exponent in ((0, low), (1, high)):
                axes.text(left - 0.03, bottom + place, _power(exponent), fontsize=7, ha="right", va="center")
    for kept, colour, label in ((True, BLUE, "kept"), (False, ORANGE, "removed")):
        axes.add_collection(PolyCollection(areas[kept], facecolor=colour, edgecolor="none", label=label))
    if cuts:
        axes.add_collection(LineCollection(cuts, color=INK, linewidth=1, label="cut"))
    axes.add_collection(LineCollection(floors, color=GREY, linewidth=0.7))
    rows = -(-len(all_spectra) // columns)
    axes.set_xlim(-0.02, columns * (1 + _GAP[0]) - _GAP[0] + 0.02)
    axes.set_ylim(-(rows - 1) * (1 + _GAP[1]) - 0.05, 1.4)
    axes.set_axis_off()
    axes.set_title(f"sites {pattern}" if pattern else "", fontsize=9, loc="left")


def outlines(spectrum: Spectrum, samples: int, low: float, high: float) -> list[tuple[bool, npt.NDArray[np.float64]]]:
    """Return the filled pieces below a spectrum in a unit square, one for each run of kept or of removed channels."""
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


def _columns(all_spectra: tuple[Spectrum, ...]) -> int:
    # Long names need room beside each other.
    longest = max(len(label) for label in short_names([spectrum.site for spectrum in all_spectra])[1])
    most = 3 if longest > 14 else 4 if longest > 6 or len(all_spectra) <= 12 else 6
    return max(2, min(most, len(all_spectra)))


def _power(exponent: float) -> str:
    return "1" if exponent == 0 else f"1e{exponent:.0f}"
