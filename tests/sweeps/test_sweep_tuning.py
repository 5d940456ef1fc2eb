"""Sweeps that fine-tune each point, for several seeds: as a run would, and on from the checkpoint after a kill."""

from __future__ import annotations

import dataclasses
import os
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest

from vbp import InputError, Statistics, load_pruned, run
from vbp.errors import Interrupted
from vbp.recipes.checks import check_config
from vbp.sweeps.checks import check_sweep
from vbp.sweeps.config import SweepConfig
from vbp.sweeps.sweep import run_sweep
from vbp.training.trainer import Trainer


@pytest.fixture
def tuned(config: SweepConfig) -> SweepConfig:
    """Return a sweep of one setting that fine-tunes for an epoch."""
    return dataclasses.replace(
        config, criteria=("variance/mean",), keep_ratios=(0.4,), epochs_ft=1, lr_ft=5e-4, use_kd=True, hflip=False,
        crop_scale=(0.9, 1.0),
    )  # fmt: skip


def test_a_tuned_point_is_what_a_run_of_its_settings_gives(
    tuned: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vbp.report.html.write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr("vbp.cost.timing.TURN_S", 0.005)
    monkeypatch.setattr("vbp.cost.timing.CPU_BATCH_MACS", 1)
    report = run_sweep(tuned)
    [row] = report.rows
    _leave_as_if_killed(tuned)
    assert run_sweep(tuned).rows == report.rows
    folder = tuned.save_dir / "points" / row.point.name
    settings = tuned.run_config_of(row.point, tuned.save_dir.parent / "run")
    check_config(settings)
    alone = run(settings)
    assert row.measured == dataclasses.replace(alone.pruned, epoch=None)
    assert row.tuned == alone.best
    assert row.tuned is not None
    assert row.tuned.top1 > row.measured.top1
    # The point's folder is that of a run, with its best model, and without what only a stopped one needs.
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "plan.json", "metrics.jsonl", "summary.json", "artifact", "row.json"
    }  # fmt: skip
    assert sum(value.numel() for value in load_pruned(folder).parameters()) == row.tuned.params
    assert f"{row.tuned.top1:.2f}" in report.table()


def _leave_as_if_killed(config: SweepConfig) -> None:
    """Leave what a job leaves that is killed just after it has written the row of its point."""
    [folder] = (config.save_dir / "points").iterdir()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/epoch0001-batch000015.pt").touch()
    for name in (".vbp.lock", "vbp_best.pth", "vbp_final.pth"):
        (folder / name).touch()


def test_each_seed_has_calibration_images_of_its_own_and_all_the_same_validation_images(config: SweepConfig) -> None:
    wanted = dataclasses.replace(config, criteria=("variance/mean", "random/none"), keep_ratios=(0.4,), limit_val=0)
    seeds = run_sweep(dataclasses.replace(wanted, seeds=3))
    assert [row.seed for row in seeds.rows] == [0, 0, 1, 1, 2, 2]
    alone = run_sweep(dataclasses.replace(wanted, seed=1, save_dir=config.save_dir.parent / "alone"))
    assert alone.rows == tuple(row for row in seeds.rows if row.seed == 1)
    assert alone.dense == seeds.dense
    paths = [wanted.save_dir / f"statistics{end}.safetensors" for end in ("", "-seed1", "-seed2")]
    assert len({Statistics.load(path).data for path in paths}) == 3
    chance = [row.measured.top1 for row in seeds.rows if row.setting.criterion == "random"]
    assert len({*chance}) > 1
    top1 = next(group for group in seeds.settings if group.setting.criterion == "random").final_top1
    assert (top1.mean, top1.deviation) == pytest.approx((statistics.mean(chance), statistics.stdev(chance)))


def _stopping(patch: pytest.MonkeyPatch, epoch: int, number: int) -> None:
    """Send this process a signal when an epoch begins."""
    train = Trainer.train_epoch

    def train_epoch(self: Trainer, loader: Any, at: int, *rest: Any, **more: Any) -> Any:
        if at == epoch:
            os.kill(os.getpid(), number)
        return train(self, loader, at, *rest, **more)

    patch.setattr(Trainer, "train_epoch", train_epoch)


def test_a_sweep_that_is_stopped_while_it_tunes_goes_on_from_its_checkpoint(
    tuned: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = dataclasses.replace(tuned, epochs_ft=2, keep_ratios=(0.6, 0.4))
    whole = run_sweep(dataclasses.replace(longer, save_dir=tuned.save_dir.parent / "whole"))
    with monkeypatch.context() as patch:
        _stopping(patch, 2, signal.SIGTERM)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM; the same command goes on where it was"):
            run_sweep(longer)
    [point] = (longer.save_dir / "points").iterdir()
    assert [*(point / "checkpoints").iterdir()]
    assert not (point / "row.json").exists()
    epochs: list[int] = []
    train = Trainer.train_epoch

    def train_epoch(self: Trainer, loader: Any, at: int, *rest: Any, **more: Any) -> Any:
        epochs.append(at)
        return train(self, loader, at, *rest, **more)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    again = run_sweep(longer)
    assert epochs == [2, 1, 2]
    assert again.rows == whole.rows
    assert not [*longer.save_dir.glob("points/*/checkpoints")]


def test_other_fine_tuning_is_another_sweep(tuned: SweepConfig) -> None:
    run_sweep(dataclasses.replace(tuned, limit_val=20))
    with pytest.raises(InputError, match=r"the settings it began with.*: lr_ft 0.0005 there, 0.001 here"):
        run_sweep(dataclasses.replace(tuned, limit_val=20, lr_ft=1e-3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"seeds": 2, "criteria": ("l1/none",)}, "seeds changes nothing where each seed reads no images"),
        ({"seeds": 2, "stats_path": Path("x")}, "seeds changes nothing where each seed reads the statistics of one"),
        ({"lr_ft": 1e-3}, "lr_ft change nothing without fine-tuning"),
        ({"use_kd": True}, "use_kd change nothing without fine-tuning"),
        ({"epochs_ft": 1, "kd_T": 4.0}, "kd_T change nothing without distillation"),
        ({"epochs_ft": 2, "warmup_epochs": 2.0}, "warmup_epochs must be below epochs_ft"),
        ({"point": "3"}, "point must be K/N"),
        ({"point": "1/5"}, "point must ask for at most as many shares as there are points, got 1/5 for 4 points"),
        ({"point": "1/2", "overwrite": True}, "overwrite would remove what other points measured"),
    ],
)
def test_flags_of_seeds_and_points_without_sense_are_refused(
    config: SweepConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_sweep(dataclasses.replace(config, **changes))


def test_seeds_tell_something_with_random_channels_or_fine_tuning_though_statistics_are_given(
    config: SweepConfig,
) -> None:
    given = dataclasses.replace(config, seeds=2, stats_path=Path("x"))
    check_sweep(dataclasses.replace(given, criteria=("random/mean",)))
    check_sweep(dataclasses.replace(given, epochs_ft=1))
