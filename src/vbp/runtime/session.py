"""Progress bars of the main process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from vbp.recipes.setup import Job


def bar(job: Job, loader: Iterable[Any], label: str) -> Any:
    """Draw progress on the main process, where the output is a terminal."""
    hidden = None if job.processes.is_main else True
    return tqdm(loader, desc=label, unit="batch", leave=False, disable=hidden, dynamic_ncols=True)


@contextmanager
def counted(job: Job, label: str, unit: str) -> Iterator[Callable[[str], None]]:
    """Draw progress as `bar` does over steps whose number nobody knows: call what is given with each step's name."""
    hidden = None if job.processes.is_main else True
    with tqdm(desc=label, unit=f" {unit}", leave=False, disable=hidden, dynamic_ncols=True) as drawn:

        def tell(name: str) -> None:
            drawn.set_postfix_str(name, refresh=False)
            drawn.update()

        yield tell
