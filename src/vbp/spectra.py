"""What pruning took from each site: the spectrum of its scores, and the error that is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from vbp.ranking import variance_scores
from vbp.run_folder import RunFolder


@dataclass(frozen=True)
class Spectrum:
    """The channels of one site from the largest variance to the smallest.

    Attributes:
        site: Name of the site.
        scores: Variances, descending; of query/key channels the product of their mean squares, as in the ranking.
        kept: Whether each of them stays.
    """

    site: str
    scores: npt.NDArray[np.float64]
    kept: npt.NDArray[np.bool_]


def spectra(run: RunFolder) -> tuple[Spectrum, ...]:
    """Give the spectrum of each site in the order of the plan; none without plan or statistics."""
    if run.plan is None or run.statistics is None:
        return ()
    scores = variance_scores(run.statistics)
    found = []
    for entry in run.plan.sites:
        values = scores[entry.site.name].double().cpu().numpy()
        kept = np.zeros(entry.site.hidden, dtype=bool)
        kept[list(entry.keep)] = True
        order = np.argsort(-values, kind="stable")
        found.append(Spectrum(entry.site.name, values[order], kept[order]))
    return tuple(found)


@dataclass(frozen=True)
class SiteError:
    """What a site lacks after pruning: squared error as a share of the variance that there was.

    Attributes:
        site: Name of the site.
        before: Without refit: with the mean shift or, in a run without compensation, with nothing.
        refit: With refit, where the run did one.
    """

    site: str
    before: float
    refit: float | None = None


@dataclass(frozen=True)
class SiteErrors:
    """The errors of all sites.

    Attributes:
        at: Where they were taken: at the `output` of the layer that reads the channels, as the run measured them, or
            on the `hidden` channels themselves, as their means and variances give it.
        errors: One a site.
    """

    at: Literal["output", "hidden"]
    errors: tuple[SiteError, ...]


def site_errors(run: RunFolder) -> SiteErrors | None:
    """Give the reconstruction error of each site; None where neither the summary nor statistics tell it."""
    measured = run.summary.reconstruction
    if measured is not None:
        return SiteErrors("output", tuple(_measured(site, found) for site, found in measured.items()))
    if run.plan is None or run.statistics is None:
        return None
    compensated = run.summary.config["compensation"] != "none"
    found = []
    for entry in run.plan.sites:
        moments = run.statistics.moments.get(entry.site.name)
        if moments is None:
            continue  # query/key channels are read by no layer
        variance = moments.m2 / moments.count
        lost = variance if compensated else moments.second_moment
        error = _share(float(lost[list(entry.removed)].sum()), float(variance.sum()))
        found.append(SiteError(entry.site.name, error))
    return SiteErrors("hidden", tuple(found)) if found else None


def _measured(site: str, found: Mapping[str, float]) -> SiteError:
    refit = found.get("refit")
    energy = found["energy"]
    return SiteError(site, _share(found["mean_shift"], energy), None if refit is None else _share(refit, energy))


def _share(part: float, whole: float) -> float:
    # A site whose channels are all constant has nothing to lose.
    return part / whole if whole > 0 else 0.0


def short_names(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Give what tells names apart, and the pattern that they share, for axes with little room.

    Returns:
        The pattern, `*` where names differ (empty if they share none), and a short name for each.
    """
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
