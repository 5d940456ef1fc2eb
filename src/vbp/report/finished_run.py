"""Read a finished run: its report, and what its folder still has beside it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vbp.errors import InputError
from vbp.pruning.plan import PruningPlan
from vbp.report.run_report import METRICS, PLAN, STATISTICS, SUMMARY, RunReport
from vbp.runtime.decode import read_json_lines
from vbp.runtime.files import is_regular
from vbp.statistics.statistics import Statistics

_CURVES: Final = ("top1", "top5", "cosine", "neighbours", "train_loss", "train_top1", "lr", "seconds")


@dataclass(frozen=True)
class FinishedRun:
    """The report of a run and, where its folder still has them, the curves, the plan and the statistics."""

    report: RunReport
    epochs: tuple[Mapping[str, Any], ...]
    plan: PruningPlan | None
    statistics: Statistics | None


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        InputError: It is no run, a file of it is damaged, or its files come from different runs.
    """
    report = RunReport.read(folder)
    plan = PruningPlan.load(folder / PLAN) if (folder / PLAN).is_file() else None
    statistics = Statistics.load(folder / STATISTICS) if (folder / STATISTICS).is_file() else None
    if plan is not None:
        if plan.widths != report.sites:
            raise InputError(
                f"{folder / PLAN} and {SUMMARY} must come from one run, got other channels; run it again"
            )
        if statistics is not None:
            statistics.check_holds([entry.site for entry in plan.sites], folder / STATISTICS)
    return FinishedRun(report, _read_epochs(folder / METRICS), plan, statistics)


def _read_epochs(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not is_regular(path):
        return ()
    try:
        rows = [row for _, rows in read_json_lines(path) for row in rows]
        # A loss may be NaN where training went wrong; that is worth a report too.
        return tuple(
            {name: float(row[name]) for name in _CURVES if name in row} | {"epoch": operator.index(row["epoch"])}
            for row in rows
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{path} is no readable table of epochs ({error!r}); run it again") from error
