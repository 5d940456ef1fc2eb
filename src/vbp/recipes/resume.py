"""Find the checkpoint that a run continues; it never starts over silently, nor goes on with other settings."""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vbp.errors import InputError, one_line
from vbp.recipes.config import RunConfig
from vbp.recipes.folder import ASKED, BEGUN, asked
from vbp.recipes.options import Role, fields_with
from vbp.report.run_report import SUMMARY, RunReport
from vbp.runtime.decode import read_json
from vbp.runtime.files import check_folder
from vbp.training.checkpoints import CHECKPOINTS, has_checkpoints, latest_checkpoint, newest_name, read_checkpoint

_log = logging.getLogger(__name__)

# The first file that a run writes; the last is its summary.
CONFIG: Final = "config.json"

# Settings that only name something, and the facts that decide in their place if both sides hold them.
_DECIDED_BY = {"data_path": ("train", "val"), "checkpoint": ("model",), "convnext_checkpoint": ("model",)}


def find_checkpoint(
    resume: str | None,
    save_dir: Path,
    settings: Mapping[str, Any],
    *,
    overwrite: bool = False,
    restarted: bool = False,
) -> Path | None:
    """Return the checkpoint to continue from, before any work; None starts from the beginning.

    `resume` None starts a new run. `auto` continues the newest checkpoint in `save_dir`, and starts if there is none
    because the folder is empty, or because an attempt with the same `settings` (as in `config.json`) ended before its
    first one. A path continues that checkpoint, or the newest of that run's folder. Where the job was `restarted`
    after a failure (`torchrun --max-restarts`), what it wrote in `save_dir` comes first, as with `auto`.

    Raises:
        InputError: There is nothing at the path, nothing there can be read, or `save_dir` holds another run.
    """
    given = None if resume in (None, "auto") else Path(str(resume))
    if resume is None and not restarted:
        _check_new(save_dir, overwrite)
        return None
    if (given is None or restarted) and _is_asked(save_dir, settings):
        check_folder(save_dir, overwrite=True, needed_bytes=0)
        return None if given is None else _at(given)
    if (save_dir / BEGUN).is_file() and (given is None or restarted):
        _check_begun(save_dir / BEGUN, settings, overwrite)
        return None if given is None else _at(given)
    if given is not None and not restarted:
        checkpoint = _at(given)
        if checkpoint.resolve().parent == (save_dir / CHECKPOINTS).resolve():
            check_folder(save_dir, overwrite=True, needed_bytes=0)
        else:
            _check_new(save_dir, overwrite)
        return checkpoint
    own = latest_checkpoint(save_dir / CHECKPOINTS)
    if own is None:
        _check_no_run(save_dir, settings, overwrite)
        return None if given is None else _at(given)
    check_folder(save_dir, overwrite=True, needed_bytes=0)
    return own


def check_same_settings(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to continue a run with other settings, or with other facts that they led to.

    The facts are fingerprints `model`, `train` and `val`, the number of processes and the like. The error lists all
    that differ or are missing on one side; `path` is where the settings were read.
    """
    # As JSON has it: a tuple and a list are the same setting.
    before, after = (json.loads(json.dumps(dict(side))) for side in (saved, now))
    free = {*fields_with(RunConfig, Role.SPEED, Role.LAUNCH)} | {
        name for name, facts in _DECIDED_BY.items() if {*facts} <= before.keys() & after.keys()
    }
    names = [name for name in dict.fromkeys((*before, *after)) if name not in free]
    different = [name for name in names if name not in before or name not in after or before[name] != after[name]]
    if different:
        listed = "; ".join(f"{name}: {_shown(before, name)} -> {_shown(after, name)}" for name in different)
        raise InputError(
            f"a run must be continued with the settings that it began with, got others than {path} ({listed}); "
            "give the same ones, or start a new run in another --save_dir"
        )


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return textwrap.shorten(repr(settings[name]), 80, placeholder="...") if name in settings else "missing"


def _at(path: Path) -> Path:
    if path.is_file():
        read_checkpoint(path)
        return path
    if not path.is_dir():
        raise InputError(
            f"resume must be auto, a checkpoint, or the folder of a run, got {path}, which does not exist"
        )
    folder = path if has_checkpoints(path) else path / CHECKPOINTS
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise InputError(
            f"resume must name a checkpoint or a run that has one, got {path} without any; give another path, or "
            "leave --resume out to start from the beginning"
        )
    return checkpoint


def _check_new(save_dir: Path, overwrite: bool) -> None:
    try:
        check_folder(save_dir, overwrite=overwrite, needed_bytes=0)
    except InputError as error:
        if has_checkpoints(save_dir / CHECKPOINTS):
            raise InputError(f"{error}, or continue the run that is there with --resume auto") from error
        raise


def _check_no_run(save_dir: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Check that a folder without checkpoints holds nothing, or only what this run wrote before its first one."""
    config = save_dir / CONFIG
    if config.is_file() and not (save_dir / SUMMARY).exists():
        _check_begun(config, settings, overwrite)
        overwrite = True
    check_folder(save_dir, overwrite=overwrite, needed_bytes=0)


def _is_asked(save_dir: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether a run with these settings was allowed to replace what is there, and was killed before it did."""
    before = asked(save_dir)
    if before is None:
        return False
    try:
        check_same_settings(before, settings, save_dir / ASKED)
    except InputError:
        return False  # another run's, which has changed nothing
    return True


def _check_begun(path: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Check that an attempt without a checkpoint, whose settings are at the path, was one of this run."""
    if not overwrite:
        check_same_settings(_read_json(path), settings, path)
        _log.warning("%s holds no checkpoint yet: an earlier attempt ended before; the run begins anew", path.parent)
    check_folder(path.parent, overwrite=True, needed_bytes=0)


def ended_run(config: RunConfig, *, restarted: bool = False) -> RunReport | None:
    """Return the report of a run that is to go on, but had nothing to fine-tune and has ended; None for others."""
    folder = config.save_dir
    goes_on = config.resume == "auto" or (restarted and config.resume is None and not config.overwrite)
    ended = all((folder / name).is_file() for name in (CONFIG, SUMMARY))
    if not goes_on or not ended or (folder / BEGUN).exists() or has_checkpoints(folder / CHECKPOINTS):
        return None
    if _is_asked(folder, config.to_dict()):
        return None
    check_same_settings(_read_json(folder / CONFIG), config.to_dict(), folder / CONFIG)
    return RunReport.read(folder)


def way_on(save_dir: Path) -> str:
    """Return how a run that is stopped now goes on."""
    newest = newest_name(save_dir / CHECKPOINTS)
    if newest is None or any((save_dir / name).exists() for name in (BEGUN, ASKED)):
        return "there is no checkpoint yet; the same command with --resume auto begins anew"
    return f"the same command with --resume auto goes on from {newest}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} must be the settings of a run, but cannot be read ({one_line(error)}); remove it"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must be the settings of a run, got {type(value).__name__}; remove it")
    return value
