"""Tuning without labels in a run, in `vbp finetune` and in `vbp.prune`: what is reported, kept, and gone on from."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vbp
import vbp.recipes.tune as stage
from vbp import InputError, RunConfig, RunReport, load_pruned, run
from vbp.errors import Interrupted
from vbp.recipes.config import FinetuneConfig
from vbp.recipes.demo import load_demo
from vbp.recipes.run import run_finetune
from vbp.statistics.statistics import Statistics
from vbp.training.tuning import Tuner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tuned(quick: RunConfig) -> RunConfig:
    """Return a run that prunes by the paper and tunes for two epochs, on 30 images in four batches."""
    return dataclasses.replace(quick, tune=2, train_batch_size=8, keep_ratio=0.3)


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / name, weights_only=True)["state_dict"]
    return state


def test_a_run_reports_the_tuned_model_and_ships_it(tuned: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report = run(tuned)
    assert report.tuned is not None
    assert report.tuning is not None
    assert report.tuning["after"] < report.tuning["before"]
    assert (report.tuning["images"], report.tuning["held_out"]) == (30, 10)
    assert report.tuned.epoch == report.tuning["epoch"] > 0
    assert report.seconds["tune"] > 0
    assert report.tuning["peak"] >= report.tuning["peak_before"] > 0
    for text in ("30 of 30 images are kept decoded in memory", "trial at 3e-05, epoch 1/1", "memory: at most"):
        assert text in caplog.text
    again = RunReport.read(tuned.save_dir)
    assert again.to_dict() == report.to_dict()
    assert f"tuned without labels (epoch {report.tuned.epoch})" in report.table()
    assert report.tuning["sentence"] in report.table()
    assert report.to_dict()["file_rows"] == dict.fromkeys(("artifact", "vbp_best.pth", "vbp_final.pth"), "tuned")
    images = torch.randn(2, 3, 32, 32)
    plain = run(dataclasses.replace(tuned, tune="off", train_batch_size=64, save_dir=tuned.save_dir.parent / "plain"))
    assert (plain.tuned, plain.tuning) == (None, None)
    assert not {"tuned", "tuning"} & set(plain.to_dict())
    first, second = (load_pruned(folder / "artifact")(images) for folder in (tuned.save_dir, plain_folder(plain)))
    assert not torch.equal(first, second)
    # The images that judge are new to the statistics too.
    counts = [
        Statistics.load(folder / "statistics.safetensors").images for folder in (tuned.save_dir, plain_folder(plain))
    ]
    assert counts == [30, 40]


def plain_folder(report: RunReport) -> Path:
    return Path(report.files["artifact"]).parent


def test_where_tuning_does_not_help_the_pruned_model_stays(tuned: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vbp.training.tuning.RATES", (1e-12, 1e-1, 1.0))
    monkeypatch.setattr("vbp.training.tuning.Tuner._judge", worse(Tuner._judge))
    report = run(dataclasses.replace(tuned, tune=1))
    assert report.tuned == dataclasses.replace(report.pruned, epoch=0)
    assert "no epoch was better than none on 10 held-out images" in report.table()
    assert "tuned without labels (epoch 0)" in report.table()


def worse(judge: Callable[..., None]) -> Callable[..., None]:
    """Return a comparison after which the trained model is no better."""

    def judged(tuner: Any, trainer: Any, *rest: Any) -> None:
        with torch.no_grad():
            for parameter in (*trainer.student.parameters(), *trainer.evaluated.parameters()):
                parameter.mul_(0)
        judge(tuner, trainer, *rest)

    return judged


def test_fine_tuning_begins_with_the_tuned_model(tuned: RunConfig) -> None:
    config = dataclasses.replace(tuned, tune=1, epochs_ft=1, lr_ft=1e-12, use_kd=True)
    report = run(config)
    assert report.tuned is not None
    rows = (config.save_dir / "metrics.jsonl").read_text().splitlines()
    assert f'"epoch": 0, "top1": {report.tuned.top1}' in rows[0]
    assert report.final.top1 == report.tuned.top1
    assert report.steps["final"] == "fine-tuned, final (epoch 1)"


def test_a_run_that_is_killed_in_tuning_goes_on(tuned: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dataclasses.replace(tuned, epochs_ft=1, lr_ft=1e-3, save_dir=tuned.save_dir.parent / "whole")
    expected = run(whole)
    # Before the first step, at the end of the first trial, and in the training that follows the trials.
    for after in (0, 4, 14):
        check_killed(dataclasses.replace(whole, save_dir=tuned.save_dir / str(after)), monkeypatch, after, expected)


def check_killed(config: RunConfig, monkeypatch: pytest.MonkeyPatch, after: int, expected: RunReport) -> None:
    steps = [0]

    def told(job: Any, trainer: Any, batches: int, interruption: Any, *rest: Any) -> None:
        steps[0] += 1
        if steps[0] == after:
            interruption.signal = 15
        real(job, trainer, batches, interruption, *rest)

    real = stage.after_step
    with monkeypatch.context() as patch:
        patch.setattr("vbp.recipes.tune.after_step", told)
        if after == 0:
            patch.setattr("vbp.training.tuning.Tuner.tune_", stopped)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM|before the first"):
            run(config)
    names = {path.name for path in (config.save_dir / "checkpoints").iterdir()}
    assert all(name.startswith("tuning-epoch") for name in names)
    report = run(dataclasses.replace(config, resume="auto"))
    assert (report.tuned, report.final) == (expected.tuned, expected.final)
    assert _timeless(report) == _timeless(expected)
    first, second = (weights(folder, "vbp_final.pth") for folder in (plain_folder(expected), config.save_dir))
    assert all(value.equal(second[name]) for name, value in first.items())


def stopped(*_: Any) -> None:
    raise Interrupted(15, "before the first step")


def _timeless(report: RunReport) -> dict[str, Any]:
    assert report.tuning is not None
    return {name: value for name, value in report.tuning.items() if not name.startswith("peak")}


def test_a_pruned_model_can_be_tuned_later_towards_its_dense_model(quick: RunConfig, tmp_path: Path) -> None:
    run(quick)
    later = FinetuneConfig(
        artifact=str(quick.save_dir), data_path=quick.data_path, epochs_ft=0, tune=1, calib_samples=40, limit_val=40,
        train_batch_size=8, num_workers=0, hflip=False, save_dir=tmp_path / "later", device="cpu",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"epochs_ft must be at least 1 to fine-tune, got 0; .* or give --tune"):
        run_finetune(dataclasses.replace(later, tune="off", train_batch_size=64, calib_samples=0))
    with pytest.raises(InputError, match="calib_samples changes nothing without tune, got 40"):
        run_finetune(dataclasses.replace(later, tune="off", epochs_ft=1))
    report = run_finetune(later)
    assert report.tuning is not None
    assert report.tuned is not None
    assert report.tuning["after"] <= report.tuning["before"]
    assert report.tuning["before"] > 0.01  # towards the dense model, not itself
    itself = dataclasses.replace(later, teacher=str(quick.save_dir), save_dir=tmp_path / "itself")
    found = run_finetune(itself).tuning
    assert found is not None
    assert found["before"] == pytest.approx(0, abs=1e-6)


def test_too_few_images_are_refused_before_any_work(quick: RunConfig) -> None:
    with pytest.raises(InputError, match="tune needs at least 8 calibration images, got 5"):
        run(dataclasses.replace(quick, tune=1, calib_samples=5))
    assert not quick.save_dir.exists()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    with pytest.raises(InputError, match="tune needs at least 8 calibration images, got 5"):
        vbp.prune(model, [torch.randn(5, 3, 2, 2)], tune=1)
    with pytest.raises(InputError, match="tune must be auto, off, a number of epochs"):
        vbp.prune(model, [torch.randn(5, 3, 2, 2)], tune="on")


def test_one_call_prunes_and_tunes_without_labels(demo_folder: Path) -> None:
    classifier, train, val = load_demo(demo_folder / "data")
    before = copy.deepcopy(classifier.model.state_dict())
    images, labels = next(iter(val))
    result = vbp.prune(
        classifier, [next(iter(train))[0][:48]], keep_ratio=0.3, criterion="variance", compensation="mean", tune=2,
        val=[(images[:40], labels[:40])],
    )  # fmt: skip
    assert result.tuning is not None
    assert result.tuning.after < result.tuning.before
    assert result.untuned_accuracy is not None
    assert [line.split()[0] for line in result.table().splitlines()[1:5]] == ["dense", "pruned", "tuned", "tuning"]
    assert result.figures()["tuning"]["sentence"] == result.tuning.sentence()
    assert result.settings["tune"] == 2
    assert all(value.equal(before[name]) for name, value in classifier.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in classifier.model.parameters())
    assert not result.model.training
