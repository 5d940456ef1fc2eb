"""The commands: published flags in either spelling, exit codes, and errors that say what to type."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vbp
from vbp import InputError, OutputError, RunConfig
from vbp.cli.main import main, run_benchmark
from vbp.cli.parse import parse
from vbp.errors import Interrupted, PeerError
from vbp.recipes.config import PAPER

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/vbp/vbp_imagenet.py"

# Flag -> (default, words on the command line, what they read as).
VALUES: dict[str, tuple[Any, list[str], Any]] = {
    "model_type": ("vit", ["swin"], "swin"),
    "model_name": ("google/vit-base-patch16-224", ["convnext_tiny"], "convnext_tiny"),
    "convnext_checkpoint": (None, ["a.pth"], Path("a.pth")),
    "train_batch_size": (64, ["8"], 8),
    "val_batch_size": (128, ["8"], 8),
    "num_workers": (4, ["0"], 0),
    "keep_ratio": (0.65, ["0.5"], 0.5),
    "epochs_ft": (10, ["0"], 0),
    "lr_ft": (1.5e-5, ["1e-4"], 1e-4),
    "kd_alpha": (0.7, ["0.5"], 0.5),
    "kd_beta": (0.3, ["0.5"], 0.5),
    "kd_T": (2.0, ["4"], 4.0),
    "save_dir": (Path("./output/vbp"), ["out"], Path("out")),
    "checkpoint": (None, ["a.safetensors"], Path("a.safetensors")),
    "calib_samples": (0, ["1000"], 1000),
    "compensation": ("mean", ["none"], "none"),
    "criterion": ("variance", ["l2"], "l2"),
    "target_macs": (None, ["0.94G"], "0.94G"),
    "target_params": (None, ["80%"], "80%"),
    "target_latency_ms": (None, ["12.5"], 12.5),
    "target_speedup": (None, ["1.2"], 1.2),
    "latency_batch": (None, ["8"], 8),
    "calib_views": (1, ["2"], 2),
    "covariance_tokens": (0.2, ["0.5"], 0.5),
    "refit_kernels": ("auto", ["off"], "off"),
    "refit_producers": ("auto", ["off"], "off"),
    "refit_stream": ("auto", ["off"], "off"),
    "refit_head": ("auto", ["off"], "off"),
    "refit_views": ("auto", ["2"], 2),
    "ridge": (0.01, ["0.1"], 0.1),
    "round_to": (1, ["8"], 8),
    "min_keep_ratio": (0.02, ["0.1"], 0.1),
    "seed": (0, ["7"], 7),
    "device": ("auto", ["cuda:0"], "cuda:0"),
    "limit_val": (0, ["650"], 650),
    "stats_path": (None, ["s.safetensors"], Path("s.safetensors")),
    "img_size": (None, ["192"], 192),
    "crop_pct": (None, ["0.9"], 0.9),
    "interpolation": (None, ["bilinear"], "bilinear"),
    "mean": (None, ["0.5", "0.4", "0.3"], (0.5, 0.4, 0.3)),
    "std": (None, ["0.5", "0.4", "0.3"], (0.5, 0.4, 0.3)),
    "crop_scale": ((0.08, 1.0), ["0.5", "1"], (0.5, 1.0)),
    "model_kwargs": ({}, ['{"num_classes": 10}'], {"num_classes": 10}),
    "teacher": (None, ["source"], "source"),
    "local_rank": (None, ["3"], 3),
    "prefetch": (2, ["4"], 4),
    "max_pixels": (178_956_970, ["1000"], 1000),
    "grad_accum": (1, ["2"], 2),
    "weight_decay": (0.01, ["0.05"], 0.05),
    "warmup_epochs": (0.0, ["0.5"], 0.5),
    "clip_grad": (None, ["1"], 1.0),
    "label_smoothing": (0.0, ["0.1"], 0.1),
    "auto_augment": (None, ["rand-m9-mstd0.5-inc1"], "rand-m9-mstd0.5-inc1"),
    "reprob": (0.0, ["0.25"], 0.25),
    "drop_path": (0.0, ["0.1"], 0.1),
    "layer_decay": (1.0, ["0.75"], 0.75),
    "mixup": (0.0, ["0.8"], 0.8),
    "cutmix": (0.0, ["1"], 1.0),
    "ema_decay": (0.9998, ["0.999"], 0.999),
    "amp": ("auto", ["bf16"], "bf16"),
    "matmul_precision": ("high", ["highest"], "highest"),
    "resume": (None, ["auto"], "auto"),
    "checkpoint_minutes": (30.0, ["5"], 5.0),
    "log_dir": (None, ["logs"], Path("logs")),
    "processes": (1, ["2"], 2),
    "timeout_minutes": (30.0, ["5"], 5.0),
    "batchnorm": ("keep", ["match"], "match"),
    "include": ((), ["blocks.0.*", "*.fc1"], ("blocks.0.*", "*.fc1")),
    "exclude": ((), ["head"], ("head",)),
    "cost_aware": ("auto", ["on"], "on"),
    "attention": ("auto", ["off"], "off"),
    "objective": ("auto", ["features"], "features"),
    "text_embeddings": (None, ["texts.npy"], Path("texts.npy")),
    "attn_keep_ratio": (None, ["0.8"], 0.8),
    "tune": ("off", ["8"], 8),
    "push_to_hub": (None, ["me/vit"], "me/vit"),
}
SWITCHES = (
    "equal_widths",
    "bottleneck",
    "convolutions",
    "global_pruning",
    "norm_per_layer",
    "use_kd",
    "best_effort",
    "disable_ddp",
    "overwrite",
    "allow_random_init",
    "allow_bad_dense",
    "compare_uncompensated",
    "ema",
    "compile",
    "grad_checkpointing",
)
FLAGS = VALUES | {name: (False, [], True) for name in SWITCHES}
DATA = ["--data_path", "data"]


@pytest.fixture(autouse=True)
def plain_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stand in an empty folder, launched by nobody."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Return the configurations that would have been run."""
    configs: list[RunConfig] = []
    monkeypatch.setattr("vbp.recipes.run.run", configs.append)
    return configs


