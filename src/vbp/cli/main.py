"""The commands: flags in, exit code out. `vbp run`, `vbp demo`, and the benchmark script's entry."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vbp import __version__
from vbp.cli.launch import is_launcher, launch
from vbp.cli.parse import parse
from vbp.errors import InputError, Interrupted, OutputError, PeerError, printable
from vbp.runtime.log_file import LineFormatter, told_if_slow
from vbp.runtime.signals import reading_processes, stop_at_sigterm

_log = logging.getLogger(__name__)

_USAGE = """usage: vbp COMMAND [flags]

  vbp run      prune a classifier and fine-tune it         vbp run --data_path DATA --model_name deit_tiny_patch16_224
  vbp sweep    many ways to prune it, compared             vbp sweep --data_path DATA --keep_ratios 0.8 0.65 0.5
  vbp inspect  what can be pruned in a model               vbp inspect deit_tiny_patch16_224
  vbp latency  how much faster a pruned model is           vbp latency output/vbp/artifact
  vbp export   a pruned model for use without vbp          vbp export output/vbp/artifact --output model.onnx
  vbp finetune fine-tune a pruned model                    vbp finetune output/vbp --data_path DATA --use_kd
  vbp eval     accuracy, beside the dense model's          vbp eval output/vbp --data_path DATA --dense auto
  vbp predict  the classes of image files                  vbp predict output/vbp photo.jpg
  vbp compare  runs side by side                           vbp compare output/keep_65 output/keep_50
  vbp demo     prune a small ViT on handwritten digits     vbp demo

`vbp COMMAND --help` lists the flags and shows an example; `vbp --version` prints the version. The folder of a run may
stand wherever a pruned model is asked for."""

# Command -> the class of its flags, and its job. One whose flags have `json` returns what is shown on the standard
# output: a table for people, JSON for programs.
_COMMANDS = {
    "run": ("vbp.recipes.config:RunConfig", "vbp.recipes.run:run_to_budget"),
    "finetune": ("vbp.recipes.config:FinetuneConfig", "vbp.recipes.run:run_finetune"),
    "sweep": ("vbp.sweeps.config:SweepConfig", "vbp.sweeps.sweep:run_sweep"),
    "sweep FOLDER": ("vbp.sweeps.config:MergeConfig", "vbp.sweeps.merge:run_merge"),
    "inspect": ("vbp.cli.options:InspectConfig", "vbp.cli.inspect:run_inspect"),
    "latency": ("vbp.cli.options:LatencyConfig", "vbp.cli.latency:run_latency"),
    "export": ("vbp.cli.options:ExportConfig", "vbp.cli.export:run_export"),
    "eval": ("vbp.cli.options:EvalConfig", "vbp.cli.evaluate:run_eval"),
    "predict": ("vbp.cli.options:PredictConfig", "vbp.cli.evaluate:run_predict"),
    "compare": ("vbp.cli.options:CompareConfig", "vbp.cli.compare:run_compare"),
    "demo": ("vbp.recipes.config:DemoConfig", "vbp.recipes.demo:run_demo"),
}


def main() -> int:
    """Run the `vbp` command and return its exit code: 0, 1 for failure, 2 for usage."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        return guarded(lambda: _say(_USAGE))
    if command == "--version":
        return guarded(lambda: _say(f"vbp {__version__}"))
    if command not in _COMMANDS:
        sys.stderr.write(f"vbp: unknown command {command!r}\n{_USAGE}\n")
        return 2
    return guarded(lambda: _do(command, arguments))


def _do(command: str, arguments: Sequence[str]) -> None:
    """Read the flags of a command, then import its job: it loads torch, which help and a wrong flag do not need."""
    if command == "sweep" and arguments and not arguments[0].startswith("-"):
        command = "sweep FOLDER"
    flags, job_name = _COMMANDS[command]
    with _loading():
        config = parse(pkgutil.resolve_name(flags), arguments, f"vbp {command.removesuffix(' FOLDER')}")
        starts = _is_launcher(config)
        job = None if starts else pkgutil.resolve_name(job_name)
    if job is None:
        launch(config.processes, [sys.executable, "-m", "vbp.cli.main", command, *arguments])
        return
    report = job(config)
    if hasattr(config, "json"):
        _say(json.dumps(report.to_dict(), indent=2) if config.json else report.table())


def _is_launcher(config: Any) -> bool:
    """Return whether this process only starts those of the job, after the checks that need none of them."""
    if not is_launcher(getattr(config, "processes", 1), disable_ddp=getattr(config, "disable_ddp", False)):
        return False
    from vbp.recipes.checks import check_config
    from vbp.recipes.config import RunConfig

    check_config(config if isinstance(config, RunConfig) else config.run_config())
    return True


def run_benchmark(script: str) -> int:
    """Run the ImageNet benchmark as its script is called, and return the exit code."""

    def job() -> None:
        with _loading():
            from vbp.recipes.config import PAPER, RunConfig

            config = parse(RunConfig, sys.argv[1:], script, PAPER)
            starts = _is_launcher(config)
            from vbp.recipes.run import run_to_budget
            from vbp.runtime.processes import check_launch
        if starts:
            launch(config.processes, [sys.executable, *sys.argv])
            return
        check_launch(script, disable_ddp=config.disable_ddp)
        run_to_budget(config)

    return guarded(job)


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Report an interrupt while flags are read and libraries load: nothing has begun."""
    try:
        with told_if_slow(_log, "loading the libraries") if sys.stderr.isatty() else contextlib.nullcontext():
            yield
    except KeyboardInterrupt as error:
        number = error.signal if isinstance(error, Interrupted) else signal.SIGINT
        raise Interrupted(number, "interrupted before anything began") from None


def _say(text: str) -> None:
    sys.stdout.writelines(printable(line) + "\n" for line in text.split("\n"))


def guarded(job: Callable[[], None]) -> int:
    """Show the program's log on the terminal, and what a user can mend as one line without traceback."""
    place = _place()
    handler = logging.StreamHandler(sys.stderr)
    # One process of a job logs its progress; the others log only warnings and errors.
    handler.setFormatter(LineFormatter(f"{place}%(message)s"))
    handler.setLevel(logging.WARNING if place else logging.NOTSET)
    logger = logging.getLogger("vbp")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with stop_at_sigterm():
            code = _code(job, place)
    except Exception:
        if not _among_others():
            raise
        traceback.print_exc()
        code = 1
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
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
        sys.stderr.write(f"{place}error: {printable(str(error))}\n")
        return 1
    except PeerError as error:
        # The process that failed has said it in full, if it could.
        if error.shown:
            sys.stderr.write(f"{place}stopped: {printable(str(error))}\n")
        return 1
    except Interrupted as error:
        if not place:
            sys.stderr.write(f"{printable(str(error))}\n")
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
    """Do a job and flush its output, while an error can still be reported."""
    try:
        with reading_processes():
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


if __name__ == "__main__":
    sys.exit(main())
