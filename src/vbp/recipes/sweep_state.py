"""A sweep's results file: written row by row, and read again by the attempt that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vbp.errors import InputError
from vbp.recipes.options import Role, fields_with
from vbp.recipes.setup import Job
from vbp.recipes.sweep_config import SweepConfig
from vbp.report.run_report import Measured
from vbp.report.sweep_report import SweepRow
from vbp.runtime.decode import read_json
from vbp.runtime.files import check_folder, write_json
from vbp.runtime.fingerprints import json_fingerprint
from vbp.statistics.statistics import Statistics

JSON: Final = "sweep.json"
_FORMAT: Final = "vbp-sweep/1"


@dataclass(frozen=True)
class SweepProgress:
    """Settings and rows of an earlier attempt."""

    settings: Mapping[str, Any]
    dense: Measured | None
    rows: tuple[SweepRow, ...]


def deciding_settings(config: SweepConfig, job: Job) -> dict[str, Any]:
    """Return what must be the same for rows of two attempts to stand in one table; plain JSON data."""
    given, session = job.given_statistics, job.session
    facts = {
        "model": job.settings["model"],
        "calibration": job.calibration.fingerprint,
        "val": json_fingerprint([job.settings["val"], job.classifier.preprocessing.to_dict()]),
        "statistics": "collected" if given is None else json_fingerprint(_identity(given)),
        "device": session.device.type,
        "amp": session.precision.name,
        "processes": session.processes.world,
    }
    # Model and images are compared by their contents.
    return facts | {name: getattr(config, name) for name in fields_with(SweepConfig, Role.RESULT)}


def _identity(statistics: Statistics) -> list[Any]:
    sums = {name: [seen.count, seen.mean.tolist(), seen.m2.tolist()] for name, seen in statistics.moments.items()}
    covariances = {name: float(seen.m2.sum()) for name, seen in statistics.covariances.items()}
    return [sums, covariances, {name: float(seen.inputs.sum()) for name, seen in statistics.sensitivities.items()}]


def read_progress(config: SweepConfig) -> SweepProgress | None:
    """Read what is in the folder: nothing, or an earlier attempt; on the main process."""
    path = config.save_dir / JSON
    if config.overwrite or not path.exists():
        check_folder(config.save_dir, overwrite=config.overwrite, needed_bytes=0)
        return None
    try:
        stored = read_json(path)
        if stored["format"] != _FORMAT:
            raise ValueError(f"format {stored['format']!r} where {_FORMAT} belongs")
        dense = None if stored["dense"] is None else Measured(**stored["dense"])
        return SweepProgress(stored["settings"], dense, tuple(map(SweepRow.from_dict, stored["rows"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} must be what an earlier sweep left, got {error!r}; choose another --save_dir, or pass "
            "--overwrite to begin again"
        ) from error


def check_may_go_on(progress: SweepProgress | None, settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse rows that were measured with different settings in one table."""
    if progress is None:
        return
    names = sorted({*progress.settings, *settings})
    different = [
        f"{name} {_short(progress.settings.get(name))} there, {_short(settings.get(name))} here"
        for name in names
        if progress.settings.get(name) != settings.get(name)
    ]
    if different:
        raise InputError(
            f"a sweep goes on with the settings it began with, got others than in {folder}: {'; '.join(different)}; "
            "choose another --save_dir, or pass --overwrite to begin again"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12]


def write_state(folder: Path, settings: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Write what is known so far."""
    write_json(folder / JSON, {"format": _FORMAT, "settings": dict(settings), **report})
