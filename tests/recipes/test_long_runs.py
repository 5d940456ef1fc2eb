"""A run that is killed and taken up again ends where one ends that was never interrupted, to the last bit."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import DRIVE, environment, summary, wait_for, weights, written

from vbp import InputError, RunConfig, run
from vbp.recipes.config import DemoConfig
from vbp.recipes.demo import demo_run_config
from vbp.training.checkpoints import latest_checkpoint, read_checkpoint


@pytest.fixture(scope="module")
def config(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Return a run that uses everything that draws at random: augmentation, Mixup, dropped paths, an average."""
    folder = tmp_path_factory.mktemp("long")
    whole = demo_run_config(DemoConfig(folder=demo_folder, epochs_ft=2))
    kwargs = dict(whole.model_kwargs) | {"drop_path_rate": 0.2, "proj_drop_rate": 0.1}
    return dataclasses.replace(
        whole, overwrite=False, model_kwargs=kwargs, mixup=0.2, cutmix=0.5, label_smoothing=0.1, ema=True,
        ema_decay=0.9, grad_accum=2, warmup_epochs=0.5, clip_grad=1.0, compare_uncompensated=False, limit_val=200,
        calib_samples=200, latency_batch=1, save_dir=folder / "run",
    )  # fmt: skip


def rows(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of the epochs, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def started(file: Path) -> subprocess.Popen[str]:
    """Start a run in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(DRIVE), str(file)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell has Ctrl-C ignored, and so would its children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(config: RunConfig) -> Path:
    """Return the folder of a run that nobody interrupts."""
    folder = config.save_dir.parent / "whole"
    process = started(written(config, folder))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return folder


def same(first: Path, second: Path) -> None:
    """See that two runs ended alike, to the last bit."""
    for name in ("vbp_final.pth", "vbp_best.pth"):
        here, there = weights(first / name), weights(second / name)
        assert list(here) == list(there)
        assert all(torch.equal(here[key], there[key]) for key in here), name
    here, there = ((folder / "artifact/model.safetensors").read_bytes() for folder in (first, second))
    assert here == there
    assert rows(first) == rows(second)
    for model in ("base", "pruned", "best", "final"):
        here, there = (summary(folder)[model] for folder in (first, second))
        assert here == there


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_that_goes_on_ends_like_one_never_stopped(
    config: RunConfig, whole: Path, number: signal.Signals, code: int
) -> None:
    folder = config.save_dir.parent / number.name
    # A checkpoint after every step, so that the kill falls into the middle of an epoch.
    file = written(config, folder, checkpoint_minutes=1e-9 if number == signal.SIGKILL else 0.0)
    process = started(file)
    wait_for(folder, process, "checkpoints/epoch0001*" if number == signal.SIGKILL else "checkpoints/epoch000[01]*")
    if number != signal.SIGKILL:
        time.sleep(0.3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    if number != signal.SIGKILL:
        assert f"stopped by {number.name} in epoch" in errors
        assert "--resume auto" in errors
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    measured = read_checkpoint(checkpoint)["report"]["latency"]
    again = started(written(config, folder, resume="auto"))
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    assert "going on from" in errors
    same(whole, folder)
    # The speed-up is not measured again: this machine may be busier now, or another.
    assert summary(folder)["latency"] == measured


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(
    config: RunConfig, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, one_thread: None
) -> None:
    folder = tmp_path / "run"
    run(dataclasses.replace(config, save_dir=folder))
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    run(dataclasses.replace(config, save_dir=folder, resume="auto"))
    assert newest.name in caplog.text
    same(whole, folder)


def test_a_finished_run_is_reported_again(config: RunConfig, whole: Path, one_thread: None) -> None:
    before = weights(whole / "vbp_final.pth")
    report = run(dataclasses.replace(config, save_dir=whole, resume="auto"))
    after = weights(whole / "vbp_final.pth")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report.final.epoch == 2


def test_other_settings_are_refused_with_every_difference(config: RunConfig, whole: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in whole.iterdir()}
    other = dataclasses.replace(config, save_dir=whole, resume="auto", lr_ft=1e-4, train_batch_size=8, prefetch=2)
    with pytest.raises(InputError, match=r"(?s)train_batch_size.*lr_ft"):
        run(other)
    with pytest.raises(InputError, match="--resume auto"):
        run(dataclasses.replace(config, save_dir=whole))
    assert {file.name: file.stat().st_mtime_ns for file in whole.iterdir()} == before
