"""Read a pickled list of samples without ever loading code."""

from __future__ import annotations

import mmap
import os
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

from vbp.data.labels import ClassNames, label_in_path
from vbp.data.listing_cache import Row
from vbp.errors import InputError, one_line
from vbp.runtime.files import is_regular, open_regular


def read_samples(file: Path, num_classes: int, own: ClassNames | None = None) -> list[Row]:
    """Read a pickled list of `(path, label)`; paths are absolute or relative to the file's folder.

    Return label and path of each, relative to that folder if the image lies inside it. All images must exist, and
    no path may name another class than its label: by a synset, or by a folder called as in `own`.
    """
    samples = _load_plain_pickle(file)
    if not isinstance(samples, list) or not samples:
        got = "an empty list" if isinstance(samples, list) else _kind(samples)
        raise InputError(f"{file} must hold a list of (path, label), got {got}; write it anew")
    root = file.parent
    prefixes = [f"{folder}{os.sep}" for folder in (root, root.absolute(), root.resolve())]
    rows: list[Row] = []
    for place, sample in enumerate(samples):
        path, label = _checked_sample(file, place, sample, num_classes)
        inside = next((prefix for prefix in prefixes if path.startswith(prefix)), "")
        rows.append((label, path.removeprefix(inside).replace(os.sep, "/")))
    missing = [path for _, path in rows if not is_regular(root / path)]
    if missing:
        raise InputError(
            f"the images named in {file} must exist, {len(missing)} of {len(rows)} do not, the first is "
            f"{missing[0]}; correct the paths (absolute, or relative to {root}) or remove the file"
        )
    named = [(path, label, label_in_path(path, num_classes, own)) for label, path in rows]
    wrong = [entry for entry in named if entry[2] not in (None, entry[1])]
    if wrong:
        path, label, right = wrong[0]
        raise InputError(
            f"the labels in {file} must be those of the model's {num_classes} classes, got {label} for {path}, whose "
            f"path names class {right} ({len(wrong)} of {len(rows)} contradict their path); write the file with the "
            "model's numbers (of ImageNet: the place among all 1000 synsets, not among those at hand), or remove it "
            "and let the names of the folders decide"
        )
    return rows


# What a list of texts and numbers is written with, in any protocol.
_PLAIN = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP, pickle.NONE),
    *(pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.LONG4),
    *(pickle.NEWTRUE, pickle.NEWFALSE, pickle.FLOAT, pickle.BINFLOAT),
    *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING),  # of Python 2
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS),  # and these for a message that names them
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
)
_LARGEST_FILE, _LONGEST_PATH = 2**31, 4096


class _PlainOperations(dict[int, Any]):
    def __missing__(self, operation: int) -> Any:
        raise pickle.UnpicklingError(f"it asks for operation {operation}, and code and objects are never loaded")


class _PlainUnpickler(pickle._Unpickler):
    """Reads numbers, strings, lists and tuples only: a pickle that may name a function may run any code.

    The unpickler written in Python, because that in C makes a table as long as the greatest number in the file.
    """

    dispatch: ClassVar = _PlainOperations({op[0]: pickle._Unpickler.dispatch[op[0]] for op in _PLAIN})

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, and code is never loaded")

    def persistent_load(self, pid: Any, /) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")


def _load_plain_pickle(file: Path) -> object:
    try:
        with open_regular(file) as stream:
            if (size := file.stat().st_size) > _LARGEST_FILE:
                raise ValueError(f"it has {size} bytes, allowed are {_LARGEST_FILE}")
            # Unlike a file, a map takes no more memory than there is to read, however much is asked for.
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _PlainUnpickler(content).load()
    except (
        # What the unpickler raises on damaged bytes depends on where the damage lies.
        *(OSError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError),
        *(OverflowError, MemoryError, RecursionError, AssertionError, struct.error),
    ) as error:
        raise InputError(
            f"{file} must be a pickled list of (path, label) with plain strings and whole numbers, "
            f"but cannot be read: {one_line(error)}; write it anew or remove it"
        ) from error


def _checked_sample(file: Path, place: int, sample: object, num_classes: int) -> tuple[str, int]:
    if not isinstance(sample, (list, tuple)) or len(sample) != 2:
        raise InputError(f"each entry of {file} must be (path, label), got {_kind(sample)} at {place}")
    path, label = sample
    if isinstance(path, str) and len(path) > _LONGEST_PATH:
        raise InputError(f"each path in {file} may have {_LONGEST_PATH} letters, got {len(path)} at entry {place}")
    if not isinstance(path, str) or not path or "\0" in path:
        raise InputError(f"each path in {file} must be a text, got {_kind(path)} at entry {place}")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_classes:
        raise InputError(
            f"each label in {file} must be a whole number from 0 to {num_classes - 1}, as the model has "
            f"{num_classes} classes, got {_kind(label)} at entry {place}"
        )
    return path, label


def _kind(value: object) -> str:
    # The value comes from a file of unknown origin: its own text may be endless.
    if isinstance(value, str) or value is None or (isinstance(value, int) and value.bit_length() < 64):
        return repr(value) if len(str(value)) <= 80 else "a very long text"
    return f"a {type(value).__name__}"
