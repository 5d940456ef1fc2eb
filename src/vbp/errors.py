"""Define the errors that a user can fix: the commands show them as one line, without a traceback."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from signal import Signals

# Control characters, line breaks, marks that turn the direction of writing, and bytes of a file name that are no
# UTF-8, as Python has them in a string.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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


def printable(text: str) -> str:
    """Return a text as one line that any terminal and file takes: other characters as Python's escapes."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def check_printable(names: Sequence[str], what: str, where: str) -> None:
    """Raise InputError for a name that cannot stand in a result: not UTF-8, or with a control character."""
    odd = [printable(name) for name in names if printable(name) != name]
    if odd:
        raise InputError(
            f"{what} must be UTF-8 without control characters, for they go into the results, got {some_of(odd)} in "
            f"{where}; rename them"
        )


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Return the first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def one_line(error: BaseException) -> str:
    """Return a library's error as part of a sentence: without line breaks, and of limited length."""
    if "weights_only" in str(error):  # torch's advice is to let the file run code
        return "it is damaged, or holds more than tensors and plain data"
    return textwrap.shorten(str(error), width=400, placeholder=" ...").rstrip(".") or type(error).__name__
