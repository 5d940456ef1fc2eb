"""What a sweep keeps in its folder, so that it goes on after a kill and never mixes rows of different settings.

`sweep.json` is written first, with what all points have in common. What was measured of a point is a file in the
point's own folder: jobs that do points beside each other write no file in common. `sweep.json` takes them in when the
sweep ends, or when `vbp sweep FOLDER` merges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from vbp.errors import InputError, one_line
from vbp.recipes.folder import BEGUN, asked
from vbp.recipes.options import Role, fields_with
from vbp.recipes.setup import Job
from vbp.report.run_report import STATISTICS, Measured
from vbp.runtime.decode import from_json, read_json, to_json
from vbp.runtime.files import SHORT_LOCK, check_folder, folder_lock, write_json
from vbp.runtime.fingerprints import json_fingerprint
from vbp.sweeps.checks import share_of
from vbp.sweeps.config import SweepConfig
from vbp.sweeps.report import SweepReport
from vbp.sweeps.rows import Point, SweepRow, point_from_dict

LOG, JSON, CSV = "vbp_sweep.log", "sweep.json", "sweep.csv"
POINTS, ROW = "points", "row.json"
_FORMAT: Final = "vbp-sweep/3"
_ROW_FORMAT: Final = "vbp-sweep-row/1"

# Another job holds the short lock for the time of reading and writing one small file.
_SHORT_WAIT_S: Final = 60.0


@dataclass(frozen=True)
class SweepState:
    """What all points of a sweep have in common.

    `begun` is whether the attempt ended while it removed the results of another one.
    """

    settings: Mapping[str, Any]
    dense: Measured
    asked: tuple[Point, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    begun: bool = False

    @property
    def fingerprint(self) -> str:
        """Return a fingerprint of the settings, which stands in the file of each row."""
        return json_fingerprint(to_json(self.settings))

    def with_points(self, points: Sequence[Point]) -> SweepState:
        """Return the same with more points that are asked for, these first."""
        return replace(self, asked=tuple(dict.fromkeys((*points, *self.asked))))

    def report(self, rows: Mapping[Point, SweepRow]) -> SweepReport:
        """Return what is measured, and what is missing."""
        measured = tuple(rows[point] for point in dict.fromkeys((*self.asked, *rows)) if point in rows)
        missing = tuple(point for point in self.asked if point not in rows)
        return SweepReport(self.dense, measured, self.about, missing)

    def to_dict(self, rows: Mapping[Point, SweepRow]) -> dict[str, Any]:
        """Return the plain JSON data of `sweep.json`."""
        asked = [point.to_dict() for point in self.asked]
        return {"format": _FORMAT, "settings": dict(self.settings), "asked": asked, **self.report(rows).to_dict()}


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
    if config.epochs_ft > 0:
        facts |= {"train": job.settings["train"], "teacher": config.teacher}
    # Model and images are compared by their contents.
    return facts | {name: to_json(getattr(config, name)) for name in fields_with(SweepConfig, Role.RESULT)}


def read_progress(config: SweepConfig) -> SweepState | None:
    """Read what is in the folder: nothing, or an earlier attempt; on the main process."""
    folder, share = config.save_dir, share_of(config)
    begun = (folder / BEGUN).is_file()
    if begun and share is not None and share.number:
        raise InputError(
            f"{folder} must hold the sweep of this point, got one that ended while it replaced other results; give "
            f"its command once more without --point, or with --point 0/{share.of}"
        )
    before = asked(folder)
    replaces = config.overwrite or (before is not None and before == to_json(replace(config, overwrite=True)))
    path = folder / (BEGUN if begun else JSON)
    if replaces or not path.exists():
        check_folder(folder, overwrite=replaces, needed_bytes=0)
        return None
    return replace(read_state(path), begun=begun)


def read_state(path: Path) -> SweepState:
    """Read what `SweepState.to_dict` returned.

    Raises:
        InputError: It is damaged, or of another version.
    """
    try:
        stored = read_json(path)
        if stored["format"] != _FORMAT:
            raise ValueError(f"format {stored['format']!r} where {_FORMAT} belongs")
        settings, about, dense = stored["settings"], stored["about"], stored["dense"]
        if not isinstance(settings, dict) or not isinstance(about, dict):
            raise ValueError("settings and about must be objects")
        measured: Measured = from_json(Measured, dense, "the dense model's figures", use_defaults=True)
        return SweepState(settings, measured, tuple(map(point_from_dict, stored["asked"])), about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} must be what an earlier sweep left, got {type(error).__name__}: {one_line(error)}; choose "
            "another --save_dir, or pass --overwrite to begin again"
        ) from error


def check_may_go_on(progress: SweepState | None, settings: Mapping[str, Any], folder: Path) -> None:
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


@contextmanager
def shared_state(folder: Path) -> Iterator[None]:
    """Let no other job change `sweep.json` for the length of the block, which is short."""
    with folder_lock(folder, name=SHORT_LOCK, wait_seconds=_SHORT_WAIT_S):
        yield


def write_state(folder: Path, state: SweepState, rows: Mapping[Point, SweepRow]) -> None:
    """Write `sweep.json`."""
    write_json(folder / JSON, state.to_dict(rows))


def point_folder(folder: Path, point: Point) -> Path:
    """Return the folder of a point, in that of the sweep."""
    return folder / POINTS / point.name


def statistics_file(config: SweepConfig, seed: int) -> Path:
    """Return where the statistics of a seed are kept: those of the first under the name that they have in a run."""
    return config.save_dir / (STATISTICS if seed == config.seed else f"statistics-seed{seed}.safetensors")


def write_row(folder: Path, state: SweepState, row: SweepRow) -> None:
    """Write what was measured of a point into its folder."""
    place = point_folder(folder, row.point)
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / ROW, {"format": _ROW_FORMAT, "settings": state.fingerprint, "row": row.to_dict()})


def read_row(folder: Path, state: SweepState, name: str) -> SweepRow | None:
    """Read what was measured of a point; None if nothing was.

    Raises:
        InputError: The file is damaged, or belongs to another sweep.
    """
    path = folder / POINTS / name / ROW
    if not path.is_file():
        return None
    try:
        stored = read_json(path)
        if (stored["format"], stored["settings"]) != (_ROW_FORMAT, state.fingerprint):
            raise ValueError("it was measured with other settings or by another version")
        row = SweepRow.from_dict(stored["row"])
        if row.point.name != name:
            raise ValueError(f"it is that of {row.point.name}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} must be a point of the sweep in {folder}, got {type(error).__name__}: {one_line(error)}; remove "
            "it, and the point is measured again"
        ) from error
    return row


def read_rows(folder: Path, state: SweepState) -> dict[Point, SweepRow]:
    """Read all rows that jobs have left in the folder of a sweep."""
    places = sorted((folder / POINTS).iterdir()) if (folder / POINTS).is_dir() else []
    rows = (read_row(folder, state, place.name) for place in places)
    return {row.point: row for row in rows if row is not None}
