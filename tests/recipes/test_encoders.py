"""Models without a head, and images without labels: pruned, fine-tuned, reported without figures of a classifier."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import vbp
from vbp import InputError, RunConfig, load_classifier, load_pruned
from vbp.cli.evaluate import run_eval
from vbp.cli.options import EvalConfig
from vbp.data.digits import MODEL_KWARGS, MODEL_NAME, PREPROCESSING, WEIGHTS, write_digits
from vbp.deploy.open_model import open_model
from vbp.recipes.config import FinetuneConfig
from vbp.recipes.run import run, run_finetune
from vbp.report.run_report import RunReport

HEADLESS = {**MODEL_KWARGS, "num_classes": 0}
PREPARED = {name: getattr(PREPROCESSING, name) for name in ("crop_pct", "interpolation", "mean", "std")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of images without any folder in it."""
    folder = tmp_path_factory.mktemp("photos")
    write_digits(folder / "digits")
    for number, path in enumerate(sorted((folder / "digits/train").rglob("*.png"))[::15]):
        (folder / "flat").mkdir(exist_ok=True)
        shutil.copy(path, folder / f"flat/{number}.png")
    return folder / "flat"


@pytest.fixture(scope="module")
def config(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Return a run of the digits' model without its head."""
    return RunConfig(
        data_path=str(photos), model_name=MODEL_NAME, model_kwargs=HEADLESS, checkpoint=WEIGHTS, **PREPARED,
        keep_ratio=0.5, refit_producers="off", refit_stream="off", epochs_ft=1, lr_ft=5e-4, train_batch_size=16,
        num_workers=0, device="cpu", save_dir=tmp_path_factory.mktemp("encoder") / "run",
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(config: RunConfig) -> RunReport:
    return run(config)


def test_a_run_reports_agreement_and_no_accuracy(config: RunConfig, report: RunReport) -> None:
    summary = json.loads((config.save_dir / "summary.json").read_text())
    for name in ("base", "pruned", "best", "final"):
        assert "top1" not in summary[name]
        assert "top5" not in summary[name]
        assert 0 < summary[name]["cosine"] <= 1
    assert summary["base"]["neighbours"] == 100
    assert summary["pruned"]["neighbours"] < 100
    assert summary["objective"]["kind"] == "features"
    table = report.table()
    assert "cosine" in table
    assert "neighbours %" in table
    assert "MACs" in table
    assert "top-1" not in table
    pages = [(config.save_dir / name).read_text() for name in ("report.html", "report.md")]
    for page in pages:
        assert "cosine" in page.lower()
        assert "top-1" not in page.lower()
        assert "accuracy" not in page.lower()
    assert RunReport.read(config.save_dir).to_dict() == report.to_dict()


def test_the_log_says_what_is_preserved(config: RunConfig, report: RunReport) -> None:
    text = (config.save_dir / "vbp_imagenet.log").read_text()
    assert "objective features: the features are preserved: output (pooled)" in text


def test_fine_tuning_is_distillation_of_the_features(config: RunConfig, report: RunReport) -> None:
    rows = [json.loads(line) for line in (config.save_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert "train_top1" not in rows[1]
    assert 0 < rows[1]["train_loss"] < 1


def test_the_artifact_returns_features(config: RunConfig, report: RunReport) -> None:
    pruned = load_pruned(config.save_dir)
    opened = open_model(str(config.save_dir))
    assert opened.classifier.num_classes == 0
    assert pruned(opened.classifier.example_input()).shape == (1, 64)
    metrics = vbp.read_artifact(config.save_dir).metrics or {}
    assert metrics["cosine"] == report.best.cosine
    card = vbp.model_card(vbp.read_artifact(config.save_dir), "me/tiny")
    assert "image-feature-extraction" in card
    with pytest.raises(InputError, match="vbp eval needs a model with classes"):
        run_eval(EvalConfig(str(config.save_dir), config.data_path, device="cpu"))


def test_a_pruned_encoder_is_tuned_towards_the_dense_one(
    config: RunConfig, report: RunReport, tmp_path: Path
) -> None:
    tuned = run_finetune(
        FinetuneConfig(
            artifact=str(config.save_dir),
            data_path=config.data_path,
            save_dir=tmp_path / "tuned",
            epochs_ft=1,
            lr_ft=5e-4,
            train_batch_size=16,
            num_workers=0,
            device="cpu",
        )
    )
    assert tuned.pruned.cosine == pytest.approx(report.best.cosine, abs=1e-5)
    assert tuned.final.cosine is not None
    assert tuned.final.cosine > 0.5
    assert tuned.base.neighbours == 100


def test_a_classifier_is_pruned_with_images_alone(config: RunConfig, tmp_path: Path) -> None:
    alone = replace(
        config,
        model_kwargs=dict(MODEL_KWARGS),
        epochs_ft=0,
        lr_ft=1.5e-5,
        train_batch_size=64,
        save_dir=tmp_path / "a",
    )
    found = run(alone)
    assert found.base.same == 100
    assert found.pruned.top1 is None
    assert 0 < (found.pruned.same or 0) <= 100
    assert "same class %" in found.table()
    assert found.objective["kind"] == "logits"


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (
            {"model_kwargs": dict(MODEL_KWARGS)},
            "fine-tuning a classifier needs labels, got images without class fold",
        ),
        ({"criterion": "taylor"}, "the criterion taylor ranks by labels, got a model that is preserved by its feat"),
        ({"use_kd": True}, "use_kd change nothing without labels"),
        ({"mixup": 0.1}, "mixup change nothing without labels"),
        ({"objective": "logits"}, "the objective logits needs a model with a head"),
        ({"objective": "zeroshot"}, "needs text embeddings, got none; give --text_embeddings FILE"),
        ({"objective": "zeroshot", "text_embeddings": Path("none.npy")}, "text_embeddings must be an existing file"),
    ],
)
def test_what_needs_labels_is_refused_before_the_work(
    config: RunConfig, tmp_path: Path, changed: dict[str, Any], fault: str
) -> None:
    with pytest.raises(InputError, match=fault):
        run(replace(config, save_dir=tmp_path / "none", **changed))
    assert not (tmp_path / "none").exists()


def test_prune_tells_how_alike_both_models_see_images() -> None:
    encoder = load_classifier(MODEL_NAME, checkpoint=WEIGHTS, model_kwargs=HEADLESS, **PREPARED)
    size = encoder.preprocessing.img_size
    images = torch.randn(24, len(encoder.preprocessing.mean), *size, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    result = vbp.prune(encoder, [images], keep_ratio=0.6, val=[images], progress=False)
    assert result.retrieval is not None
    assert (result.accuracy, result.dense_accuracy) == (None, None)
    assert f"cosine {result.retrieval.cosine:.4f}" in result.table()
    assert "top-1" not in result.table()
    assert result.figures()["cosine"] == result.retrieval.cosine
    assert "top1" not in result.figures()
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.state_dict().items())
    by_variance = vbp.prune(encoder, [images], keep_ratio=0.6, criterion="variance", val=[images], progress=False)
    assert by_variance.retrieval is not None
    assert result.retrieval.cosine > 0.9
    assert by_variance.retrieval.images == 24
    with pytest.raises(InputError, match="the criterion taylor ranks by labels"):
        vbp.prune(encoder, [(images, torch.zeros(24, dtype=torch.long))], criterion="taylor", progress=False)


def clip_tower(folder: Path) -> Path:
    """Save the image tower of a small contrastive model, as transformers does."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=8))
    tower.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "do_resize": True,
        "resample": 3, "do_rescale": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_a_contrastive_tower_is_pruned_by_features_or_by_its_texts(tmp_path: Path) -> None:
    tower = load_classifier(str(clip_tower(tmp_path / "tower")))
    assert (tower.num_classes, tower.source.name) == (0, "CLIPVisionModelWithProjection")
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "texts.npy", np.random.default_rng(0).standard_normal((6, 8)))
    features = vbp.prune(tower, [images], keep_ratio=0.6, progress=False)
    assert "image_embeds (pooled), last_hidden_state" in features.objective
    head = features.refits.head
    assert head is not None
    assert head.layer == "visual_projection"
    assert head.measure == "mean standardised squared error of the features"
    features.save(tmp_path / "pruned")
    loaded = load_pruned(tmp_path / "pruned")
    with torch.no_grad():
        torch.testing.assert_close(embeds(loaded(images)), embeds(features.model(images)), rtol=0, atol=0)
    texts = {"objective": "zeroshot", "text_embeddings": tmp_path / "texts.npy"}
    zeroshot = vbp.prune(tower, [images], keep_ratio=0.6, val=[images], progress=False, **texts)
    assert "similarities of image_embeds with 6 texts" in zeroshot.objective
    assert zeroshot.retrieval is not None
    assert zeroshot.retrieval.same is not None
    assert zeroshot.candidates
    assert zeroshot.refits.head is None  # its linear layer does not return the similarities
    assert zeroshot.refits.stream is not None
    assert zeroshot.refits.stream.measure == "mean KL of the image-text similarities from the dense model's"


def embeds(output: Any) -> Tensor:
    found: Tensor = output.image_embeds
    return found
