"""The folder of a job: one job at a time writes into it, and what is there after a kill tells how to go on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vbp.data.data_path import check_outside
from vbp.deploy.artifact_files import ARTIFACT
from vbp.errors import Interrupted, PeerError
from vbp.report.run_report import FIGURES
from vbp.runtime.decode import read_json
from vbp.runtime.files import clear_folder, clear_leftovers, folder_lock, is_leftover, write_json
from vbp.runtime.processes import Processes
from vbp.training.checkpoints import CHECKPOINTS

# Settings of a job that is removing the results of another one, or has not begun to write its own.
BEGUN: Final = ".begun.json"

# Settings of a job that is to replace the results of another one, and has not removed any yet.
ASKED: Final = ".overwrite.json"

# So long a job waits for a folder that it shares with others.
SHARED_WAIT_S: Final = 10.0


@contextmanager
def own_folder(
    save_dir: Path,
    data_path: str,
    processes: Processes,
    way_on: Callable[[], str],
    replaced_by: Mapping[str, Any] | None = None,
    *,
    shared: bool = False,
) -> Iterator[None]:
    """Let no other job write into a folder for the length of the block; the main process holds it.

    A folder that was made and into which nothing was written is removed again. A job that is told to stop says how
    it goes on: `way_on` returns that. Where results of another job are to be replaced, the settings `replaced_by` are
    noted at once, so that it goes on after a kill without being allowed again; an error before that takes them back.
    Jobs that write each into a place of its own can hold a folder `shared`.

    Raises:
        InputError: Another job writes there, the folder cannot be written, or lies among the images.
        Interrupted: The job was told to stop.
    """
    if not processes.is_main:
        yield
        return
    check_outside(save_dir, data_path)
    # One that is just ending may look for a moment as if it held the folder alone.
    with folder_lock(save_dir, shared=shared, wait_seconds=SHARED_WAIT_S if shared else 0.0):
        noted = replaced_by is not None and not (save_dir / BEGUN).exists() and _has_results(save_dir)
        if noted:
            write_json(save_dir / ASKED, replaced_by)
        try:
            yield
        except Exception as error:
            # Where another process failed, torchrun may start all again.
            if noted and not isinstance(error, PeerError):
                clear_folder(save_dir, (ASKED,))
            raise
        except KeyboardInterrupt as error:
            number = error.signal if isinstance(error, Interrupted) else signal.SIGINT
            if isinstance(error, Interrupted) and error.told:
                raise
            raise Interrupted(number, f"stopped by {signal.Signals(number).name}; {way_on()}") from error


def _has_results(folder: Path) -> bool:
    return any(not is_leftover(entry.name) for entry in folder.iterdir())


def asked(folder: Path) -> Mapping[str, Any] | None:
    """Return the settings of a job that was killed before it replaced the results in a folder; None without one."""
    if not (folder / ASKED).exists():
        return None
    try:
        value = read_json(folder / ASKED)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def begin_anew(folder: Path, name: str, settings: Mapping[str, Any], clear: Callable[[], object]) -> None:
    """Remove the results of another job and write the first file of this one, in steps that a kill cannot undo.

    From the first step on the folder is this job's: its settings are there under one name or the other.
    """
    write_json(folder / BEGUN, settings)
    clear_folder(folder, (ASKED,))
    clear()
    (folder / BEGUN).replace(folder / name)


def clear_halves(folder: Path) -> None:
    """Remove what a killed job left half written in its folder and those below it."""
    for place in (folder, folder / CHECKPOINTS, folder / ARTIFACT, folder / FIGURES):
        clear_leftovers(place)
