"""The errors that a user can mend: shown as one line by the commands, without a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave is wrong; the text says what, what was got, what is allowed, and the remedy."""


class OutputError(OSError):
    """A file could not be written; the earlier file of that name, if any, is whole."""
