"""What follows pruning: accuracy beside the dense model's, classes of files, more pruning, more training."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vbp
from vbp import InputError, RunConfig, load_pruned, read_artifact
from vbp.cli.evaluate import run_eval, run_predict
from vbp.cli.export import run_export
from vbp.cli.inspect import run_inspect
from vbp.cli.options import EvalConfig, ExportConfig, InspectConfig, PredictConfig
from vbp.deploy.open_model import open_dense
from vbp.recipes.config import FinetuneConfig
from vbp.recipes.run import run, run_finetune
from vbp.runtime.files import folder_lock


@pytest.fixture(scope="module")
def finished(demo_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that only pruned, by a rule that costs accuracy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = dataclasses.replace(
        demo_config, epochs_ft=0, use_kd=False, lr_ft=RunConfig.lr_ft, calib_samples=40, limit_val=100,
        keep_ratio=0.3, compare_uncompensated=False, save_dir=folder, overwrite=False,
    )  # fmt: skip
    run(config)
    return folder


def test_a_run_folder_stands_for_its_pruned_model(finished: Path, digits: Path, tmp_path: Path) -> None:
    assert read_artifact(finished).metrics == read_artifact(finished / "artifact").metrics
    sites = run_inspect(InspectConfig(str(finished))).sites
    assert sum(site.kind == "mlp" for site in sites) == 4
    pytest.importorskip("onnx")
    run_export(ExportConfig(str(finished), tmp_path / "model.pt2", to="pt2"))
    assert (tmp_path / "model.pt2").is_file()


def test_attention_is_listed_beside_the_mlps_where_a_run_to_a_budget_finds_it() -> None:
    sites = run_inspect(InspectConfig("eva02_tiny_patch14_224")).sites  # its weights are passed to a function
    assert [sum(site.kind == kind for site in sites) for kind in ("mlp", "value")] == [12, 12]


def test_a_run_that_has_not_ended_says_what_is_there(finished: Path, tmp_path: Path) -> None:
    for name in ("config.json", "vbp_best.pth"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    with pytest.raises(InputError, match=r"has not ended.*give .*vbp_best\.pth"):
        load_pruned(tmp_path)


def test_dense_and_pruned_are_counted_image_by_image(finished: Path, digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    config = EvalConfig(
        str(finished), str(digits), dense="auto", limit_val=100, num_workers=0, device="cpu", output=output
    )
    report = run_eval(config)
    summary = json.loads((finished / "summary.json").read_text())
    both = report.agreement
    assert both is not None
    assert report.dense is not None
    assert (report.dense.top1, report.accuracy.top1) == (summary["base"]["top1"], summary["pruned"]["top1"])
    assert (report.dense.top5, report.accuracy.top5) == (summary["base"]["top5"], summary["pruned"]["top5"])
    assert both.images == sum(both.images_by_class) == 100
    assert both.both + both.first == report.dense.correct1
    assert both.both + both.second == report.accuracy.correct1
    assert sum(both.lost) == report.dense.correct1 - report.accuracy.correct1 > 0
    assert both.both <= both.same <= 100 - abs(both.first - both.second)
    for text in ("±", "dense right", "pruned wrong", "classes that lost most", "100 images"):
        assert text in report.table()
    assert json.loads(output.read_text()) == report.to_dict()
    alone = run_eval(dataclasses.replace(config, dense=None, output=None))
    assert (alone.accuracy, alone.dense) == (report.accuracy, None)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"model": "test_vit", "dense": "auto"}, "dense auto is for pruned models"),
        ({"checkpoint": Path("a.pth")}, "checkpoint are for dense models"),
        ({"output": Path("nowhere/a.json")}, "existing folder"),
        ({"device": "tpu"}, "device must be"),
        ({"max_pixels": 0}, "max_pixels must be 1 or more"),
        ({"max_pixels": 16}, "images may be unreadable"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    finished: Path, digits: Path, changed: dict[str, Any], text: str
) -> None:
    values: dict[str, Any] = {"model": str(finished), "data_path": str(digits), "num_workers": 0, "device": "cpu"}
    if changed.get("model") == "test_vit":
        changed = changed | {"model": str(finished.parent / "nothing")}
        text = "neither an existing folder"
    with pytest.raises(InputError, match=text):
        run_eval(EvalConfig(**values | changed))


def test_files_get_the_names_of_their_classes(finished: Path, digits: Path, tmp_path: Path) -> None:
    files = sorted((digits / "val" / "7").iterdir())[:3] if (digits / "val" / "7").is_dir() else []
    files = files or sorted((digits / "val").rglob("*.png"))[:3]
    predictions = run_predict(PredictConfig(str(finished), tuple(files), top=2))
    names = read_artifact(finished).class_names
    assert names is not None
    for file, prediction in zip(files, predictions.files, strict=True):
        assert prediction.file == str(file)
        assert set(prediction.classes) < set(names)
        assert 1 > prediction.probabilities[0] >= prediction.probabilities[1] > 0
    assert predictions.table().count("%") == 6
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    with pytest.raises(InputError, match=r"bad\.png must be an image file"):
        run_predict(PredictConfig(str(finished), (bad,)))
    with pytest.raises(InputError, match="top must be at least 1"):
        run_predict(PredictConfig(str(finished), (files[0],), top=0))
    wide = tmp_path / "wide.png"
    Image.new("I;16", (8, 8), 65535).save(wide)
    assert len(run_predict(PredictConfig(str(finished), (wide,), top=1)).files) == 1
    with pytest.raises(InputError, match=r"wide\.png must be .* more pixels than max_pixels, which is 63"):
        run_predict(PredictConfig(str(finished), (wide,), max_pixels=63))
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png must be an image file"):
        run_predict(PredictConfig(str(finished), (tmp_path / "pipe.png",)))


def test_a_pruned_model_is_pruned_further(finished: Path, quick: RunConfig) -> None:
    first = read_artifact(finished)
    config = dataclasses.replace(
        quick, model_name=str(finished), model_kwargs={}, checkpoint=None, keep_ratio=0.5, model_type="vit"
    )
    report = run(config)
    twice = read_artifact(quick.save_dir)
    assert len(twice.plans) == 2
    assert twice.plans[0] == first.plans[0]
    assert twice.plans[1].total == first.plans[0].kept
    assert report.base.params == first.metrics["params"]  # type: ignore[index]
    assert report.final.params < report.base.params
    assert twice.preprocessing == first.preprocessing
    pixels = torch.randn(2, 3, *first.preprocessing.img_size)  # type: ignore[union-attr]
    assert load_pruned(quick.save_dir)(pixels).isfinite().all()
    # The model that both began with.
    assert vbp.count_parameters(open_dense(str(quick.save_dir)).model) > report.base.params
    with pytest.raises(InputError, match="checkpoint are for dense models"):
        run(dataclasses.replace(config, checkpoint=Path("a.pth"), overwrite=True))


def test_a_pruned_model_is_fine_tuned_later(finished: Path, digits: Path, quick: RunConfig) -> None:
    before = read_artifact(finished)
    config = FinetuneConfig(
        artifact=str(finished), data_path=str(digits), use_kd=True, epochs_ft=1, lr_ft=5e-4, hflip=False,
        limit_val=100, num_workers=0, device="cpu", save_dir=quick.save_dir, train_batch_size=128,
    )  # fmt: skip
    report = run_finetune(config)
    tuned = read_artifact(quick.save_dir)
    assert tuned.plans == before.plans
    assert report.sites == before.plans[0].widths
    assert report.keep_ratio == pytest.approx(0.3, abs=0.01)
    assert report.base.top1 == before.metrics["dense"]["top1"]  # type: ignore[index]
    assert report.pruned.top1 == before.metrics["top1"]  # type: ignore[index]
    assert report.final.epoch == 1
    assert report.best.top1 > report.pruned.top1
    assert report.config["teacher"] == "source"
    again = run_finetune(dataclasses.replace(config, resume="auto"))
    assert again.final.top1 == report.final.top1
    with (
        folder_lock(quick.save_dir),
        pytest.raises(InputError, match="save_dir must be a folder into which no other job writes"),
    ):
        run_finetune(dataclasses.replace(config, resume="auto"))
    with pytest.raises(InputError, match=r"teacher: 'source' -> '.*artifact'"):
        run_finetune(dataclasses.replace(config, resume="auto", teacher=str(finished / "artifact")))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"artifact": "test_vit"}, "takes a pruned model or the folder of a run, got test_vit"),
        ({"epochs_ft": 0}, "epochs_ft must be at least 1"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused(
    finished: Path, digits: Path, tmp_path: Path, changed: dict[str, Any], text: str
) -> None:
    values = {"artifact": str(finished), "data_path": str(digits), "save_dir": tmp_path / "new", "device": "cpu"}
    with pytest.raises(InputError, match=text):
        run_finetune(FinetuneConfig(**values | changed))
    assert not (tmp_path / "new").exists()
