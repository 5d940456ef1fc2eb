"""Decide when to write a checkpoint or to stop: a signal asks for it, enough time has passed, a reader was killed."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from vbp.errors import InputError, Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# One request to stop can arrive several times: SLURM signals each process of a job, and torchrun, signalled too,
# passes it on to its workers. Only a signal that comes later than this is a second request.
_SAME_REQUEST_SECONDS = 2.0


class Interruption:
    """Notes SIGTERM and SIGINT while it is entered, so that a loop can stop between two steps.

    `signal` is the number of the first one. A second one acts at once, as it would have without us. A signal that
    nobody has acted upon when the block is left acts then: none is lost. Outside the main thread, where signals never
    arrive, only the clock is kept; a signal that was ignored before (`nohup`, a job in the background) stays ignored.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.signal: int | None = None
        self._clock = clock
        self._start = clock()
        self._noted = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                # None: a handler not made in Python, which could not be put back.
                if before is not None and before is not signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if kind is None and self.signal is not None:
            signal.raise_signal(self.signal)

    def due(self, minutes: float) -> bool:
        """Return whether so many minutes have passed since this was last so, or since the start; never with 0."""
        if minutes <= 0 or self._clock() - self._start < 60 * minutes:
            return False
        self._start = self._clock()
        return True

    def _note(self, number: int, frame: FrameType | None) -> None:
        # No log record here: the signal may have come in the middle of another one.
        if self.signal is None:
            self.signal, self._noted = number, self._clock()
        elif self._clock() - self._noted >= _SAME_REQUEST_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()


def leave_signals_to_parent(worker: int) -> None:
    """Let a process that reads images ignore SIGTERM and SIGINT; made for `DataLoader(worker_init_fn=...)`.

    Terminals, torchrun and SLURM signal the workers together with the process that they work for. If they died, it
    would fail for want of images before it could write a checkpoint. They end with their parent.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def stop_at_sigterm() -> Iterator[None]:
    """Let SIGTERM raise `Interrupted` for the length of the block.

    Outside the main thread, and where the signal was ignored before, nothing changes.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        # One request may arrive several times, and the first is being acted upon.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted(number)

    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# How PyTorch says that a process which reads images has ended.
_READER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]*)|exited unexpectedly)"
)
_MEMORY_REMEDY = (
    "which is how a lack of memory shows: give fewer --num_workers, or 0 to read in the main process, or more memory"
)
_READER_REMEDIES = {
    "": _MEMORY_REMEDY,
    " (Killed)": _MEMORY_REMEDY,
    " (Bus error)": (
        "which is how a lack of shared memory shows: give fewer --num_workers, or 0 to read in the main process, or "
        "more shared memory (/dev/shm; docker run --shm-size)"
    ),
}


def killed_reader(error: BaseException) -> InputError | None:
    """Return the error to raise where a process that reads images has ended; None where it is another error."""
    match = _READER.search(str(error)) if isinstance(error, RuntimeError) else None
    if match is None:
        return None
    reason = f" ({match[2].strip()})" if match[2] else ""
    remedy = _READER_REMEDIES.get(reason, "give --num_workers 0 to read in the main process, where the cause shows")
    return InputError(f"process {match[1]}, which read images for this one, ended unexpectedly{reason}, {remedy}")


@contextlib.contextmanager
def reading_processes() -> Iterator[None]:
    """Turn the end of a process that reads images into an error that says what helps.

    PyTorch reports it in whatever line is just executed, which may take it for an error of its own.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        seen: set[int] = set()  # causes can form a circle
        while cause is not None and id(cause) not in seen:
            if killed := killed_reader(cause):
                raise killed from cause
            seen.add(id(cause))
            cause = cause.__cause__ or cause.__context__
        raise
