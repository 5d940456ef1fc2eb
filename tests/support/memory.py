"""How much memory something takes."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(mebibytes: int) -> Iterator[None]:
    """Fail if the body makes this process larger by more than this."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert taken <= mebibytes, f"{taken:.0f} MiB were taken, allowed are {mebibytes}"
