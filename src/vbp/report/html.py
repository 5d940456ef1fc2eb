"""The report of a run as one HTML file, its figures, and a table for a README."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from vbp.deploy.artifact_files import ARTIFACT
from vbp.errors import OutputError, printable
from vbp.report.figures import (
    accuracy_against_macs,
    accuracy_steps,
    cost_rows,
    kept_channels,
    latency_bars,
    plan_convergence,
    reconstruction_errors,
    training_curves,
)
from vbp.report.finished_run import FinishedRun, read_run
from vbp.report.refit_effect import COLUMNS, refit_rows
from vbp.report.run_report import BEST, FIGURES, FINAL, RunReport, setting_text
from vbp.report.spectrum import variance_spectra
from vbp.report.style import Drawing
from vbp.runtime.files import clear_folder, text_bytes, write_bytes
from vbp.runtime.tables import format_count, format_seconds, is_number, markdown_table

REPORT, MARKDOWN = "report.html", "report.md"

_SHORT_NAME: Final = 28

# For what to take each file with weights.
_TAKE: Final = {
    ARTIFACT: "To use or to publish: it is the best of all epochs on the validation images, epoch 0 (untuned) "
    "included. A folder of safetensors and JSON, with the preprocessing, and the class names where they are known.",
    BEST: "The same weights in one file.",
    FINAL: "To compare with published results: the last epoch was not chosen by the validation images.",
}

# Figures that a run may lack, all but the accuracy.
_MISSING: Final = {
    "accuracy_macs": "Accuracy against MACs: the published points are of ImageNet-1k, and need a dense model with "
    "some accuracy to compare with.",
    "latency": "Latency: it was not measured.",
    "training": "Fine-tuning: there were fewer than two epochs, too few for a curve.",
    "kept_channels": "Kept channels: the model has no sites.",
    "reconstruction": "Reconstruction error: it was not measured, and the folder holds no plan or no statistics.",
    "spectrum": "Variance spectrum: the folder holds no plan or no statistics.",
    "convergence": "Convergence of the plan: the statistics came from a file, or from too few images for a curve.",
}


def write_report(folder: Path) -> Path:
    """Write `report.html`, `report.md` and `figures/` into the `save_dir` of a finished run.

    Returns the path of the HTML file, which needs no other file.

    Raises:
        InputError: The folder is no finished run, or a file in it is damaged.
        OutputError: Something could not be written.
    """
    run = read_run(folder)
    drawings = draw(run)
    artefacts = _artefacts(folder)
    page = _page(run.report, drawings, artefacts)
    clear_report(folder)
    try:
        (folder / FIGURES).mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder / FIGURES} could not be made ({error}); choose another folder") from error
    for drawing in drawings.values():
        write_bytes(folder / FIGURES / f"{drawing.name}.svg", drawing.svg)
        write_bytes(folder / FIGURES / f"{drawing.name}.png", drawing.png)
    write_bytes(folder / MARKDOWN, text_bytes(summary_row(run.report) + _loading(run.report, artefacts)))
    write_bytes(folder / REPORT, text_bytes(page))
    return folder / REPORT


def clear_report(folder: Path) -> None:
    """Remove an earlier report, so that no figure of it is taken for one of this run.

    Raises:
        OutputError: A file of it could not be removed.
    """
    clear_folder(folder, (REPORT, MARKDOWN))
    clear_folder(
        folder / FIGURES, tuple(f"{name}.{kind}" for name in ("accuracy", *_MISSING) for kind in ("svg", "png"))
    )


def draw(run: FinishedRun) -> dict[str, Drawing]:
    """Draw all figures for which the run has numbers, by name."""
    drawings = (
        accuracy_steps(run.report),
        accuracy_against_macs(run.report),
        latency_bars(run.report),
        training_curves(run.report, run.epochs),
        kept_channels(run.report),
        reconstruction_errors(run),
        variance_spectra(run),
        plan_convergence(run.report),
    )
    return {drawing.name: drawing for drawing in drawings if drawing is not None}


def summary_row(run: RunReport) -> str:
    """Return the run as one row of a Markdown table, with its heading."""
    base, pruned = run.base, run.pruned
    timed = run.latency
    cells = {
        "Model": _model_name(run),
        "Kept": f"{run.keep_ratio:.1%}",
        **_quality_cells(run),
        "MACs": f"{format_count(base.macs)} → {format_count(pruned.macs)}",
        "Parameters": f"{format_count(base.params)} → {format_count(pruned.params)}",
        "Latency": "-" if timed is None else timed.latency_text.replace("->", "→"),
        "Speed-up (quartiles)": "-" if timed is None else f"{timed.speedup_text} at {timed.conditions}",
    }
    return markdown_table([*cells], [[*cells.values()]])


def _model_name(run: RunReport) -> str:
    return printable(str(run.config.get("model_name") or "model"))


def _page(run: RunReport, drawings: dict[str, Drawing], artefacts: list[tuple[str, str]]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    assets = files("vbp.report") / "assets"
    template = environment.from_string((assets / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        style=Markup((assets / "report.css").read_text(encoding="utf-8")),
        model=_model_name(run),
        run=run,
        keys=_key_figures(run),
        costs=cost_rows(run),
        drawings=drawings,
        inline={name: Markup(drawing.inline_svg) for name, drawing in drawings.items()},
        missing=_MISSING,
        candidates=[(one["name"], f"{one['divergence']:.4f}") for one in run.candidates],
        refits=refit_rows(run),
        refit_columns=COLUMNS,
        artefacts=artefacts,
        files=_files(run, [name for name, _ in artefacts]),
        markdown=summary_row(run),
        seconds=[(stage, format_seconds(seconds)) for stage, seconds in run.seconds.items()],
        changed=_settings(run, changed=True),
        unchanged=_settings(run, changed=False),
        numeric=_numeric,
        short_names=_short_names,
    )


def _numeric(rows: Iterable[Sequence[str]]) -> list[bool]:
    """Return for each column whether it holds numbers alone, which are aligned to the right."""
    columns = [[cell for cell in column if cell not in ("", "-")] for column in zip(*rows, strict=True)]
    return [bool(cells) and all(map(is_number, cells)) for cells in columns]


def _short_names(rows: Iterable[Sequence[str]]) -> bool:
    """Return whether names stay in one line; longer ones may break, so that no column is cut off in print."""
    return all(len(row[0]) <= _SHORT_NAME for row in rows)


def _settings(run: RunReport, *, changed: bool) -> list[tuple[str, str]]:
    """Return the settings that were changed from the defaults, or the others; where that is not known all are."""
    names = run.config if run.changed is None else run.changed
    return [(name, setting_text(value)) for name, value in run.config.items() if (name in names) == changed]


def _key_figures(run: RunReport) -> list[tuple[str, str, str]]:
    """Return the main results: label, number, remark."""
    keys = [
        *_preserved(run),
        ("Hidden channels kept", f"{run.keep_ratio:.1%}", f"in {len(run.sites)} sites"),
    ]
    for (label, before, after, saved), name in zip(cost_rows(run), ("MACs saved", "Parameters saved"), strict=True):
        keys.append((name, saved, f"{label}: {before} → {after}"))
    if run.latency is not None:
        spread = run.latency.speedup
        remarks = [f"quartiles {spread.low:.2f}x to {spread.high:.2f}x", run.latency.conditions, run.macs_text]
        keys.append(("Speed-up", f"{spread.median:.2f}x", "; ".join(filter(None, remarks))))
    processes = "one process" if run.processes == 1 else f"{run.processes} processes"
    return [*keys, ("Time", format_seconds(sum(run.seconds.values())), processes)]


def _preserved(run: RunReport) -> list[tuple[str, str, str]]:
    """Return what is left of the accuracy, or of the agreement with the dense model where there is none."""
    pruned, best = run.pruned, run.best
    if run.classifies:
        remark = f"dense {run.base.top1_text} %, right after pruning {pruned.top1_text} %"
        return [("Top-1 accuracy", f"{best.top1_text} %", remark)]
    before = dict(pruned.quality)
    names = {"cosine": "Cosine with the dense model", "neighbours %": "Nearest neighbours in common, %"}
    return [
        (names.get(name, "Predictions in common, %"), text, f"right after pruning {before[name]}")
        for name, text in best.quality
    ]


def _quality_cells(run: RunReport) -> dict[str, str]:
    base, pruned, best = run.base, run.pruned, run.best
    if run.classifies:
        tuned = best.top1_text if best.epoch else "-"
        return {"Top-1 dense": base.top1_text, "Pruned": pruned.top1_text, "Fine-tuned": tuned}
    return dict(best.quality)


def _loading(run: RunReport, artefacts: list[tuple[str, str]]) -> str:
    """Return the lines that load the first pruned model, for Markdown."""
    if not artefacts:
        return ""
    (name, path), rows = artefacts[0], _rows_of_files(run)
    held = f"  # {rows[name]}" if name in rows else ""
    return f"\n```python\nimport vbp\n\nmodel = vbp.load_pruned({path}){held}\n```\n"


def _files(run: RunReport, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return for each file with weights in the folder which model it holds, and for what to take it."""
    rows = _rows_of_files(run)
    return [
        (f"{name}/" if name == ARTIFACT else name, rows[name], _TAKE[name])
        for name in (ARTIFACT, BEST, FINAL)
        if name in names
    ]


def _rows_of_files(run: RunReport) -> dict[str, str]:
    """Return how tables call the model in each file with weights."""
    return {file: run.steps[name] for file, name in run.file_rows.items()}


def _artefacts(folder: Path) -> list[tuple[str, str]]:
    """Return each pruned model in the folder: its name, and its path as Python writes it; `artifact` sorts first."""
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".pth" or (path / "vbp.json").is_file())
    return [(printable(path.name), repr(os.fspath(path))) for path in paths]
