"""A run with `--overwrite` that torchrun starts again goes on from its own checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vbp.recipes.config import DemoConfig
from vbp.recipes.demo import demo_run_config
from vbp.recipes.run import run


def test_a_restarted_run_goes_on_though_it_may_overwrite(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("vbp.report.html.write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr("vbp.cost.timing.TURN_S", 0.005)
    config = dataclasses.replace(
        demo_run_config(DemoConfig(epochs_ft=1)), data_path=str(digits), calib_samples=40, limit_val=40,
        compare_uncompensated=False, save_dir=tmp_path / "run", overwrite=True,
    )  # fmt: skip
    run(config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with caplog.at_level("INFO"):
        run(config)
    assert "going on from" in caplog.text
