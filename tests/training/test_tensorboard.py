"""Curves for TensorBoard: everything that is promised is in the files, and a missing package is told at once."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vbp import InputError, RunConfig, run
from vbp.training.tensorboard import Tracker, check_tracking


@pytest.fixture
def config(quick: RunConfig, tmp_path: Path) -> RunConfig:
    """Return a short run that draws curves."""
    return dataclasses.replace(quick, epochs_ft=2, log_dir=tmp_path / "curves")


def test_a_run_draws_every_curve(config: RunConfig) -> None:
    report = run(config)
    events = EventAccumulator(str(config.log_dir)).Reload()
    curves = {
        name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]
    }
    for name in ("loss", "top1", "learning_rate", "images_per_second", "gradient_norm"):
        assert [step for step, _ in curves[f"train/{name}"]] == [1, 2], name
        assert all(value > 0 for _, value in curves[f"train/{name}"]), name
    assert curves["val/top1"][-1][1] == pytest.approx(report.final.top1)
    assert {name.removeprefix("kept_channels/") for name in curves if name.startswith("kept_channels/")} == set(
        report.sites
    )
    for name, (kept, total) in report.sites.items():
        assert curves[f"kept_channels/{name}"] == [(0, kept)]
        assert curves[f"kept_share/{name}"][0][1] == pytest.approx(kept / total)


def test_without_the_package_or_a_folder_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="log_dir must be a folder, got the file"):
        check_tracking(file)
    with pytest.raises(InputError, match="log_dir must be a folder that can be written"):
        check_tracking(file / "below")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'vbp-pruning\[tracking\]'"):
        check_tracking(tmp_path)
    check_tracking(None)


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Tracker(None):
        pass
    assert list(tmp_path.iterdir()) == []
