"""Do harm to the program and its files, and count what comes of it: right, one clear error, anything else.

    python benchmarks/faults.py kills
    python benchmarks/faults.py kills --jobs run sweep --every 10
    python benchmarks/faults.py files

`kills` ends a run, a sweep and runs that overwrite before each of their file operations, and gives the command that
goes on. `files` changes files in seven ways and reads each as vbp does. Both print a Markdown table and what was not
right; the exit code is 1 if there was anything else than a right result or one clear error.
"""

from __future__ import annotations

import sys

import fault_files
import fault_kills
import tyro
from fault_files import FileOptions
from fault_kills import KillOptions
from tyro.extras import SubcommandApp

app = SubcommandApp()


@app.command(name="kills")
def kills(options: KillOptions) -> int:
    """Kill jobs before each of their file operations."""
    return fault_kills.main(options)


@app.command(name="files")
def files(options: FileOptions) -> int:
    """Change files, and read each as vbp does."""
    return fault_files.main(options)


if __name__ == "__main__":
    sys.exit(app.cli(use_underscores=True, config=(tyro.conf.OmitArgPrefixes,)))
