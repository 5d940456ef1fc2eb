"""The job of a sweep on the embedded digits: what it leaves, how it goes on, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from launching import finish, torchrun
from torch import nn

from vbp import InputError, RunConfig, Statistics
from vbp.recipes.checks import check_config
from vbp.report.run_report import Measured
from vbp.sweeps.checks import check_sweep
from vbp.sweeps.config import SweepConfig
from vbp.sweeps.sweep import run_sweep

FILES = {
    "sweep.csv", "sweep.json", "sweep.html", "sweep.svg", "sweep.png", "pareto.svg", "pareto.png", "points",
    "statistics.safetensors", "vbp_sweep.log",
}  # fmt: skip


def _counting(patch: pytest.MonkeyPatch, stop_after: int = 1000) -> list[str]:
    """Count what is measured and what is read for calibration; the measure fails after a while."""
    import vbp.statistics.evidence
    import vbp.sweeps.points as module

    calls: list[str] = []
    measure, collect = module.measure, vbp.statistics.evidence.collect_statistics

    def measured(job: Any, model: nn.Module) -> Measured:
        if calls.count("measure") == stop_after:
            raise KeyboardInterrupt
        calls.append("measure")
        return measure(job, model)

    def collected(*arguments: Any, **keywords: Any) -> Statistics:
        calls.append("collect")
        return collect(*arguments, **keywords)

    patch.setattr(module, "measure", measured)
    patch.setattr(vbp.statistics.evidence, "collect_statistics", collected)
    return calls


def test_a_sweep_leaves_its_files_and_its_report(config: SweepConfig) -> None:
    report = run_sweep(config)
    assert {entry.name for entry in config.save_dir.iterdir()} == FILES
    written = json.loads((config.save_dir / "sweep.json").read_text())
    assert {name: written[name] for name in report.to_dict()} == json.loads(json.dumps(report.to_dict()))
    assert (config.save_dir / "sweep.csv").read_text() == report.csv()
    log = (config.save_dir / "vbp_sweep.log").read_text()
    assert all(line in log for line in report.table().splitlines())
    assert [(row.setting.method, row.setting.keep_ratio) for row in report.rows] == [
        ("variance/mean", 0.7), ("variance/mean", 0.4), ("l2/none", 0.7), ("l2/none", 0.4)
    ]  # fmt: skip
    assert report.dense.images == 100
    assert report.dense.top1 > 90
    for row in report.rows:
        assert row.kept == round(row.total * row.setting.keep_ratio)
        assert row.measured.macs < report.dense.macs
    assert Statistics.load(config.save_dir / "statistics.safetensors").images == 60


def test_a_killed_sweep_goes_on_with_what_it_had(config: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_sweep(dataclasses.replace(config, save_dir=config.save_dir.parent / "whole"))
    with monkeypatch.context() as patch:
        _counting(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(config)
    assert len([*config.save_dir.glob("points/*/row.json")]) == 2
    with monkeypatch.context() as patch:
        calls = _counting(patch)
        again = run_sweep(config)
    # l2 without compensation needs no statistics any more, and only its two rows were missing.
    assert calls == ["measure", "measure"]
    assert (again.dense, again.rows) == (whole.dense, whole.rows)
    assert (config.save_dir / "sweep.csv").read_text() == whole.csv()


def test_a_sweep_killed_before_its_first_row_goes_on(config: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _counting(patch, stop_after=0)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(config)
    calls = _counting(monkeypatch)
    assert len(run_sweep(config).rows) == 4
    assert "collect" not in calls


def test_more_can_be_asked_for_later(config: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    few = run_sweep(dataclasses.replace(config, criteria=("variance/mean",)))
    calls = _counting(monkeypatch)
    more = run_sweep(dataclasses.replace(config, criteria=("variance/mean", "variance/refit", "snip/none")))
    # The file of the first had no covariances.
    assert calls == ["collect", *["measure"] * 4]
    assert more.rows[:2] == few.rows
    stored = config.save_dir / "statistics.safetensors"
    assert Statistics.load(stored).covariances
    calls.clear()
    run_sweep(dataclasses.replace(config, criteria=("auto",), keep_ratios=(0.5,)))
    # Nor had that of the second sensitivities; they are counted from the means of a few images, read first.
    assert calls == ["collect", "collect", "measure"]
    assert Statistics.load(stored).sensitivities
    calls.clear()
    again = run_sweep(dataclasses.replace(config, criteria=("auto",), keep_ratios=(0.5, 0.3)))
    assert calls == ["measure"]
    assert [row.setting.method for row in again.rows[:2]] == ["auto/refit"] * 2


def test_auto_searches_its_plans_on_the_first_images(config: SweepConfig, caplog: pytest.LogCaptureFixture) -> None:
    wanted = dataclasses.replace(
        config, criteria=("variance/refit", "auto"), keep_ratios=(0.5, 0.3), round_to=8, min_keep_ratio=0.1,
        limit_val=0,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        report = run_sweep(wanted)
    searches = [message for message in caplog.messages if message.startswith("auto: ")]
    assert len(searches) == 2
    assert all("plans tried on 60 images" in message for message in searches)
    for paper, auto in zip(report.rows[:2], report.rows[2:], strict=True):
        assert auto.kept == paper.kept == round(auto.total * auto.setting.keep_ratio / 8) * 8
        # 896 digits: a standard error is about one point.
        assert auto.measured.top1 > paper.measured.top1 - 1
    stored = wanted.save_dir / "statistics.safetensors"
    plain = Statistics.load(stored)
    dataclasses.replace(plain, sensitivities={}).save(stored.with_name("plain"))
    with pytest.raises(InputError, match="must hold the sensitivity of"):
        run_sweep(
            dataclasses.replace(
                wanted, stats_path=stored.with_name("plain"), save_dir=wanted.save_dir.parent / "other"
            )
        )


def test_other_settings_and_other_folders_are_refused(config: SweepConfig, tmp_path: Path) -> None:
    small = dataclasses.replace(config, criteria=("l2/none",), keep_ratios=(0.5,), limit_val=20)
    first = run_sweep(small)
    before = (small.save_dir / "sweep.json").read_bytes()
    with pytest.raises(InputError, match=r"goes on with the settings it began with.*: round_to 1 there, 8 here; "):
        run_sweep(dataclasses.replace(small, round_to=8))
    with pytest.raises(InputError, match=r"calibration .* there, .* here; limit_val 20 there, 30 here"):
        run_sweep(dataclasses.replace(small, limit_val=30, calib_samples=30))
    assert (small.save_dir / "sweep.json").read_bytes() == before
    anew = run_sweep(dataclasses.replace(small, round_to=8, overwrite=True))
    assert anew.rows[0].kept % 8 == 0
    assert anew.dense == first.dense
    (small.save_dir / "sweep.json").write_text("{}")
    with pytest.raises(InputError, match="must be what an earlier sweep left, got KeyError"):
        run_sweep(small)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"must be empty or new, got .*thesis\.tex"):
        run_sweep(dataclasses.replace(small, save_dir=stranger))


def test_given_statistics_are_used(config: SweepConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = dataclasses.replace(config, criteria=("variance/mean",))
    first = run_sweep(small)
    stored = small.save_dir / "statistics.safetensors"
    calls = _counting(monkeypatch)
    second = run_sweep(dataclasses.replace(small, stats_path=stored, save_dir=tmp_path / "second"))
    assert second.rows == first.rows
    assert "collect" not in calls
    refit = dataclasses.replace(small, criteria=("variance/refit",), stats_path=stored, save_dir=tmp_path / "third")
    with pytest.raises(InputError, match="must hold the covariance"):
        run_sweep(refit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_ratios": (0.5, 0.01)}, "min_keep_ratio must not exceed keep_ratio"),
        ({"criteria": ("variance/shift",)}, "compensation must be one of"),
        ({"criteria": ("auto/mean",)}, "criterion auto goes with compensation refit alone"),
        ({"val_batch_size": 0}, "val_batch_size must be at least 1"),
        ({"timeout_minutes": 0.0}, "timeout_minutes must be above 0"),
        ({"criteria": ("variance/refit",), "ridge": 0.0}, "ridge must be in"),
        ({"criteria": ("variance/refit",), "covariance_tokens": 2.0}, "the share of tokens must be in"),
        ({"covariance_tokens": 0.5}, "covariance_tokens changes nothing without refit or elimination"),
        ({"ridge": 0.5}, "ridge changes nothing without refit or elimination"),
        ({"refit_producers": "on"}, "refit_producers changes nothing without the refit, got on"),
        ({"refit_stream": "on"}, "refit_stream changes nothing without the refit, got on"),
        ({"refit_head": "off"}, "refit_head changes nothing without the refit, got off"),
        ({"refit_views": 2}, "refit_views changes nothing without the refit, got 2"),
        ({"criteria": ("l1/none",), "stats_path": Path("x")}, "stats_path changes nothing"),
    ],
)
def test_values_out_of_range_and_without_effect_are_refused(
    config: SweepConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_sweep(dataclasses.replace(config, **changes))
    assert not config.save_dir.exists()


def test_fields_that_a_run_has_too_are_the_same_there() -> None:
    run = {field.name: field for field in dataclasses.fields(RunConfig)}
    shared = [field for field in dataclasses.fields(SweepConfig) if field.name in run]
    assert len(shared) > 25
    for field in shared:
        if field.name not in ("save_dir", "calib_samples", "epochs_ft"):
            assert (field.type, field.default) == (run[field.name].type, run[field.name].default)
    check_sweep(SweepConfig("data"))
    check_config(SweepConfig("data", seed=3).run_config())
    assert SweepConfig("data", seed=3).run_config().seed == 3


_DRIVE = """
import json, sys
from pathlib import Path
from vbp.cli.main import guarded
from vbp.sweeps.config import SweepConfig
from vbp.sweeps.sweep import run_sweep

given = json.loads(Path(sys.argv[1]).read_text())
for name in ("checkpoint", "save_dir"):
    given[name] = Path(given[name])
sys.exit(guarded(lambda: [run_sweep(SweepConfig(**given))].clear()))
"""


def test_two_processes_give_the_rows_of_one(
    config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 60 images in batches of 16: four, two for each process.
    wanted = dataclasses.replace(
        config, val_batch_size=16, keep_ratios=(0.5,), criteria=("variance/refit", "snip/mean", "auto")
    )
    alone = run_sweep(wanted)
    drive, settings, folder = tmp_path / "drive.py", tmp_path / "config.json", tmp_path / "together"
    drive.write_text(_DRIVE)
    given = dataclasses.asdict(dataclasses.replace(wanted, save_dir=folder))
    settings.write_text(json.dumps({name: value for name, value in given.items() if value is not None}, default=str))
    result = finish(torchrun(drive, settings))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("results in") == 1
    assert {entry.name for entry in folder.iterdir()} == FILES
    found = json.loads((folder / "sweep.json").read_text())
    assert found["rows"] == json.loads(json.dumps([row.to_dict() for row in alone.rows]))