@pytest.fixture
def type_(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that types a command: the benchmark's, or `vbp` with `entry=main`."""

    def run(*words: str, entry: Callable[[], int] = lambda: run_benchmark(SCRIPT)) -> int:
        monkeypatch.setattr(sys, "argv", ["program", *words])
        return entry()

    return run


def parsed(*words: str) -> RunConfig:
    """Read a benchmark's command line."""
    return parse(RunConfig, [*DATA, *words], SCRIPT, PAPER)


def test_without_flags_the_defaults_are_the_published_ones() -> None:
    config = parsed()
    assert config == RunConfig("data", **PAPER)
    assert {name: getattr(config, name) for name in FLAGS} == {
        name: default for name, (default, _, _) in FLAGS.items()
    }


@pytest.mark.parametrize("name", list(FLAGS))
def test_a_flag_is_read_with_underscores_and_with_hyphens(name: str) -> None:
    default, words, value = FLAGS[name]
    expected = RunConfig("data", **{**PAPER, name: value})
    assert value != default
    assert parsed(f"--{name}", *words) == expected
    assert parsed(f"--{name.replace('_', '-')}", *words) == expected
    if len(words) == 1:
        assert parsed(f"--{name}={words[0]}") == expected


def test_the_local_rank_of_older_launchers_changes_nothing_else() -> None:
    first = parse(RunConfig, ["--local-rank=0", *DATA], SCRIPT)
    assert first == RunConfig("data", local_rank=0)


def help_text(command: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command prints on the way to exit code 0."""
    with pytest.raises(SystemExit) as exit_:
        command()
    assert exit_.value.code == 0
    return capsys.readouterr().out


def entries(text: str) -> dict[str, str]:
    """Return the flags and arguments of a help, and their texts on one line."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := re.match(r"  (--\w+|[A-Z.]{3,}.*?)(?: |$)(.*)", line):
            found[name := match[1]] = match[2]
        elif line.startswith("      ") and found:
            found[name] += " " + line
    return {name: " ".join(words.split()) for name, words in found.items()}


def test_the_help_shows_every_flag_with_underscores_and_the_defaults_of_this_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text(lambda: parse(RunConfig, ["--help"], SCRIPT, PAPER), capsys)
    shown = entries(text)
    assert set(shown) == {f"--{name}" for name in {"data_path", "no_hflip", "config", *FLAGS}}
    for name, (default, _, _) in FLAGS.items():
        expected = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        if default is None or default is False or default in ((), {}):
            assert "(default:" not in shown[f"--{name}"], name
        else:
            assert shown[f"--{name}"].endswith(f"(default: {expected})"), name
    assert shown["--data_path"].endswith("(required)")
    assert shown["--no_hflip"].startswith("Turn off what is on by default: mirror half of the training images")


def test_the_help_of_the_script_shows_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_text(lambda: parse(RunConfig, ["--help"], SCRIPT, PAPER), capsys).splitlines()
    assert lines[0] == f"usage: torchrun --nproc_per_node=N {SCRIPT} --data_path FOLDER [flags]"
    assert lines[1] == f"       python {SCRIPT} --disable_ddp --data_path FOLDER [flags]"
    (example,) = [line for line in lines if line.startswith("Example: ")]
    assert example.startswith(f"Example: python {SCRIPT} --disable_ddp --data_path DATA --model_name")
    about = " ".join(lines[3 : lines.index(example)])
    assert "in the paper: criterion variance, compensation mean, batchnorm keep." in about


def test_the_flags_of_a_run_are_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(lambda: parse(RunConfig, ["-h"], "vbp run"), capsys)
    assert re.findall(r"^(\S.*):$", text, re.MULTILINE) == [
        "model", "data", "pruning", "budget", "refit", "fine-tuning", "speed", "long runs", "output",
        "settings and help",
    ]  # fmt: skip
    shown = entries(text)
    assert shown["--checkpoint"].startswith("FILE Weights")
    assert shown["--model_type"].startswith("vit|convnext|swin|auto Family")
    assert shown["--calib_samples"].startswith("N|auto Training images")
    assert shown["--crop_scale"].startswith("LEAST LARGEST Least")


def test_the_defaults_in_the_help_are_those_of_the_settings_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data_path: images\nuse_kd: true\nepochs_ft: 3\n")
    text = help_text(lambda: parse(RunConfig, ["--config", str(file), "--help"], "vbp run"), capsys)
    shown = entries(text)
    assert text.startswith("usage: vbp run [flags]\n")
    assert shown["--data_path"].endswith("(default: images)")
    assert shown["--epochs_ft"].endswith("(default: 3)")
    assert shown["--no_use_kd"] == "Turn off what is on by default: distil from the unpruned model."


@pytest.mark.parametrize(("words", "expected"), [([], True), (["--use_kd"], True), (["--no_use_kd"], False)])
def test_a_switch_of_the_settings_file_can_be_typed_or_turned_off(
    words: list[str], expected: bool, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data_path: images\nuse_kd: true\n")
    assert parse(RunConfig, ["--config", str(file), *words], "vbp run").use_kd is expected


COMMANDS = ("run", "finetune", "sweep", "inspect", "latency", "export", "eval", "predict", "compare", "demo")


@pytest.mark.parametrize("columns", ["40", "80", "200"])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_fits_the_terminal_and_every_flag_has_a_group_and_a_text(
    command: str,
    columns: str,
    type_: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = help_text(lambda: type_(command, "--help", entry=main), capsys)
    assert text.startswith(f"usage: vbp {command} ")
    # A new flag belongs into one of the groups of vbp/cli/flags.py.
    assert "\nother:\n" not in text
    assert all(len(words.split()) > 2 for words in entries(text).values())
    width = min(120, max(64, int(columns)))
    # What is to be copied stands on one line.
    long = [line for line in text.splitlines() if len(line) > width and not line.startswith(("usage:", "Example:"))]
    assert long == []


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--data_path"],
        [*DATA, "--keep_ratio", "half"],
        [*DATA, "--train_batch_size", "1.5"],
        [*DATA, "--model_type", "resnet"],
        [*DATA, "--compensation", "median"],
        [*DATA, "--use_kd", "yes"],
        [*DATA, "--no_use_kd"],
        [*DATA, "--keep_rate", "0.5"],
        [*DATA, "stray"],
        [*DATA, "--hflip", "False"],
        [*DATA, "--model_kwargs", "[]"],
    ],
)
def test_a_usage_error_exits_with_2_before_anything_runs(
    words: list[str], ran: list[RunConfig], type_: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for typed, entry in ((words, lambda: run_benchmark(SCRIPT)), (["run", *words], main)):
        with pytest.raises(SystemExit) as exit_:
            type_(*typed, entry=entry)
        assert exit_.value.code == 2
        assert "Traceback" not in capsys.readouterr().err
    assert ran == []


def test_without_torchrun_the_script_says_what_to_type(
    ran: list[RunConfig], type_: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_(*DATA) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {SCRIPT} must be started by torchrun or with --disable_ddp, got neither")
    assert f"python {SCRIPT} --disable_ddp" in error
    assert f"torchrun --nproc_per_node=4 {SCRIPT}" in error
    assert ran == []


@pytest.mark.parametrize(("words", "size"), [(["--disable_ddp"], None), ([], "1"), (["--disable_ddp"], "1")])
def test_one_process_runs(
    words: list[str],
    size: str | None,
    ran: list[RunConfig],
    type_: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert type_(*DATA, *words) == 0
    assert ran == [RunConfig("data", disable_ddp=bool(words), **PAPER)]


def test_several_processes_run_unless_told_to_be_one(
    ran: list[RunConfig], type_: Callable[..., int], monkeypatch: pytest.MonkeyPatch, launched: list[int]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert type_(*DATA) == 0
    assert ran == [RunConfig("data", **PAPER)]
    type_(*DATA, "--disable_ddp")
    assert launched == [1]
    assert len(ran) == 1


def test_the_demo_is_one_process(
    type_: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    launched: list[int],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    type_("demo", entry=main)
    assert launched == [1]
    assert "error: the demo is one process" in capsys.readouterr().err


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the codes with which a process among others would have ended at once."""
    codes: list[int] = []
    monkeypatch.setattr("vbp.cli.main.os._exit", codes.append)
    return codes


@pytest.mark.parametrize("size", ["", "two"])
def test_a_world_size_that_is_no_count_is_one_clear_error(
    size: str,
    ran: list[RunConfig],
    type_: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("vbp.cli.main.os._exit", lambda code: None)
    assert type_(*DATA) == 1
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE must be a whole number")
    assert ran == []


def test_the_script_does_what_the_paper_does_and_the_command_what_is_best(
    ran: list[RunConfig], type_: Callable[..., int]
) -> None:
    type_(*DATA, "--disable_ddp")
    type_("run", *DATA, entry=main)
    chosen = [(config.criterion, config.compensation, config.batchnorm) for config in ran]
    assert chosen == [("variance", "mean", "keep"), ("auto", "refit", "auto")]


def test_the_library_command_needs_no_launcher(ran: list[RunConfig], type_: Callable[..., int]) -> None:
    assert type_("run", *DATA, "--keep-ratio", "0.5", entry=main) == 0
    assert ran == [RunConfig("data", keep_ratio=0.5)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attn_keep_ratio", "0.8"], "attn_keep_ratio changes nothing unless attention is pruned"),
        (["--criterion", "l2", "--norm_per_layer"], "norm_per_layer divides variances, got criterion l2"),
        (["--kd_T", "4"], "kd_T change nothing without distillation"),
        (["--keep_ratio", "1.3"], "keep_ratio must be in (0, 1], got 1.3"),
        ([], "data_path must hold train/<class>/ and val/<class>/, got no folder data"),
    ],
)
def test_a_refused_run_is_one_message_and_code_1(
    words: list[str], message: str, type_: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for typed, entry in (((*DATA, "--disable_ddp"), lambda: run_benchmark(SCRIPT)), (("run", *DATA), main)):
        assert type_(*typed, *words, entry=entry) == 1
        output = capsys.readouterr()
        assert output.err.startswith(f"error: {message}")
        assert len(output.err.splitlines()) == 1
        assert output.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("no such model"), 1, "error: no such model\n"),
        (OutputError("disk full"), 1, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "interrupted; files written so far are whole\n"),
        (Interrupted(15, "stopped by SIGTERM"), 143, "stopped by SIGTERM\n"),
        (PeerError("process 1 of 2 failed: bad"), 1, "stopped: process 1 of 2 failed: bad\n"),
    ],
)
def test_an_error_that_a_user_can_mend_has_no_traceback(
    error: BaseException,
    code: int,
    message: str,
    type_: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(config: RunConfig) -> None:
        raise error

    monkeypatch.setattr("vbp.recipes.run.run", fail)
    assert type_(*DATA, "--disable_ddp") == code
    assert capsys.readouterr().err == message


def test_a_fault_of_the_program_is_not_hidden(type_: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: RunConfig) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("vbp.recipes.run.run", fail)
    handlers = list(logging.getLogger("vbp").handlers)
    with pytest.raises(ZeroDivisionError):
        type_(*DATA, "--disable_ddp")
    assert logging.getLogger("vbp").handlers == handlers


def test_the_log_is_on_the_terminal_during_a_command_and_not_after(
    type_: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("vbp.somewhere")
    monkeypatch.setattr("vbp.recipes.run.run", lambda config: logger.warning("top-1 %.1f", 80.0))
    handlers = list(logging.getLogger("vbp").handlers)
    assert type_(*DATA, "--disable_ddp") == 0
    assert capsys.readouterr().err == "top-1 80.0\n"
    assert logging.getLogger("vbp").handlers == handlers


@pytest.mark.parametrize("command", ["prune", "--keep_ratio", ""])
def test_an_unknown_command_is_a_usage_error(
    command: str, type_: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_(command, entry=main) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"vbp: unknown command {command!r}\nusage: vbp COMMAND")
    assert output.out == ""


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_the_command_alone_lists_its_commands(
    words: list[str], type_: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_(*words, entry=main) == 0
    output = capsys.readouterr()
    commands = ["run", "sweep", "inspect", "latency", "export", "finetune", "eval", "predict", "compare", "demo"]
    assert re.findall(r"^  vbp (\w+)", output.out, re.MULTILINE) == commands
    assert output.err == ""


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"]])
def test_a_reader_that_went_away_is_no_traceback(
    words: list[str],
    type_: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert type_(*words, entry=main) == 1
        stdout.write("what the interpreter flushes at its end goes nowhere")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("runs", [[], ["output/a"]])
def test_a_comparison_of_less_than_two_runs_is_a_usage_error(
    runs: list[str], type_: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        type_("compare", *runs, entry=main)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith(f"vbp compare: needs at least two runs, got {len(runs)}")


class Report:
    """What a command shows."""

    def table(self) -> str:
        return ""


def test_every_command_of_the_usage_text_parses(
    ran: list[RunConfig],
    type_: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    demos: list[Any] = []
    monkeypatch.setattr("vbp.recipes.demo.run_demo", demos.append)
    shown: list[Any] = []
    monkeypatch.setattr("vbp.sweeps.sweep.run_sweep", shown.append)
    monkeypatch.setattr("vbp.recipes.run.run_finetune", shown.append)
    for module, command in (
        *((command, command) for command in ("inspect", "latency", "export", "compare")),
        ("evaluate", "eval"),
        ("evaluate", "predict"),
    ):
        monkeypatch.setattr(f"vbp.cli.{module}.run_{command}", lambda config: shown.append(config) or Report())
    assert type_(entry=main) == 0
    lines = re.findall(r"^  vbp \w+ .*  vbp (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert [type_(*line.split(), entry=main) for line in lines] == [0] * 10
    assert (len(ran), len(demos), len(shown)) == (1, 1, 8)


def test_the_demo_takes_its_own_flags(type_: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    demos: list[Any] = []
    monkeypatch.setattr("vbp.recipes.demo.run_demo", demos.append)
    assert type_("demo", "--keep-ratio", "0.4", "--epochs_ft", "1", "--folder", "here", entry=main) == 0
    (demo,) = demos
    assert (demo.keep_ratio, demo.epochs_ft, demo.folder) == (0.4, 1, Path("here"))
    with pytest.raises(SystemExit) as exit_:
        type_("demo", *DATA, entry=main)
    assert exit_.value.code == 2


def test_the_script_shows_its_help_from_any_folder(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    result = subprocess.run(
        [sys.executable, ROOT / SCRIPT, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "--keep_ratio" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "words"), [("tyro", ["--help"]), ("torch", ["--data_path", "data"])])
def test_an_interruption_while_the_libraries_load_is_one_line(module: str, words: list[str], tmp_path: Path) -> None:
    # What reads the flags, and what the job loads first.
    (tmp_path / f"{module}.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    places = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-m", "vbp.cli.main", "run", *words], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)}, preexec_fn=_hears_interrupts,
    )  # fmt: skip
    assert (result.returncode, result.stderr, result.stdout) == (130, "interrupted before anything began\n", "")


def _hears_interrupts() -> None:
    """Undo what a shell does to programs in its background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_version_is_printed(type_: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert type_("--version", entry=main) == 0
    assert capsys.readouterr().out == f"vbp {vbp.__version__}\n"


def test_images_are_not_mirrored_on_request() -> None:
    assert parsed("--no_hflip") == RunConfig("data", **{**PAPER, "hflip": False})


def test_settings_come_from_a_file_with_flags_on_top(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data_path: images\nlr_ft: 1e-4\nmean: [0.5, 0.4, 0.3]\nkeep_ratio: 0.5\nuse_kd: true\n")
    read = parse(RunConfig, ["--config", str(file), "--lr_ft", "2e-4"], "vbp run")
    expected = RunConfig("images", lr_ft=2e-4, mean=(0.5, 0.4, 0.3), keep_ratio=0.5, use_kd=True)
    assert read == expected
    assert parse(RunConfig, [f"--config={file}", "--lr_ft", "2e-4"], "vbp run") == expected
    # A budget takes the place of the one in the file.
    assert parse(RunConfig, ["--config", str(file), "--target-macs", "60%"], "vbp run").keep_ratio == 0.65
    assert parse(RunConfig, ["--config", str(file)], "vbp run", PAPER).criterion == "variance"


def test_an_earlier_run_is_repeated_from_its_settings(tmp_path: Path) -> None:
    config = RunConfig("data", keep_ratio=0.4, model_kwargs={"depth": 2}, round_to="auto", save_dir=Path("a"))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    again = parse(RunConfig, ["--config", str(tmp_path / "config.json"), "--save_dir", "b"], "vbp run")
    assert again == dataclasses.replace(config, save_dir=Path("b"))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("keep_rate: 0.5", "got unknown keep_rate"),
        ("keep_ratio: half", "keep_ratio, which must be a finite number, got 'half'"),
        ("- a\n- b", "settings by name, got list"),
        ("a: [", "must be a YAML or JSON file"),
        (None, "must be a YAML or JSON file"),
    ],
)
def test_a_file_with_other_than_settings_is_refused(
    text: str | None, error: str, tmp_path: Path, type_: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    assert type_("run", *DATA, "--config", str(file), entry=main) == 1
    assert error in capsys.readouterr().err


def test_a_pipe_is_no_file_of_settings(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(InputError, match="must be a YAML or JSON file of settings"):
        parse(RunConfig, [*DATA, "--config", str(tmp_path / "run.yaml")], "vbp run")


def test_without_a_file_config_is_refused(type_: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert type_("run", *DATA, "--config", entry=main) == 1
    assert "--config needs a file" in capsys.readouterr().err
