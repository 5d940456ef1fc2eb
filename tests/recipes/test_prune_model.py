"""One call that prunes any model: what comes back, what it leaves alone, and that a run prunes by the same steps."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family
from torch import Tensor, nn

import vbp
from vbp import InputError, RunConfig, count_macs, count_parameters, evaluate, load_classifier, load_pruned
from vbp.recipes.run import run
from vbp.recipes.setup import open_session, prepare
from vbp.runtime.forward import logits_of


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(24, 3, 8, 8, generator=generator)


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.arange(24) % 7


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    """Return a network of nobody's library, in training mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 40), nn.GELU(), nn.Linear(40, 7))


def test_every_family_comes_back_smaller_and_stays_as_it_was(family: Family) -> None:
    torch.manual_seed(0)
    model = family.build().float().train()
    before, images = copy.deepcopy(model.state_dict()), family.example(12, torch.float32)
    result = vbp.prune(model, [images[:7], images[7:]], keep_ratio=0.5)
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point())
    assert not result.model.training
    assert result.plan.kept == round(0.5 * result.plan.total)
    assert result.images == 12
    assert result.cost.params == (count_parameters(model), count_parameters(result.model))
    assert result.cost.macs == (count_macs(model, images[:1]), count_macs(result.model, images[:1]))
    assert logits_of(result.model(images)).shape == logits_of(model.eval()(images)).shape


def test_a_run_prunes_by_the_same_steps(quick: RunConfig, one_thread: None) -> None:
    config = RunConfig(**{**vars(quick), "criterion": "auto", "compensation": "refit", "global_pruning": False})
    run(config)
    with open_session(config) as session:
        job = prepare(RunConfig(**{**vars(config), "overwrite": True}), session)
        given = job.calibration.load(job.calibration.order, config.val_batch_size)
        assert given is not None
        result = vbp.prune(job.classifier, given, keep_ratio=config.keep_ratio)
    assert result.plan.to_dict() == load_plan(config.save_dir / "plan.json")
    ran = load_pruned(config.save_dir)
    with torch.no_grad():
        torch.testing.assert_close(result.model(job.example), ran(job.example), rtol=0, atol=1e-5)


def load_plan(path: Path) -> dict[str, Any]:
    return vbp.PruningPlan.load(path).to_dict()


@pytest.mark.parametrize(("name", "share"), [("target_macs", 0.7), ("target_params", "70%")])
def test_a_target_is_met(plain: nn.Module, pixels: Tensor, name: str, share: float | str) -> None:
    result = vbp.prune(plain, [pixels], **{name: share})
    dense, pruned = result.cost.macs if name == "target_macs" else result.cost.params
    assert 0.65 < pruned / dense <= 0.7
    assert result.budget.met
    assert result.budget.sentence() in result.table()


def test_a_speed_up_is_measured(plain: nn.Module, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vbp.cost.timing.TURN_S", 0.005)
    result = vbp.prune(plain, [pixels], target_speedup=1.05, latency_batch=8)
    assert result.budget.budget.quantity == "speedup"
    assert result.budget.reached > 0


def test_images_may_come_in_any_shape_of_batch(plain: nn.Module, pixels: Tensor, labels: Tensor) -> None:
    expected = vbp.prune(plain, [pixels], criterion="variance").plan
    batches: list[Any] = [
        pixels, [(pixels, labels)], [{"pixel_values": pixels}], [pixels.numpy()], [[pixels]],
        (part for part in pixels.split(10)),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels, labels), batch_size=10),
    ]  # fmt: skip
    for given in batches:
        assert vbp.prune(plain, given, criterion="variance").plan == expected


def test_only_the_first_images_are_read(plain: nn.Module, pixels: Tensor) -> None:
    read = []

    def batches() -> Any:
        for part in pixels.split(6):
            read.append(len(part))
            yield part

    assert vbp.prune(plain, batches(), calib_samples=10).images == 10
    assert read == [6, 6]
    assert vbp.prune(plain, pixels.split(6), calib_samples=0).images == 24


def test_labels_are_read_where_the_criterion_needs_them(plain: nn.Module, pixels: Tensor, labels: Tensor) -> None:
    assert vbp.prune(plain, [(pixels, labels)], criterion="taylor").plan.kept == 26
    with pytest.raises(InputError, match="a batch must be"):
        vbp.prune(plain, [pixels], criterion="taylor")


def test_accuracy_is_measured_on_labelled_images(plain: nn.Module, pixels: Tensor, labels: Tensor) -> None:
    val = [(pixels, labels)]
    result = vbp.prune(plain, [pixels], val=val)
    assert result.accuracy == evaluate(result.model, val, "cpu")
    assert result.dense_accuracy == evaluate(plain, val, "cpu")
    assert f"{result.accuracy.top1:.2f}" in result.table()
    assert result.figures()["top1"] == result.accuracy.top1
    assert vbp.prune(plain, [pixels]).accuracy is None
    with pytest.raises(InputError, match="several times"):
        vbp.prune(plain, [pixels], val=iter(val))


def test_a_classifier_is_saved_with_all_that_loading_needs(tmp_path: Path) -> None:
    classifier = load_classifier("test_vit", allow_random_init=True, model_kwargs={"num_classes": 7})
    images = classifier.example_input(8)
    result = vbp.prune(classifier, [images], keep_ratio=0.5, round_to=8)
    result.save(tmp_path / "pruned")
    loaded = load_pruned(tmp_path / "pruned")
    with torch.no_grad():
        assert loaded(images).equal(result.model(images))
    artifact = vbp.read_artifact(tmp_path / "pruned")
    assert artifact.preprocessing == classifier.preprocessing
    assert artifact.settings is not None
    assert artifact.settings["round_to"] == 8
    assert artifact.metrics is not None
    assert artifact.metrics["params"] == result.cost.params[1]


