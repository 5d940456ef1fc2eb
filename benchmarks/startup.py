"""What the commands cost before they do anything: processor time of fresh processes, beside that of `import torch`.

    python benchmarks/startup.py
    python benchmarks/startup.py --artifact output/demo/run/artifact --runs output/a output/b

Prints a Markdown table: median and range of user and system time together, of processes that take turns.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from vbp.deploy.artifact import installed_versions

COMMAND = "import sys; from vbp.cli.main import main; sys.exit(main())"


@dataclass(frozen=True)
class Options:
    """Time the start of commands and imports."""

    rounds: int = 7
    """Processes of each kind; they take turns."""
    artifact: str | None = None
    """A pruned model that vbp saved: `vbp inspect` of it is timed too."""
    runs: tuple[Path, ...] = ()
    """Folders of two or more runs: `vbp compare` of them is timed too."""


def programs(options: Options) -> dict[str, list[str]]:
    """Return what is timed: label -> arguments of Python."""
    commands = [["--help"], ["run", "--help"], ["run", "--no_such_flag"]]
    if options.artifact is not None:
        commands.append(["inspect", options.artifact])
    if options.runs:
        commands.append(["compare", *map(str, options.runs)])
    imports = ("import torch", "import vbp", "import vbp; vbp.prune_", "import vbp; vbp.load_classifier")
    # The first word tells what is done; a path would make the table too wide.
    return {code: ["-c", code] for code in imports} | {
        "vbp " + " ".join(words[:2] if words[0] == "run" else words[:1]): ["-c", COMMAND, *words]
        for words in commands
    }


def processor_seconds(arguments: list[str]) -> float:
    """Return the processor time of one Python process."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


def main(options: Options) -> None:
    """Time all in turns and print the table."""
    timed = programs(options)
    seconds: dict[str, list[float]] = {label: [] for label in timed}
    for _ in range(options.rounds + 1):
        for label, arguments in timed.items():
            seconds[label].append(processor_seconds(arguments))
    # The first round may read files from the disk and compile them.
    seconds = {label: values[1:] for label, values in seconds.items()}
    torch = statistics.median(seconds["import torch"])
    versions = installed_versions()
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "torchvision", "transformers"))
    print(
        f"{datetime.date.today()}; {platform.processor() or platform.machine()}, {os.cpu_count()} processors, "
        f"{platform.system()}; Python {platform.python_version()}, {used}; median of {options.rounds} processes\n"
    )
    print("| process | processor seconds | range | of `import torch` |\n|---|---|---|---|")
    for label, values in seconds.items():
        median = statistics.median(values)
        print(f"| `{label}` | {median:.2f} | {min(values):.2f} to {max(values):.2f} | {median / torch:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
