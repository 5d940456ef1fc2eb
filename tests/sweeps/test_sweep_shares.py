"""Shares of a sweep by several jobs in one folder: what they share, what they leave, how they are merged."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path

import pytest

from vbp import InputError
from vbp.cli.main import main
from vbp.runtime.files import folder_lock, try_lock
from vbp.sweeps.config import MergeConfig, SweepConfig
from vbp.sweeps.merge import RESULTS, run_merge
from vbp.sweeps.state import SHORT_LOCK
from vbp.sweeps.sweep import run_sweep


def _share(config: SweepConfig, point: str, **changes: object) -> SweepConfig:
    return dataclasses.replace(config, point=point, **changes)  # type: ignore[arg-type]


def test_shares_and_their_merge_are_the_whole_sweep(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_sweep(dataclasses.replace(config, save_dir=config.save_dir.parent / "whole"))
    first = run_sweep(_share(config, "0/2"))
    assert (first.rows, len(first.missing)) == ((), 4)
    stored = (config.save_dir / "statistics.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        # All that the points need of the images is there.
        patch.setattr("vbp.statistics.evidence.collect_statistics", None)
        half = run_sweep(_share(config, "1/2"))
        assert [row.point for row in half.rows] == [row.point for row in whole.rows[::2]]
        monkeypatch.setattr(sys, "argv", ["vbp", "sweep", str(config.save_dir)])
        assert main() == 0
        shown = capsys.readouterr().out
        assert "missing: 2 of 4 points (variance-mean-global-0.4-seed0, l2-none-global-0.4-seed0)" in shown
        assert "2 of 4" in (config.save_dir / "sweep.html").read_text()
        again = run_sweep(_share(config, "1/2"))
        assert again.rows == half.rows
        # Statistics that are the sweep's own may be named, too.
        run_sweep(_share(config, "2/2", stats_path=config.save_dir / "statistics.safetensors"))
    report = run_merge(MergeConfig(config.save_dir))
    assert (report.dense, report.rows, report.missing) == (whole.dense, whole.rows, ())
    assert (config.save_dir / "sweep.csv").read_text() == whole.csv()
    assert (config.save_dir / "statistics.safetensors").read_bytes() == stored
    assert {entry.name for entry in config.save_dir.iterdir()} == {
        *RESULTS, "sweep.json", "points", "statistics.safetensors", "vbp_sweep.log"
    }  # fmt: skip
    logs = {file.name for file in config.save_dir.glob("points/*.log")}
    assert logs == {"1-of-2.log", "2-of-2.log"}
    # The command of the whole sweep finds nothing left to measure, and with more ratios only these.
    more = run_sweep(dataclasses.replace(config, keep_ratios=(0.7, 0.4, 0.3)))
    assert len(more.rows) == 6
    assert {row for row in more.rows if row.setting.keep_ratio != 0.3} == {*whole.rows}


def test_a_share_needs_no_first_one(config: SweepConfig) -> None:
    small = dataclasses.replace(config, limit_val=20)
    report = run_sweep(_share(small, "4/4"))
    assert [row.setting.method for row in report.rows] == ["l2/none"]
    assert len(report.missing) == 3
    # l2 without compensation reads no statistics.
    assert not (config.save_dir / "statistics.safetensors").exists()
    assert [len(run_sweep(_share(small, f"{number}/4")).rows) for number in (1, 2, 3)] == [2, 3, 4]
    with pytest.raises(InputError, match=r"goes on with the settings it began with.*: limit_val 20 there, 30 here"):
        run_sweep(_share(config, "1/4", limit_val=30))


def test_a_point_that_another_job_is_at_is_left_out_and_named(
    config: SweepConfig, caplog: pytest.LogCaptureFixture
) -> None:
    small = dataclasses.replace(config, criteria=("l2/none",), limit_val=20)
    name = "l2-none-global-0.7-seed0"
    with try_lock(config.save_dir / "points" / name) as held:
        assert held
        # As a job of that point holds the folder: beside others.
        with folder_lock(config.save_dir, shared=True):
            (config.save_dir / "points").mkdir(exist_ok=True)
            state = run_sweep(_share(dataclasses.replace(small, save_dir=config.save_dir.parent / "x"), "0/1"))
            (config.save_dir / "sweep.json").write_text(json.dumps(
                json.loads((config.save_dir.parent / "x/sweep.json").read_text())
            ))  # fmt: skip
            assert len(state.missing) == 2
            with caplog.at_level(logging.WARNING):
                report = run_sweep(_share(small, "1/1"))
    assert f"{name} is left out: another job is at it" in caplog.messages
    assert [point.name for point in report.missing] == [name]
    assert run_sweep(_share(small, "1/1")).missing == ()


def test_who_needs_the_folder_alone_waits_for_no_one(config: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vbp.recipes.folder.SHARED_WAIT_S", 0.1)
    small = dataclasses.replace(config, criteria=("l2/none",), limit_val=20)
    run_sweep(_share(small, "0/2"))
    in_use = "must be a folder into which no other job writes"
    with folder_lock(config.save_dir, shared=True):
        for alone in (small, _share(small, "0/2"), dataclasses.replace(small, overwrite=True)):
            with pytest.raises(InputError, match=in_use):
                run_sweep(alone)
        run_merge(MergeConfig(config.save_dir))
        assert len(run_sweep(_share(small, "1/2")).rows) == 1
    with folder_lock(config.save_dir):
        with pytest.raises(InputError, match=in_use):
            run_sweep(_share(small, "2/2"))
        with pytest.raises(InputError, match=in_use):
            run_merge(MergeConfig(config.save_dir))
    assert len(run_sweep(dataclasses.replace(small, overwrite=True)).rows) == 2


def test_what_is_no_folder_of_a_sweep_is_refused(tmp_path: Path, config: SweepConfig) -> None:
    with pytest.raises(InputError, match="must be the save_dir of a sweep, got no folder"):
        run_merge(MergeConfig(tmp_path / "none"))
    with pytest.raises(InputError, match="must be the save_dir of a sweep, got none; begin it"):
        run_merge(MergeConfig(tmp_path))
    assert [*tmp_path.iterdir()] == []
    small = dataclasses.replace(config, criteria=("l2/none",), limit_val=20, keep_ratios=(0.5,))
    run_sweep(small)
    [row] = config.save_dir.glob("points/*/row.json")
    row.write_text(row.read_text().replace('"settings": "', '"settings": "0'))
    with pytest.raises(InputError, match="it was measured with other settings or by another version; remove it"):
        run_merge(MergeConfig(config.save_dir))
    row.unlink()
    assert len(run_sweep(small).rows) == 1


def test_a_point_waits_for_the_sweep_that_replaces_another_one(config: SweepConfig) -> None:
    small = dataclasses.replace(config, criteria=("l2/none",), limit_val=20)
    run_sweep(small)
    (config.save_dir / "sweep.json").rename(config.save_dir / ".begun.json")
    with pytest.raises(InputError, match="got one that ended while it replaced other results; give its command once"):
        run_sweep(_share(small, "1/2"))
    with pytest.raises(InputError, match="got none, but one that ended while it replaced other results"):
        run_merge(MergeConfig(config.save_dir))
    assert run_sweep(_share(small, "0/2")).rows == ()
    assert not [*config.save_dir.glob("points/*/row.json")]


def test_locks_can_be_shared_until_one_process_wants_a_folder_alone(tmp_path: Path) -> None:
    with try_lock(tmp_path / "a", shared=True) as one, try_lock(tmp_path / "a", shared=True) as two:
        assert (one, two) == (True, True)
        with try_lock(tmp_path / "a") as alone:
            assert not alone
        with try_lock(tmp_path / "a", name=SHORT_LOCK) as short:
            assert short
    assert [*tmp_path.iterdir()] == []
    with try_lock(tmp_path / "a") as alone, try_lock(tmp_path / "a", shared=True) as shared:
        assert (alone, shared) == (True, False)
