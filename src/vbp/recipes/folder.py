"""The folder of a job: one job at a time writes into it, and what is there after a kill tells how to go on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vbp.data.data_path import check_outside
from vbp.deploy.artifact_files import ARTIFACT
from vbp.errors import Interrupted
from vbp.report.run_report import FIGURES
from vbp.runtime.files import clear_leftovers, folder_lock, write_json
from vbp.runtime.processes import Processes
from vbp.training.checkpoints import CHECKPOINTS

# Settings of a job that is removing the results of another one, or has not begun to write its own.
BEGUN: Final = ".begun.json"


@contextmanager
def own_folder(save_dir: Path, data_path: str, processes: Processes, way_on: Callable[[], str]) -> Iterator[None]:
    """Let no other job write into a folder for the length of the block; the main process holds it.

    A folder that was made and into which nothing was written is removed again. A job that is told to stop says how
    it goes on: `way_on` returns that.

    Raises:
        InputError: Another job writes there, the folder cannot be written, or lies among the images.
        Interrupted: The job was told to stop.
    """
    if not processes.is_main:
        yield
        return
    check_outside(save_dir, data_path)
    with folder_lock(save_dir):
        try:
            yield
        except KeyboardInterrupt as error:
            number = error.signal if isinstance(error, Interrupted) else signal.SIGINT
            if isinstance(error, Interrupted) and error.told:
                raise
            raise Interrupted(number, f"stopped by {signal.Signals(number).name}; {way_on()}") from error


def begin_anew(folder: Path, name: str, settings: Mapping[str, Any], clear: Callable[[], object]) -> None:
    """Remove the results of another job and write the first file of this one, in steps that a kill cannot undo.

    From the first step on the folder is this job's: its settings are there under one name or the other.
    """
    write_json(folder / BEGUN, settings)
    clear()
    (folder / BEGUN).replace(folder / name)


def clear_halves(folder: Path) -> None:
    """Remove what a killed job left half written in its folder and those below it."""
    for place in (folder, folder / CHECKPOINTS, folder / ARTIFACT, folder / FIGURES):
        clear_leftovers(place)