def test_a_model_of_ones_own_is_saved_too(plain: nn.Module, pixels: Tensor, tmp_path: Path) -> None:
    result = vbp.prune(plain, [pixels])
    result.save(tmp_path / "pruned.pth")
    with torch.no_grad():
        assert load_pruned(tmp_path / "pruned.pth", copy.deepcopy(plain))(pixels).equal(result.model(pixels))


def test_layers_batchnorms_and_costs_are_chosen_as_in_a_run() -> None:
    classifier = load_classifier("test_resnet", allow_random_init=True, model_kwargs={"num_classes": 7})
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"criterion": "l2", "compensation": "none", "target_macs": 0.8}
    every = vbp.prune(classifier, [images], **settings, global_pruning=True, convolutions=True, cost_aware="on")
    assert every.refits.batchnorm is not None
    assert every.settings["convolutions"] is True
    assert not {"include", "exclude"} & every.settings.keys()
    plain = vbp.prune(classifier, [images], **settings, global_pruning=True, convolutions=True)
    assert every.plan.kept / every.plan.total > plain.plan.kept / plain.plan.total
    first = next(iter(every.plan.widths))
    some = vbp.prune(
        classifier, [images], criterion="l2", compensation="none", keep_ratio=0.5, convolutions=True, exclude=[first],
        batchnorm="keep",
    )  # fmt: skip
    assert {*some.plan.widths} == {*every.plan.widths} - {first}
    assert some.plan.exclude == (first,)
    assert some.settings["exclude"] == [first]
    assert some.refits.batchnorm is None
    with pytest.raises(InputError, match="include must match the name of a site"):
        vbp.prune(classifier, [images], convolutions=True, include=["heads.*"])


def test_attention_stays_whole_where_it_cannot_be_cut(plain: nn.Module, pixels: Tensor) -> None:
    with pytest.raises(InputError, match="no prunable attention in Sequential"):
        vbp.prune(plain, [pixels], target_macs=0.7, attention="on")
    assert vbp.prune(plain, [pixels], target_macs=0.7).plan.attention_share is None


def test_of_rotary_attention_the_values_alone_share_a_budget(caplog: pytest.LogCaptureFixture) -> None:
    import timm

    torch.manual_seed(0)
    rotary = timm.create_model(
        "eva02_tiny_patch14_224", img_size=28, embed_dim=32, depth=2, num_heads=2, num_classes=7
    )
    with caplog.at_level("INFO", "vbp"):
        found = vbp.prune(rotary, [torch.randn(8, 3, 28, 28)], target_macs=0.8)
    assert {entry.site.kind for entry in found.plan.sites} == {"mlp", "value"}
    assert "queries and keys of the attention behind" in caplog.text


def test_layers_without_effect_on_the_output_go_first() -> None:
    from transformers import SiglipConfig, SiglipForImageClassification

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(vision_config={**vision, "image_size": 32, "patch_size": 8}, num_labels=5)
    model = SiglipForImageClassification(config).eval()  # reads the tokens; its pooling runs for nothing
    batches = [torch.randn(16, 3, 32, 32) for _ in range(2)]
    halved = vbp.prune(model, batches, keep_ratio=0.5, progress=False)
    kept = {entry.site.name: len(entry.keep) for entry in halved.plan.sites}
    assert kept["vision_model.head.mlp.fc1"] == 2  # the least share of 64
    assert min(kept[f"vision_model.encoder.layers.{layer}.mlp.fc1"] for layer in range(2)) > 16
    whole = vbp.prune(model, batches, target_macs=0.6, progress=False)
    kept = {entry.site.name: len(entry.keep) / entry.site.hidden for entry in whole.plan.sites}
    assert min(kept, key=lambda name: kept[name]) == "vision_model.head.attention.out_proj"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"cost_aware": "on"}, "cost_aware changes nothing without a target"),
        ({"keep_ratio": 0.5, "target_macs": 0.5}, "one budget"),
        ({"keep_ratio": 1.3}, "keep_ratio must be in"),
        ({"keep_ratio": "half"}, "keep_ratio, which must be a finite number, got 'half'"),
        ({"criterion": "magnitude"}, "must be one of auto, variance"),
        ({"sparsity": 0.5}, "no setting sparsity; allowed are"),
        ({"stats_path": "a"}, "no setting stats_path"),
        ({"round_to": "eight"}, "round_to"),
        ({"attn_keep_ratio": 0.5}, "bottleneck"),
        ({"compensation": "mean"}, "auto chooses for the refit"),
        ({"calib_samples": -1}, "calib_samples must be at least 0"),
    ],
)
def test_bad_settings_are_refused_before_images_are_read(
    plain: nn.Module, settings: dict[str, Any], text: str
) -> None:
    def batches() -> Any:
        raise AssertionError("read")
        yield

    with pytest.raises(InputError, match=text):
        vbp.prune(plain, batches(), **settings)


@pytest.mark.parametrize("images", [[], [torch.zeros(0, 3, 32, 32)]])
def test_without_images_nothing_is_pruned(plain: nn.Module, images: list[Tensor]) -> None:
    with pytest.raises(InputError, match="at least one image, got none"):
        vbp.prune(plain, images)


def test_progress_is_shown_where_a_person_watches(
    plain: nn.Module, pixels: Tensor, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    vbp.prune(plain, [pixels])
    assert capfd.readouterr() == ("", "")
    monkeypatch.setitem(sys.modules, "ipykernel", object())  # type: ignore[arg-type]
    vbp.prune(plain, [pixels], progress=False)
    assert capfd.readouterr() == ("", "")
    vbp.prune(plain, [pixels])
    assert "calibration" in capfd.readouterr().err
