"""Kill a job before each of its file operations, give the command that goes on, and count what comes of it.

An audit hook counts what a job opens for writing, renames, removes and makes below its folders, and kills the process
with SIGKILL before the n-th. The command that goes on is right if it leaves the same files as a job that nobody
killed, with the same bytes where two such jobs have the same, and nothing else in its folder or beside the images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import os
import platform
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG

import vbp.cost.timing
import vbp.report.html  # loaded once: each killed process is a fork of this one
import vbp.sweeps.figures
from vbp.cli.main import guarded
from vbp.data.digits import write_digits
from vbp.deploy.artifact import installed_versions
from vbp.recipes.config import DemoConfig, RunConfig
from vbp.recipes.demo import demo_run_config
from vbp.recipes.run import run
from vbp.sweeps.config import SweepConfig
from vbp.sweeps.sweep import run_sweep

JobName = Literal["run", "prune", "sweep", "overwrite", "overwrite_sweep"]
Outcome = Literal["right", "one clear error", "anything else"]

# Audit events of the file operations that change a folder; `open` is one where it is for writing.
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NEVER = sys.maxsize


@dataclass(frozen=True)
class KillOptions:
    """Kill a run, a sweep and runs that overwrite, before each of their file operations."""

    jobs: tuple[JobName, ...] = get_args(JobName)
    """Which jobs: a run with fine-tuning, one without, a sweep, and both over the results of another."""
    points: tuple[int, ...] = ()
    """Numbers of the operations, from 1; without them all, or as `every` says."""
    every: int = 1
    """Every so many-th operation."""
    images: int = 4
    """Images of each digit in each split."""


@dataclass(frozen=True)
class Job:
    """A job to kill: what is there before, the command, and the one that goes on."""

    before: Callable[[], object] | None
    first: Callable[[], object]
    again: Callable[[], object]


@dataclass(frozen=True)
class Ended:
    """How a process ended, and the last line that it wrote."""

    status: int
    operations: int
    line: str


def jobs(work: Path) -> dict[JobName, Job]:
    """Return the jobs, all on the images in `work/data` and into `work/run`."""
    whole = demo_run_config(DemoConfig(folder=work, epochs_ft=1))
    trained = dataclasses.replace(
        whole, overwrite=False, compare_uncompensated=False, latency_batch=1, train_batch_size=16
    )
    usual = {name: getattr(RunConfig, name) for name in ("use_kd", "lr_ft", "train_batch_size")}
    pruned = dataclasses.replace(trained, epochs_ft=0, **usual)
    shared = {field.name for field in dataclasses.fields(SweepConfig)} & {"data_path", "save_dir", "checkpoint"} | {
        "model_type", "model_name", "model_kwargs", "crop_pct", "interpolation", "mean", "std", "num_workers",
    }  # fmt: skip
    swept = SweepConfig(
        **{name: getattr(pruned, name) for name in shared},
        keep_ratios=(0.8, 0.5), criteria=("variance",), compensations=("none", "mean"),
    )  # fmt: skip
    other, other_sweep = dataclasses.replace(trained, keep_ratio=0.8), dataclasses.replace(swept, seed=1)

    def go(config: RunConfig | SweepConfig, **changes: Any) -> Callable[[], object]:
        config = dataclasses.replace(config, **changes)
        return lambda: run(config) if isinstance(config, RunConfig) else run_sweep(config)

    return {
        "run": Job(None, go(trained), go(trained, resume="auto")),
        "prune": Job(None, go(pruned), go(pruned, resume="auto")),
        "sweep": Job(None, go(swept), go(swept)),
        "overwrite": Job(go(other), go(trained, overwrite=True), go(trained, resume="auto")),
        "overwrite_sweep": Job(go(other_sweep), go(swept, overwrite=True), go(swept)),
    }


def in_child(job: Callable[[], object], folders: Sequence[Path], kill_before: int = _NEVER) -> Ended:
    """Do a job in a fork of this process, which is killed before an operation; return how it ended."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as counted:
        process = os.fork()
        if process == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            code = 70
            try:
                _count_operations(folders, kill_before, counted.fileno())
                vbp.cost.timing.TURN_S, vbp.cost.timing.CPU_BATCH_MACS = 0.001, 1  # times are no part of it
                code = guarded(lambda: [job()].clear())
            except BaseException:  # noqa: BLE001 (whatever it is, it is reported and counted)
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(OSError):
                        stream.flush()
                os._exit(code)
        _, status = os.waitpid(process, 0)
        counted.seek(0)
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
        return Ended(os.waitstatus_to_exitcode(status), len(counted.read()), lines[-1] if lines else "")


def _count_operations(folders: Sequence[Path], kill_before: int, counted: int) -> None:
    """Write a byte for each operation below the folders from now on, and kill this process before one of them."""
    roots, numbers = [f"{folder.resolve()}{os.sep}" for folder in folders], itertools.count(1)

    def below(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        name = f"{Path(os.fsdecode(path)).absolute()}{os.sep}"
        return any(name.startswith(root) for root in roots)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in _CHANGES:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _FOR_WRITING):
            return
        if not any(below(path) for path in arguments[: 2 if event == "os.rename" else 1]):
            return
        if next(numbers) >= kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(counted, b".")

    sys.addaudithook(hook)


