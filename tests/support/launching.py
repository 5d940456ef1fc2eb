"""Start jobs in processes of their own, and read what they leave."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vbp import RunConfig

DRIVE = Path(__file__).parent / "drive.py"


def environment() -> dict[str, str]:
    """Return the environment of a fresh shell; a core for each process."""
    dropped = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"OMP_NUM_THREADS": "1"}


def torchrun(*words: str | Path, launcher: tuple[str, ...] = ("--standalone", "--nproc_per_node=2")) -> list[str]:
    """Return a torchrun command."""
    return [sys.executable, "-m", "torch.distributed.run", *launcher, *map(str, words)]


def finish(command: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; a hang is a failure."""
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)


def written(config: RunConfig, folder: Path, **changes: Any) -> Path:
    """Write a configuration to a file beside its run."""
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(dataclasses.replace(config, save_dir=folder, **changes).to_dict()))
    return file


def summary(folder: Path) -> dict[str, Any]:
    """Read a report."""
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def weights(file: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a pruned model."""
    state: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["state_dict"]
    return state


def wait_for(file: Path, process: subprocess.Popen[str], pattern: str) -> None:
    """Wait until a checkpoint of this name is there."""
    limit = time.monotonic() + 120
    while not list(file.glob(pattern)):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < limit
        time.sleep(0.002)
