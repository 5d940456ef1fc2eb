"""Change files in many ways, read each as vbp does, and count what comes of it.

    python benchmarks/fault_files.py
    python benchmarks/fault_files.py --mutations 4000 --seed 1
    python benchmarks/fault_files.py --readers statistics --mutations 100

Each change is read in a child process of its own with limits on memory, processor time and time, so that one
reading cannot harm the next. Changes are drawn by the seed: bits that flip, an end that is cut off, runs of zeros,
parts that are doubled, removed or exchanged, values that change places, and hostile values; the last two with a
digest that fits, where the format has one. Prints a Markdown table, and what was neither right nor one clear error;
the exit code is 1 if there was any.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal

import torch
import tyro
from fault_readers import READERS, Reader

from vbp.errors import InputError

Outcome = Literal["right", "error", "other value", "wrong"]
Change = Literal["bits", "cut", "zeros", "splice", "exchange", "swapped values", "hostile value"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("right", "error", "other value", "wrong")
CHANGES: Final[tuple[Change, ...]] = ("bits", "cut", "zeros", "splice", "exchange", "swapped values", "hostile value")
HOSTILE: Final[tuple[Any, ...]] = (
    *(10**400, -(10**400), 2**63, 2_000_000_000, -1, 0, 1e308, 1e-308, float("nan"), float("inf"), True, None),
    *(
        "",
        "\0",
        "../../x",
        "/dev/zero",
        "x" * 100_000,
        "\ud800",
        "line\nbreak",
        [],
        {},
        [[]] * 1000,
        {"a": {}},
        [1, 2],
    ),
)


@dataclass(frozen=True)
class FileOptions:
    """Change files, read each, and count what comes of it."""

    mutations: int = 2000
    """Changed files in all, as many of each kind of file."""
    seed: int = 0
    """Draws the changes."""
    readers: tuple[str, ...] = ()
    """The kinds of files, by name; all by default."""
    memory_mib: int = 512
    """MiB that one reading may take beyond what the program has."""
    seconds: int = 20
    """Seconds of processor time that one reading may take."""


@dataclass(frozen=True)
class Reading:
    """What came of one changed file; memory in MiB beyond that of the program."""

    reader: str
    number: int
    change: Change
    outcome: Outcome
    text: str
    memory_mib: float
    seconds: float


def changed(content: bytes, change: Change, draw: random.Random, reader: Reader) -> bytes:
    """Return the content of a file after a change."""
    size = len(content)
    # Half of the changes hit what a format begins with.
    place = draw.randrange(min(size, 512) if draw.random() < 0.5 else size)
    length = draw.randint(1, max(1, min(size // 4, 2 ** draw.randint(0, 12))))
    if change == "bits":
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 1, 10))):
            damaged[draw.randrange(place, min(size, place + 64))] ^= 1 << draw.randrange(8)
        return bytes(damaged)
    if change == "cut":
        return content[:place]
    if change == "zeros":
        return content[:place] + bytes(min(length, size - place)) + content[place + length :]
    other = draw.randrange(size)
    if change == "splice":
        inserted = content[other : other + length] if draw.random() < 0.7 else b""
        return content[:place] + inserted + content[place + draw.choice((0, length)) :]
    if change == "exchange":
        first, second = sorted((place, other))
        length = min(length, second - first, size - second)
        one, two = content[first : first + length], content[second : second + length]
        return content[:first] + two + content[first + length : second] + one + content[second + length :]
    assert reader.parse is not None
    assert reader.format is not None
    return reader.format(_changed_values(reader.parse(content), change, draw))


def _changed_values(content: Any, change: Change, draw: random.Random) -> Any:
    """Return nested data of which one value is another, or two are exchanged."""
    content = copy.deepcopy(content)
    container, key = _place(content, draw)
    if change == "hostile value":
        container[key] = draw.choice(HOSTILE)
    else:
        other, place = _place(content, draw)
        container[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(container[key])
    return content


def _place(content: Any, draw: random.Random) -> tuple[Any, Any]:
    """Return a dictionary or list in nested data and a key in it; those of each level are drawn alike."""
    container, key = content, draw.choice([*content] if isinstance(content, dict) else range(len(content)))
    while isinstance(container[key], dict | list) and container[key] and draw.random() < 0.8:
        container = container[key]
        key = draw.choice([*container] if isinstance(container, dict) else range(len(container)))
    return container, key


def read_apart(reader: Reader, folder: Path, options: FileOptions) -> tuple[str, str, float, float]:
    """Read a folder in a child process: what came of it (`value`, `error` or another), text, MiB and seconds."""
    began, (receiving, sending) = time.monotonic(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        _read_and_tell(reader, folder, sending, options)
    os.close(sending)
    with os.fdopen(receiving, "rb") as answers:
        answer = answers.read()
    _, status, _ = os.wait4(child, 0)
    kind, text, memory = json.loads(answer) if answer else ("killed", f"ended with status {status:#x}", 0.0)
    return kind, text, memory, time.monotonic() - began


def _read_and_tell(reader: Reader, folder: Path, sending: int, options: FileOptions) -> None:
    """Read in this process and end it; a signal or a crash ends it without a word."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_CPU, (options.seconds, options.seconds))
    # More than is allowed, so that what asks for too much is seen to take it; the machine is safe all the same.
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = held + 4 * options.memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.alarm(3 * options.seconds)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    try:
        answer = ["value", reader.read(folder)]
    except InputError as error:
        text = str(error)
        clear = "\n" not in text.strip() and len(text) < 3000 and "weights_only" not in text
        answer = ["error" if clear else "unclear error", text]
    except BaseException as error:  # noqa: BLE001 (this is what is looked for)
        answer = [type(error).__name__, "".join(traceback.format_exception(error))[-3000:]]
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with os.fdopen(sending, "wb") as answers:
        answers.write(json.dumps([*answer, memory]).encode())
    os._exit(0)