def contents(work: Path) -> dict[str, str]:
    """Return a digest of each file below a folder, and the folders without one."""
    return {
        str(path.relative_to(work)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(work.rglob("*"))
    }


class Campaign:
    """Kill one job at its operations, in a folder that is made anew for each."""

    def __init__(self, work: Path, images: Path, job: Job) -> None:
        self.work, self.images, self.job = work, images, job
        self._start: Path | None = None
        self._fresh()
        if job.before is not None:
            self._done(job.before)
            self._start = work.with_name("before")
            shutil.rmtree(self._start, ignore_errors=True)
            shutil.copytree(work / "run", self._start)
        self.operations, self.whole = self._reference()

    def _fresh(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.images, self.work / "data")
        if self._start is not None:
            shutil.copytree(self._start, self.work / "run")

    def _done(self, job: Callable[[], object]) -> Ended:
        ended = in_child(job, [self.work])
        if ended.status != 0:
            raise SystemExit(f"a job that nobody killed ended with {ended.status}: {ended.line}")
        return ended

    def _reference(self) -> tuple[int, Mapping[str, str]]:
        """Return the operations of the job, and what it leaves: digests where two attempts left the same bytes."""
        left = []
        for _ in range(2):
            self._fresh()
            operations = self._done(self.job.first).operations
            left.append(contents(self.work))
        one, other = left
        if one.keys() != other.keys():
            raise SystemExit(f"two jobs left different files: {sorted(one.keys() ^ other.keys())}")
        return operations, {name: digest if other[name] == digest else "" for name, digest in one.items()}

    def kill(self, operation: int) -> tuple[Outcome, str]:
        """Kill the job before an operation and go on; return what came of it."""
        self._fresh()
        earlier = contents(self.work)
        killed = in_child(self.job.first, [self.work], kill_before=operation)
        if killed.status != -signal.SIGKILL:
            return "anything else", f"it was not killed but ended with {killed.status}: {killed.line}"
        after = contents(self.work)
        again = in_child(self.job.again, [self.work])
        if again.status == 1 and again.line.startswith("error: "):
            # An earlier job that was not touched yet is rightly kept.
            lost = [name for name, digest in earlier.items() if after.get(name) != digest]
            return (
                "anything else" if lost else "one clear error",
                f"{again.line} (changed before: {lost or 'nothing'})",
            )
        if again.status != 0:
            return "anything else", f"the command that goes on ended with {again.status}: {again.line}"
        now = contents(self.work)
        names = sorted(now.keys() ^ self.whole.keys())
        if names:
            return "anything else", f"other files than without a kill: {names}"
        different = [name for name, digest in self.whole.items() if digest and now[name] != digest]
        # It holds the command's own flags.
        different = [name for name in different if name != "run/config.json"]
        if different:
            return "anything else", f"other content than without a kill: {different}"
        return "right", ""


def write_images(folder: Path, images: int) -> None:
    """Write a few images of each digit."""
    with tempfile.TemporaryDirectory() as whole:
        write_digits(Path(whole))
        for digit in sorted(Path(whole).glob("*/*")):
            for file in sorted(digit.iterdir())[:images]:
                target = folder / file.relative_to(whole)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)


def main(options: KillOptions) -> int:
    """Kill all and print a line for each job; return 1 if anything was neither right nor one clear error."""
    torch.set_num_threads(1)  # a process with threads must not be forked
    # Figures take most of the time, and what is in their files changes nothing.
    picture = b'<svg viewBox="0 0 1 1"></svg>'
    FigureCanvasSVG.print_svg = lambda figure, file, **_: file.write(picture)  # type: ignore[method-assign]
    FigureCanvasAgg.print_png = lambda figure, file, **_: file.write(b"no picture")  # type: ignore[method-assign]
    versions = installed_versions()
    print(
        f"{datetime.date.today()}; {platform.processor() or platform.machine()}, {platform.system()}; "
        f"Python {platform.python_version()}, torch {versions['torch']}\n\n"
        "| job | file operations | killed | right | one clear error | anything else |\n|---|---|---|---|---|---|"
    )
    bad = []
    with tempfile.TemporaryDirectory(prefix="vbp-kills-") as place:
        images, work = Path(place) / "images", Path(place) / "work"
        write_images(images, options.images)
        for name in options.jobs:
            campaign, counts = Campaign(work, images, jobs(work)[name]), Counter[Outcome]()
            points = options.points or range(1, campaign.operations + 1, options.every)
            for point in points:
                outcome, reason = campaign.kill(point)
                counts[outcome] += 1
                if outcome != "right":
                    bad.append((outcome, f"{name}, killed before operation {point}: {outcome}: {reason}"))
                    sys.stderr.write(f"{bad[-1][1]}\n")
            cells = (campaign.operations, len(points), *(counts[outcome] for outcome in get_args(Outcome)))
            print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)
    print("".join(f"\n{text}" for _, text in bad))
    return int(any(outcome == "anything else" for outcome, _ in bad))
