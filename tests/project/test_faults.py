"""A part of the benchmark that changes files: the whole of it takes minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fault_files.py"
_READERS = (
    "pruned .pth",
    "artefact, vbp.json",
    "statistics",
    "plan.json",
    "list of samples",
    "tar shard",
    "sweep.json",
    "point of a sweep",
)


def test_changed_files_are_right_or_one_clear_error() -> None:
    command = [sys.executable, str(_SCRIPT), "--mutations", "56", "--readers", *_READERS]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("| all | 56 |")
    for reader in _READERS:
        assert f"| {reader} | 7 |" in ended.stdout
