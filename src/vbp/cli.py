"""The commands: flags in, exit code out. `vbp run`, `vbp demo`, and the benchmark script's entry."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

import tyro

from vbp.config import RunConfig
from vbp.distributed import check_launch
from vbp.errors import InputError, OutputError
from vbp.recipe import run

_USAGE = """usage: vbp COMMAND [flags]

  vbp run     prune a classifier and fine-tune it      vbp run --data_path DATA --model_name deit_tiny_patch16_224
  vbp demo    the same on handwritten digits           vbp demo

`vbp COMMAND --help` lists the flags."""


def parse_config(arguments: Sequence[str], *, prog: str) -> RunConfig:
    """Read a run's configuration from command-line arguments; usage errors exit with code 2."""
    config: RunConfig = tyro.cli(
        RunConfig,
        prog=prog,
        args=list(arguments),
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return config


def run_benchmark(script: str) -> int:
    """Run the ImageNet benchmark as its script is called, and give the exit code."""

    def job() -> None:
        config = parse_config(sys.argv[1:], prog=script)
        check_launch(script, disable_ddp=config.disable_ddp)
        _run(config)

    return _guarded(job)


def main() -> int:
    """Run the `vbp` command and give its exit code: 0, 1 for failure, 2 for usage."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        sys.stdout.write(_USAGE + "\n")
        return 0
    jobs: dict[str, Callable[[], None]] = {
        "run": lambda: _run(parse_config(arguments, prog="vbp run")),
        "demo": lambda: _demo(arguments),
    }
    if command not in jobs:
        sys.stderr.write(f"vbp: unknown command {command!r}\n{_USAGE}\n")
        return 2
    return _guarded(jobs[command])


def _run(config: RunConfig) -> None:
    run(config)


def _demo(arguments: Sequence[str]) -> None:
    from vbp.demo import DemoConfig, run_demo

    run_demo(
        tyro.cli(
            DemoConfig,
            prog="vbp demo",
            args=list(arguments),
            use_underscores=True,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    )


def _guarded(job: Callable[[], None]) -> int:
    """Show the program's log on the terminal, and what a user can mend as one line without traceback."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("vbp")
    logger.addHandler(handler)
    try:
        job()
    except (InputError, OutputError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; files written so far are whole\n")
        return 130
    except BrokenPipeError:
        # The reader of our output went away: nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        return 1
    finally:
        logger.removeHandler(handler)
    return 0