def read_changed(reader: Reader, whole: Path, expected: str, number: int, options: FileOptions) -> Reading:
    """Change a copy of a whole folder and read it."""
    draw = random.Random(f"{options.seed} {reader.name} {number}")
    allowed = CHANGES if reader.parse is not None else CHANGES[:5]
    change = allowed[number % len(allowed)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "folder"
        shutil.copytree(whole, folder)
        file = folder / reader.file
        content = file.read_bytes()
        damaged = content
        while damaged == content:
            with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError):  # the format cannot say it
                damaged = changed(content, change, draw, reader)
        file.write_bytes(damaged)
        kind, text, memory, seconds = read_apart(reader, folder, options)
    outcome: Outcome = "wrong"
    if memory <= options.memory_mib:
        if kind == "error":
            outcome = "error"
        elif kind == "value":
            # Whoever can write a valid digest can write another valid content.
            sealed = reader.whole and change in CHANGES[:5]
            outcome = "right" if text == expected else "wrong" if sealed else "other value"
    return Reading(reader.name, number, change, outcome, f"{kind}: {text}", memory, seconds)


def read_all(options: FileOptions) -> Iterator[Reading]:
    """Write each kind of file once, and read it after each change."""
    chosen = [reader for reader in READERS if not options.readers or reader.name in options.readers]
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as place:
        for index, reader in enumerate(chosen):
            whole = Path(place) / str(index) / "folder"
            whole.mkdir(parents=True)
            reader.write(whole)
            # Read in this process too: what is imported then is not counted in the children.
            reader.read(_copy(whole, Path(place) / str(index) / "once"))
            kind, expected, _, _ = read_apart(reader, _copy(whole, Path(place) / str(index) / "twice"), options)
            if kind != "value":
                raise InputError(f"{reader.name} must be readable as it was written, got {kind}: {expected}")
            count = options.mutations // len(chosen) + (index < options.mutations % len(chosen))
            for number in range(count):
                yield read_changed(reader, whole, expected, number, options)


def _copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def main(options: FileOptions) -> int:
    """Print what came of all changes; return the exit code."""
    torch.set_num_threads(1)  # threads do not live on in a child
    print("| file | changed | right | one clear error | other value | anything else | peak MiB | longest s |")
    print("|---|---|---|---|---|---|---|---|")
    readings: list[Reading] = []
    for name, group in groupby(read_all(options), key=lambda reading: reading.reader):
        own = list(group)
        for reading in own:
            if reading.outcome == "wrong":
                print(f"{name}, {reading.number}, {reading.change}: {reading.text}", file=sys.stderr)
        print(_row(name, own), flush=True)
        readings += own
    print(_row("all", readings))
    return int(any(reading.outcome == "wrong" for reading in readings))


def _row(name: str, readings: Sequence[Reading]) -> str:
    counts = Counter(reading.outcome for reading in readings)
    columns = [str(len(readings)), *(str(counts[outcome]) for outcome in OUTCOMES)]
    peak, longest = max(reading.memory_mib for reading in readings), max(reading.seconds for reading in readings)
    return f"| {name} | {' | '.join(columns)} | {peak:.0f} | {longest:.1f} |"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(FileOptions, use_underscores=True)))
