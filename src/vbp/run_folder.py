"""Read the folder that a run left behind into plain data, for reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbp.errors import InputError
from vbp.plan import PruningPlan
from vbp.run_summary import SUMMARY, RunSummary, count, read_summary
from vbp.statistics import Statistics

METRICS, PLAN, STATISTICS = "metrics.jsonl", "plan.json", "statistics.safetensors"
_CURVES = ("top1", "top5", "train_loss", "train_top1", "lr", "seconds")


@dataclass(frozen=True)
class RunFolder:
    """A run whole: the summary and, where the folder still has them, curves, plan and statistics."""

    summary: RunSummary
    epochs: tuple[Mapping[str, Any], ...]
    plan: PruningPlan | None
    statistics: Statistics | None


def read_run(folder: Path) -> RunFolder:
    """Read a finished run.

    Raises:
        InputError: It is no run, a file of it is damaged, or its files come from different runs.
    """
    summary = read_summary(folder)
    plan = PruningPlan.load(folder / PLAN) if (folder / PLAN).is_file() else None
    statistics = Statistics.load(folder / STATISTICS) if (folder / STATISTICS).is_file() else None
    if plan is not None:
        if plan.widths != summary.sites:
            raise InputError(
                f"{folder / PLAN} and {SUMMARY} must come from one run, got other channels; run it again"
            )
        if statistics is not None:
            statistics.check_holds([entry.site for entry in plan.sites], folder / STATISTICS)
    return RunFolder(summary, _read_epochs(folder / METRICS), plan, statistics)


def _read_epochs(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        # A loss may be NaN where training went wrong; that is worth a report too.
        return tuple(
            {name: float(row[name]) for name in _CURVES if name in row} | {"epoch": count(row["epoch"])}
            for row in rows
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no readable table of epochs ({error!r}); run it again") from error
