"""Time a newcomer's commands in a fresh clone, those of the README in order, until each says something useful.

    python benchmarks/newcomer.py                 # clones the repository into a temporary folder, installs all
    python benchmarks/newcomer.py --installed     # with the vbp of this environment

Of each command it prints the first useful line, when it came, and when the command ended. What pip or make print is
no useful line. All run on the demo's digits: no data and no weights are downloaded, but the packages are.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from vbp.runtime.tables import format_seconds, text_table

ROOT = Path(__file__).resolve().parent.parent

# A line with one of these words says something of the model.
USEFUL = re.compile(r"top-1|MACs|dense|results in|images|\d %|onnx|speed-up|blocks\.")
# What a newcomer types, in this order; {digit} is one of the demo's images.
COMMANDS = (
    "make demo",
    "vbp inspect deit_tiny_patch16_224",
    "vbp run --data_path output/demo/data --model_name output/demo/run --keep_ratio 0.7 --epochs_ft 0 "
    "--num_workers 0 --save_dir output/smaller",
    "vbp eval output/demo/run --data_path output/demo/data --num_workers 0",
    "vbp predict output/demo/run {digit}",
    "vbp finetune output/demo/run --data_path output/demo/data --epochs_ft 1 --num_workers 0 --save_dir output/tuned",
    "vbp latency output/demo/run --batch_sizes 1",
    "vbp export output/demo/run --to onnx --output output/digits.onnx",
    "vbp compare output/demo/run output/smaller",
)


@dataclass(frozen=True)
class Config:
    """What is timed."""

    installed: bool = False
    """Take the vbp of this environment, and the demo by vbp demo, in the place of make demo in a fresh clone."""


@dataclass(frozen=True)
class Timed:
    """A command, its first useful line, and seconds until this line and until the end."""

    command: str
    line: str
    first: float
    whole: float


def time_command(words: list[str], folder: Path, environment: dict[str, str]) -> Timed:
    """Run a command, and return when its first useful line came; end the program if it fails."""
    begin, first, said = time.perf_counter(), None, list[str]()
    process = subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line.rstrip())
        if first is None and USEFUL.search(line) and not line.startswith((".venv/bin/", "python3 -")):
            first = time.perf_counter() - begin, line.strip()
    whole = time.perf_counter() - begin
    if process.wait() or first is None:
        sys.exit(f"{shlex.join(words)} ended with {process.returncode}:\n" + "\n".join(said[-20:]))
    return Timed(shlex.join(words), first[1], first[0], whole)


def main(config: Config) -> None:
    """Time all commands, and print a table."""
    with tempfile.TemporaryDirectory() as place:
        folder, environment = Path(place) / "vbp", dict(os.environ)
        if config.installed:
            folder.mkdir()
            programs = Path(sys.executable).parent
        else:
            subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
            programs = folder / ".venv/bin"
            # Whatever is active where this is started is not there for a newcomer.
            for name in ("PYTHONPATH", "VIRTUAL_ENV"):
                environment.pop(name, None)
        environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
        rows = [("command", "first useful line after", "whole", "the line")]
        for command in COMMANDS:
            words = shlex.split("vbp demo" if config.installed and command == "make demo" else command)
            digit = next(iter(sorted(folder.glob("output/demo/data/val/3/*.png"))), folder)
            timed = time_command([word.format(digit=digit) for word in words], folder, environment)
            shown = timed.command.replace(f"{folder}/", "")
            rows.append((shown, format_seconds(timed.first), format_seconds(timed.whole), timed.line[:70]))
            print(f"{shown}: {rows[-1][1]}", file=sys.stderr)
        print(text_table(rows, "lrrl"))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
