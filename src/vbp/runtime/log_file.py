"""Write the log file of a run: from its first record on, but not before the run may write."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from vbp.errors import OutputError, printable


class LineFormatter(logging.Formatter):
    """Writes each record as one line: a line break in the name of a file cannot pass for a record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record, without characters that are for the terminal."""
        return printable(super().format(record))


_LINE = LineFormatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


def log_lines(logger: logging.Logger, text: str) -> None:
    """Log a table: each of its lines as a record."""
    for line in text.splitlines():
        logger.info("%s", line)


@contextmanager
def told_if_slow(logger: logging.Logger, text: str, *values: object, seconds: float = 2.0) -> Iterator[None]:
    """Log what a block does once it has taken so many seconds; nothing is logged of one that is done by then.

    For work without a progress bar: a user does not wait longer without knowing for what.
    """
    timer = threading.Timer(seconds, logger.info, (text, *values))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _LogFile(logging.FileHandler):
    """Ends the run when a line cannot be written, instead of printing a traceback for every line to come."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is logging's)
        error = sys.exc_info()[1]
        raise OutputError(f"{self.baseFilename} could not be written ({error}); earlier files are whole") from error


class RunLog:
    """Collects the program's log records from now on, first in memory, then in a file."""

    def __init__(self) -> None:
        # Never flushed by itself: until `open`, a run that is refused must leave earlier results untouched.
        self._memory = MemoryHandler(capacity=1_000_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._file: logging.FileHandler | None = None
        self._logger = logging.getLogger("vbp")
        self._logger.addHandler(self._memory)

    def open(self, path: Path, *, append: bool = False) -> None:
        """Write what was collected to a file, and all that follows.

        Raises:
            OutputError: The file cannot be written, now or at a later line.
        """
        try:
            self._file = _LogFile(path, mode="a" if append else "w", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path} could not be written ({error}); choose another folder") from error
        self._file.setFormatter(_LINE)
        self._memory.setTarget(self._file)
        self._memory.flush()
        self._logger.removeHandler(self._memory)
        self._logger.addHandler(self._file)

    def close(self) -> None:
        """Stop collecting and close the file."""
        self._logger.removeHandler(self._memory)
        if self._file is not None:
            self._logger.removeHandler(self._file)
            self._file.close()


@contextmanager
def run_log() -> Iterator[RunLog]:
    """Collect log records for the length of a run; an error that ends it is the last line of the file."""
    logger = logging.getLogger("vbp")
    level = logger.level
    logger.setLevel(logging.INFO)
    log = RunLog()
    try:
        yield log
    except BaseException as error:
        # The caller shows the error to the user; here it is kept with the run.
        if log._file is not None:
            record = logger.makeRecord("vbp", logging.ERROR, "", 0, "stopped: %s", (repr(error),), None)
            with contextlib.suppress(OutputError):
                log._file.emit(record)
        raise
    finally:
        log.close()
        logger.setLevel(level)
