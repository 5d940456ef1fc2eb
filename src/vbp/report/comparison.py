"""Runs side by side: what was asked of them, and what they reached."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vbp.deploy.artifact_files import MANIFEST
from vbp.errors import InputError
from vbp.report.run_report import SUMMARY, RunReport, setting_text
from vbp.runtime.choices import TableForm as Form
from vbp.runtime.decode import to_json
from vbp.runtime.tables import format_count, markdown_table, text_table

_MODELS: Final = {
    "base": "top-1 dense",
    "uncompensated": "top-1 pruned, no compensation",
    "pruned": "top-1 pruned",
    "tuned": "top-1 tuned without labels",
    "best": "top-1 best",
    "final": "top-1 final",
}

_GAP, _LONGEST = 2, 32


@dataclass(frozen=True)
class RunComparison:
    """Runs side by side: a short name, different for each, the folder and the report of each.

    The `incidental` settings are about how a run was started; they are no reason for other results.
    """

    names: tuple[str, ...]
    folders: tuple[Path, ...]
    runs: tuple[RunReport, ...]
    incidental: frozenset[str]
    form: Form = "table"

    @property
    def settings(self) -> dict[str, tuple[Any, ...]]:
        """Return the settings that differ: name -> the value of each run, None where a run has no such setting."""
        names = dict.fromkeys(name for run in self.runs for name in run.config if name not in self.incidental)
        values = {name: tuple(run.config.get(name) for run in self.runs) for name in names}
        return {name: own for name, own in values.items() if any(value != own[0] for value in own)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data: settings by run name, and the figures of each run."""
        return {
            "settings": {name: dict(zip(self.names, values, strict=True)) for name, values in self.settings.items()},
            "runs": {
                name: {"folder": str(folder), **_figures(run)}
                for name, folder, run in zip(self.names, self.folders, self.runs, strict=True)
            },
        }

    def table(self, width: int = 120) -> str:
        """Return a table for the terminal, a column for each run; in another form a row for each.

        Runs that do not fit into lines of `width` characters stand in another table below, at least one in each.
        """
        rows = [("", *self.names), *self._rows()]
        if self.form != "table":
            heading, *runs = zip(*rows, strict=True)
            heading = ("run", *heading[1:])
            return _csv([heading, *runs]) if self.form == "csv" else markdown_table(heading, runs).rstrip("\n")
        sizes = [max(len(row[column]) for row in rows) for column in range(len(self.names) + 1)]
        blocks: list[list[int]] = []
        for column in range(1, len(sizes)):
            used = sizes[0] + sum(_GAP + sizes[other] for other in (blocks[-1] if blocks else ()))
            if not blocks or used + _GAP + sizes[column] > width:
                blocks.append([])
            blocks[-1].append(column)
        return "\n\n".join(
            text_table([[row[0], *(row[column] for column in block)] for row in rows]) for block in blocks
        )

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [(name, *map(_text, values)) for name, values in self.settings.items()]
        columns = [_cells(run) for run in self.runs]
        stages = dict.fromkeys(stage for run in self.runs for stage in run.seconds)
        labels = [*_MODELS.values(), "MACs", "parameters", "latency", "measured with", "speed-up (quartiles)"]
        labels = ["hidden channels kept", *labels, *(f"seconds, {stage}" for stage in stages), "seconds"]
        # No row that would be empty.
        labels = [label for label in labels if any(label in cells for cells in columns)]
        return rows + [(label, *(cells.get(label, "") for cells in columns)) for label in labels]


def compare(folders: Sequence[Path], *, incidental: Collection[str], form: Form = "table") -> RunComparison:
    """Read runs to compare them, each from its `save_dir` or from the folder of the pruned model in it.

    The `incidental` settings are not shown: they are about how a run was started.

    Raises:
        InputError: There are fewer than two, one is given twice, or one is no finished run.
    """
    if len(folders) < 2:
        raise InputError(f"a comparison needs at least two runs, got {len(folders)}; give their folders")
    folders = [_run_of(folder) for folder in folders]
    places = [folder.resolve() for folder in folders]
    for place, folder in zip(places, folders, strict=True):
        if places.count(place) > 1:
            raise InputError(f"runs to compare must differ, got {folder} more than once; name each once")
    runs = tuple(RunReport.read(folder) for folder in folders)
    return RunComparison(_short(places), tuple(folders), runs, frozenset(incidental), form)


def _csv(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n")


def _run_of(folder: Path) -> Path:
    """Return the run whose pruned model this is; the folder itself if it is none."""
    run = folder.resolve().parent
    inside = (folder / MANIFEST).is_file() and not (folder / SUMMARY).is_file() and (run / SUMMARY).is_file()
    return run if inside else folder


def _short(places: Sequence[Path]) -> tuple[str, ...]:
    """Return the last parts of each path, as many as tell them apart."""
    for count in range(1, max(len(place.parts) for place in places) + 1):
        names = tuple("/".join(place.parts[-count:]) for place in places)
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different parts")


def _figures(run: RunReport) -> dict[str, Any]:
    base, pruned = run.base, run.pruned
    return {
        "keep_ratio": run.keep_ratio,
        "top1": {name: model.top1 for name, model in run.models.items()},
        "top5": {name: model.top5 for name, model in run.models.items()},
        "top1_error": {name: model.top1_error for name, model in run.models.items()},
        "top5_error": {name: model.top5_error for name, model in run.models.items()},
        "macs": {"base": base.macs, "pruned": pruned.macs},
        "params": {"base": base.params, "pruned": pruned.params},
        "latency": to_json(run.latency),
        "device": run.device,
        "processes": run.processes,
        "images": dict(run.images),
        "seconds": dict(run.seconds),
    }


def _text(value: Any) -> str:
    text = setting_text(value)
    # The end of a long path is the part that differs; the JSON has it whole.
    return text if len(text) <= _LONGEST else "…" + text[1 - _LONGEST :]


def _cells(run: RunReport) -> dict[str, str]:
    """Return the cells of a run, by the labels of their rows."""
    base, pruned = run.base, run.pruned
    cells = {"hidden channels kept": f"{run.keep_ratio:.1%}", "seconds": f"{sum(run.seconds.values()):.1f}"}
    cells |= {label: f"{run.models[name].top1_text} %" for name, label in _MODELS.items() if name in run.models}
    for label, before, after in (("MACs", base.macs, pruned.macs), ("parameters", base.params, pruned.params)):
        saved = f" (-{1 - after / before:.1%})" if before else ""
        cells[label] = f"{format_count(before)} -> {format_count(after)}{saved}"
    if run.latency is not None:
        cells["latency"] = run.latency.latency_text
        cells["measured with"] = run.latency.conditions
        cells["speed-up (quartiles)"] = run.latency.speedup_text
    return cells | {f"seconds, {stage}": f"{seconds:.1f}" for stage, seconds in run.seconds.items()}
