"""What each refit after surgery gained: an error or a divergence before and after, as rows of text."""

from __future__ import annotations

import math
from typing import Final

from vbp.report.run_report import RunReport

COLUMNS: Final = ("Refitted", "Measured", "Before", "After", "Change")
_OUTPUTS: Final = "error of the MLPs' outputs, share of their variance"
_DIVERGENCE: Final = "KL divergence of the predictions from the dense model's, nats"


def refit_rows(run: RunReport) -> tuple[tuple[str, ...], ...]:
    """Return a row for each refit that was measured, in the order in which they are done."""
    rows = []
    if run.reconstruction:
        energy = [one["energy"] or math.inf for one in run.reconstruction.values()]
        before, after = (
            sum(one[name] / whole for one, whole in zip(run.reconstruction.values(), energy, strict=True))
            for name in ("mean_shift", "refit")
        )
        rows.append(_row("layers that read the channels", _OUTPUTS, before / len(energy), after / len(energy)))
    if run.batchnorm and "keep" in run.batchnorm["divergences"]:
        tried = run.batchnorm["divergences"]
        rows.append(_row("BatchNorms", _DIVERGENCE, tried["keep"], tried[run.batchnorm["chosen"]]))
    if run.kernels:
        rows.append(_row("larger kernels", _DIVERGENCE, run.kernels["before"], run.kernels["after"]))
    if run.producers and run.producers["errors"]:
        errors = run.producers["errors"].values()
        before, after = (sum(both[place] for both in errors) / len(errors) for place in range(2))
        rows.append(_row("layers that make the channels", f"{_OUTPUTS}, weighted by their effect", before, after))
    rows += [
        _row(name, _DIVERGENCE, refit["before"], refit["after"])
        for name, refit in (("residual stream", run.stream), ("last layer", run.head))
        if refit
    ]
    return tuple(rows)


def _row(name: str, measured: str, before: float, after: float) -> tuple[str, ...]:
    change = f"{100 * (after / before - 1):+.1f} %" if before else ""
    return (name, measured, f"{before:.4f}", f"{after:.4f}", change)
