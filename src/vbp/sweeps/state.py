"""What a sweep keeps in its folder, so that it goes on after a kill and never mixes rows of different settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from vbp.errors import InputError, one_line
from vbp.recipes.folder import BEGUN, asked
from vbp.recipes.options import Role, fields_with
from vbp.recipes.setup import Job
from vbp.report.run_report import Measured
from vbp.runtime.decode import read_json, to_json
from vbp.runtime.files import check_folder, write_json
from vbp.runtime.fingerprints import json_fingerprint
from vbp.sweeps.config import SweepConfig
from vbp.sweeps.report import SweepRow

LOG, JSON, CSV, SVG, PNG = "vbp_sweep.log", "sweep.json", "sweep.csv", "sweep.svg", "sweep.png"
_FORMAT: Final = "vbp-sweep/2"


@dataclass(frozen=True)
class SweepProgress:
    """Settings and rows of an earlier attempt; `begun` where it ended while it removed the results of another one."""

    settings: Mapping[str, Any]
    dense: Measured | None
    rows: tuple[SweepRow, ...]
    begun: bool = False


def deciding_settings(config: SweepConfig, job: Job) -> dict[str, Any]:
    """Return what must be the same for rows of two attempts to stand in one table; plain JSON data."""
    given, session = job.given_statistics, job.session
    facts = {
        "model": job.settings["model"],
        "calibration": job.calibration.fingerprint,
        "val": json_fingerprint([job.settings["val"], job.classifier.preprocessing.to_dict()]),
        "statistics": "collected" if given is None else json_fingerprint(given.identity()),
        "device": session.device.type,
        "amp": session.precision.name,
        "processes": session.processes.world,
    }
    # Model and images are compared by their contents.
    return facts | {name: to_json(getattr(config, name)) for name in fields_with(SweepConfig, Role.RESULT)}


def read_progress(config: SweepConfig) -> SweepProgress | None:
    """Read what is in the folder: nothing, or an earlier attempt; on the main process."""
    begun = (config.save_dir / BEGUN).is_file()
    path = config.save_dir / (BEGUN if begun else JSON)
    before = asked(config.save_dir)
    replaces = config.overwrite or (before is not None and before == to_json(replace(config, overwrite=True)))
    if replaces or not path.exists():
        check_folder(config.save_dir, overwrite=replaces, needed_bytes=0)
        return None
    try:
        stored = read_json(path)
        if stored["format"] != _FORMAT:
            raise ValueError(f"format {stored['format']!r} where {_FORMAT} belongs")
        dense = None if stored["dense"] is None else Measured(**stored["dense"])
        return SweepProgress(stored["settings"], dense, tuple(map(SweepRow.from_dict, stored["rows"])), begun)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} must be what an earlier sweep left, got {type(error).__name__}: {one_line(error)}; choose "
            "another --save_dir, or pass --overwrite to begin again"
        ) from error


def check_may_go_on(progress: SweepProgress | None, settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse rows that were measured with different settings in one table."""
    if progress is None:
        return
    names = sorted({*progress.settings, *settings})
    different = [
        f"{name} {progress.settings.get(name)!s:.16} there, {settings.get(name)!s:.16} here"
        for name in names
        if progress.settings.get(name) != settings.get(name)
    ]
    if different:
        raise InputError(
            f"a sweep goes on with the settings it began with, got others than in {folder}: {'; '.join(different)}; "
            "choose another --save_dir, or pass --overwrite to begin again"
        )


def write_state(folder: Path, settings: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Write what is known so far."""
    write_json(folder / JSON, state_of(settings, report))


def state_of(settings: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": _FORMAT, "settings": dict(settings), **report}
