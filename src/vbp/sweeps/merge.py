"""Merge what the points of a sweep have left in its folder: table, figures and page of all, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vbp.errors import InputError
from vbp.recipes.folder import BEGUN
from vbp.report.published import points_of
from vbp.runtime.files import folder_lock, text_bytes, write_bytes
from vbp.sweeps.config import MergeConfig
from vbp.sweeps.figures import FIGURES, draw
from vbp.sweeps.page import PAGE, page
from vbp.sweeps.report import SweepReport
from vbp.sweeps.state import CSV, JSON, read_rows, read_state, shared_state, write_state

# What is written from the rows.
RESULTS: Final = (CSV, PAGE, *(f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")))


def merged(folder: Path) -> SweepReport:
    """Return what is measured and what is missing of the sweep in a folder.

    Raises:
        InputError: There is none, or a file of it is damaged.
    """
    if not (folder / JSON).is_file():
        ended = ", but one that ended while it replaced other results" if (folder / BEGUN).is_file() else ""
        raise InputError(
            f"{folder} must be the save_dir of a sweep, got none{ended}; begin it by vbp sweep --save_dir"
        )
    state = read_state(folder / JSON)
    return state.report(read_rows(folder, state))


def write_results(folder: Path) -> SweepReport:
    """Merge, and write `sweep.json`, the table as CSV, the figures and the page.

    Raises:
        InputError: As `merged`.
        OutputError: A file could not be written.
    """
    with shared_state(folder):
        report = merged(folder)
        state = read_state(folder / JSON)
        write_state(folder, state, {row.point: row for row in report.rows})
    write_bytes(folder / CSV, text_bytes(report.csv()))
    drawings = draw(report, points_of(str(report.about.get("model_name", ""))))
    for drawing in drawings.values():
        write_bytes(folder / f"{drawing.name}.svg", drawing.svg)
        write_bytes(folder / f"{drawing.name}.png", drawing.png)
    write_bytes(folder / PAGE, text_bytes(page(report, state.settings, drawings)))
    return report


def run_merge(config: MergeConfig) -> SweepReport:
    """Merge the points in the folder of a sweep, while other points may still be measured."""
    if not config.folder.is_dir():
        raise InputError(f"{config.folder} must be the save_dir of a sweep, got no folder; check the path")
    with folder_lock(config.folder, shared=True):
        return write_results(config.folder)
