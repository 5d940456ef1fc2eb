"""Define the errors that a user can fix: the commands show them as one line, without a traceback."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from signal import Signals


class InputError(ValueError):
    """Something the user gave is wrong; the text says what, what was got, what is allowed, and the remedy.

    Example:
        >>> vbp.Budget.of(keep_ratio=1.3)
        Traceback (most recent call last):
        vbp.errors.InputError: keep_ratio must be in (0, 1], got 1.3...
    """


class OutputError(OSError):
    """A file could not be written; the earlier file of that name, if any, is whole.

    Example:
        >>> plan.save(folder / "missing/plan.json")
        Traceback (most recent call last):
        vbp.errors.OutputError: ...
    """


class PeerError(RuntimeError):
    """Another process of the same job failed; the text is its error, or says that it wrote none.

    `shown` is whether this process shows it, rather than another one of its node.
    """

    def __init__(self, text: str, *, shown: bool = True) -> None:
        super().__init__(text)
        self.shown = shown


class Interrupted(KeyboardInterrupt):
    """A job was told to stop (SIGINT, SIGTERM: `signal` is its number); the text says how it goes on, where it can.

    `told` is whether it does. What was written is whole.
    """

    def __init__(self, signal: int, text: str = "") -> None:
        super().__init__(text or f"stopped by {Signals(signal).name}; files written so far are whole")
        self.signal = signal
        self.told = text != ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; the name of its type where it has none."""
    return (
        one_line(error)
        if "weights_only" in str(error)
        else (str(error).strip() or type(error).__name__).splitlines()[0]
    )


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Return the first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def one_line(error: BaseException) -> str:
    """Return a library's error as part of a sentence: without line breaks, and of limited length."""
    if "weights_only" in str(error):  # torch's advice is to let the file run code
        return "it is damaged, or holds more than tensors and plain data"
    return textwrap.shorten(str(error), width=400, placeholder=" ...").rstrip(".") or type(error).__name__
