"""The commands: flags in, exit code out. `vbp run`, `vbp demo`, and the benchmark script's entry."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import tyro

from vbp.errors import InputError, Interrupted, OutputError, PeerError
from vbp.recipes.config import PAPER, RunConfig
from vbp.recipes.run import run
from vbp.runtime.processes import check_launch, launched

_USAGE = """usage: vbp COMMAND [flags]

  vbp run      prune a classifier and fine-tune it         vbp run --data_path DATA --model_name deit_tiny_patch16_224
  vbp sweep    many ways to prune it, compared             vbp sweep --data_path DATA --keep_ratios 0.8 0.65 0.5
  vbp inspect  what can be pruned in a model               vbp inspect deit_tiny_patch16_224
  vbp latency  how much faster a pruned model is           vbp latency output/vbp/artifact
  vbp export   a pruned model for use without vbp          vbp export output/vbp/artifact --output model.onnx
  vbp compare  runs side by side                           vbp compare output/keep_65 output/keep_50
  vbp demo     prune a small ViT on handwritten digits     vbp demo

`vbp COMMAND --help` lists the flags and shows an example."""


_T = TypeVar("_T")


def parse_config(arguments: Sequence[str], *, prog: str, defaults: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a run's configuration from command-line arguments; usage errors exit with code 2.

    Args:
        arguments: What was typed after the program's name.
        prog: That name.
        defaults: What holds where nothing is typed, if not the defaults of `RunConfig`.
    """
    return _parsed(RunConfig, arguments, prog, defaults)


def _parsed(kind: type[_T], arguments: Sequence[str], prog: str, defaults: Mapping[str, Any] | None = None) -> _T:
    # What has no default stays required.
    given: Any = {} if defaults is None else {"default": kind(**{"data_path": tyro.MISSING, **defaults})}
    config: _T = tyro.cli(
        kind, prog=prog, args=list(arguments), use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,), **given
    )
    return config


def run_benchmark(script: str) -> int:
    """Run the ImageNet benchmark as its script is called, and give the exit code."""

    def job() -> None:
        config = parse_config(sys.argv[1:], prog=script, defaults=PAPER)
        check_launch(script, disable_ddp=config.disable_ddp)
        _run(config)

    return _guarded(job)


def main() -> int:
    """Run the `vbp` command and give its exit code: 0, 1 for failure, 2 for usage."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        return _guarded(lambda: _say(_USAGE))
    jobs: dict[str, Callable[[], None]] = {
        "run": lambda: _run(parse_config(arguments, prog="vbp run")),
        "sweep": lambda: _sweep(arguments),
        "inspect": lambda: _inspect(arguments),
        "latency": lambda: _latency(arguments),
        "export": lambda: _export(arguments),
        "compare": lambda: _compare(arguments),
        "demo": lambda: _demo(arguments),
    }
    if command not in jobs:
        sys.stderr.write(f"vbp: unknown command {command!r}\n{_USAGE}\n")
        return 2
    return _guarded(jobs[command])


def _run(config: RunConfig) -> None:
    run(config)


# Each command imports its own job: what draws and what exports takes seconds to load.


def _sweep(arguments: Sequence[str]) -> None:
    from vbp.recipes.sweep import run_sweep
    from vbp.recipes.sweep_config import SweepConfig
    from vbp.report.published import points_of

    config = _parsed(SweepConfig, arguments, "vbp sweep")
    run_sweep(config, points_of(config.model_name))


def _inspect(arguments: Sequence[str]) -> None:
    from vbp.cli.inspect import InspectConfig, run_inspect

    _shown(run_inspect, _parsed(InspectConfig, arguments, "vbp inspect"))


def _latency(arguments: Sequence[str]) -> None:
    from vbp.cli.latency import LatencyConfig, run_latency

    _shown(run_latency, _parsed(LatencyConfig, arguments, "vbp latency"))


def _export(arguments: Sequence[str]) -> None:
    from vbp.cli.export import ExportConfig, run_export

    _shown(run_export, _parsed(ExportConfig, arguments, "vbp export"))


def _compare(arguments: Sequence[str]) -> None:
    from vbp.cli.compare import CompareConfig, run_compare

    config = _parsed(CompareConfig, arguments, "vbp compare")
    if len(config.runs) < 2:
        sys.stderr.write(f"vbp compare: needs at least two runs, got {len(config.runs)}; vbp compare RUN RUN ...\n")
        raise SystemExit(2)
    _shown(run_compare, config)


def _demo(arguments: Sequence[str]) -> None:
    from vbp.recipes.demo import DemoConfig, run_demo

    config = _parsed(DemoConfig, arguments, "vbp demo")
    world = launched().world
    if world > 1:
        raise InputError(
            f"the demo is one process, got torchrun with {world}; start vbp demo without it, or vbp run under it"
        )
    run_demo(config)


class _Config(Protocol):
    @property
    def json(self) -> bool: ...


class _Report(Protocol):
    def table(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


_C = TypeVar("_C", bound=_Config)


def _shown(job: Callable[[_C], _Report], config: _C) -> None:
    """Do a job whose result is for the standard output: a table for people, JSON for programs."""
    report = job(config)
    _say(json.dumps(report.to_dict(), indent=2) if config.json else report.table())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _guarded(job: Callable[[], None]) -> int:
    """Show the program's log on the terminal, and what a user can mend as one line without traceback."""
    place = _place()
    handler = logging.StreamHandler(sys.stderr)
    # One process of a job tells the story; the others speak up when something is wrong.
    handler.setFormatter(logging.Formatter(f"{place}%(message)s"))
    handler.setLevel(logging.WARNING if place else logging.NOTSET)
    logger = logging.getLogger("vbp")
    logger.addHandler(handler)
    try:
        code = _code(job, place)
    except Exception:
        if not _among_others():
            raise
        traceback.print_exc()
        code = 1
    finally:
        logger.removeHandler(handler)
    if code and _among_others():
        # Threads and handles of the process group could wait for processes that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _code(job: Callable[[], None], place: str) -> int:
    try:
        _flushed(job)
    except (InputError, OutputError) as error:
        sys.stderr.write(f"{place}error: {error}\n")
        return 1
    except PeerError as error:
        # One line a node: the process that failed has said it in full.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"{place}stopped: {error}\n")
        return 1
    except Interrupted as error:
        if not place:
            sys.stderr.write(f"{error}\n")
        return 128 + error.signal
    except KeyboardInterrupt:
        sys.stderr.write(f"{place}interrupted; files written so far are whole\n")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output went away: nothing more can be said, not even at the interpreter's end.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a stream of a program that calls us may be no file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 1
    return 0


def _flushed(job: Callable[[], None]) -> None:
    """Do a job and hand on all that it said, while an error can still be told."""
    try:
        job()
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _place() -> str:
    """Return the prefix of the lines of this process: nothing for the first one."""
    rank = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"
    return "" if rank == "0" else f"[process {rank}] "


def _among_others() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")
