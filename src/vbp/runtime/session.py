"""Keep together what one process of a job needs: ranks, device, precision, progress bars, seconds of each stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from tqdm import tqdm

from vbp.runtime.precision import Precision
from vbp.runtime.processes import Processes


@dataclass(frozen=True)
class Session:
    """How this process takes part in a job. The default is a job of one process, on the CPU, in float32.

    `precision` is that of all forward passes; `seconds` has the time spent in each stage so far.
    `bars` shows progress bars or hides them; by default a terminal shows them.
    """

    processes: Processes = field(default_factory=Processes)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = field(default_factory=Precision)
    seconds: dict[str, float] = field(default_factory=dict)
    bars: bool | None = None

    def progress(self, batches: Iterable[Any], label: str) -> Any:
        """Draw a progress bar on the main process, as `bars` says; return the batches."""
        return tqdm(batches, desc=label, unit="batch", leave=False, disable=self._hidden, dynamic_ncols=True)

    @contextmanager
    def progress_steps(self, label: str, unit: str) -> Iterator[Callable[[str], None]]:
        """Draw progress over an unknown number of steps: call what is returned with each step's name."""
        with tqdm(desc=label, unit=f" {unit}", leave=False, disable=self._hidden, dynamic_ncols=True) as drawn:

            def tell(name: str) -> None:
                drawn.set_postfix_str(name, refresh=False)
                drawn.update()

            yield tell

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a block to those of a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    @property
    def _hidden(self) -> bool | None:
        """Hide the bar on other processes; None leaves it to whether the output is a terminal."""
        if not self.processes.is_main:
            return True
        return None if self.bars is None else not self.bars


# For calls that belong to no job.
ALONE: Final = Session()
