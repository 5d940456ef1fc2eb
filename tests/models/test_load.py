"""Loading classifiers: names, weight files, families, preprocessing; no network, tiny models."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vbp.data.preprocessing import evaluation_transform
from vbp.errors import InputError
from vbp.models.classifier import Classifier, ModelSource
from vbp.models.load import build_model, load_classifier

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
TINY: list[tuple[str, dict[str, Any], str]] = [
    ("test_vit", VIT, "vit"),
    ("deit_tiny_patch16_224", VIT, "vit"),
    ("deit_tiny_distilled_patch16_224", VIT, "vit"),
    ("deit3_small_patch16_224", VIT, "vit"),
    ("convnext_tiny", CONVNEXT, "convnext"),
    ("convnextv2_tiny", CONVNEXT, "convnext"),
    ("swin_tiny_patch4_window7_224", SWIN, "swin"),
    ("swinv2_tiny_window8_256", SWIN, "swin"),
    ("test_resnet", {}, "other"),
]
OVERRIDES: dict[str, Any] = {
    "img_size": 32,
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def random_classifier(name: str, **kwargs: Any) -> Classifier:
    torch.manual_seed(0)
    return load_classifier(name, allow_random_init=True, model_kwargs=kwargs)


def logits(model: nn.Module, size: tuple[int, int] = (32, 32)) -> Tensor:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = model(images)
    result: Tensor = getattr(output, "logits", output)
    return result


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    first, second = model.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# --- any timm model -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kwargs", "family"), TINY)
def test_timm_file_is_loaded_exactly_and_built_again(
    name: str, kwargs: dict[str, Any], family: str, tmp_path: Path
) -> None:
    original = random_classifier(name, num_classes=7, **kwargs)
    save_file(original.model.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_classifier(name, checkpoint=tmp_path / "weights.safetensors", model_kwargs=kwargs)
    assert loaded.family == family
    assert loaded.num_classes == 7  # from the file's head
    assert not loaded.model.training
    assert_same_weights(loaded.model, original.model)
    source = ModelSource.from_dict(json.loads(json.dumps(loaded.source.to_dict())))
    assert source == loaded.source
    rebuilt = build_model(source)
    rebuilt.load_state_dict(loaded.model.state_dict(), strict=True)
    size = loaded.preprocessing.img_size
    assert torch.equal(logits(rebuilt, size), logits(original.model, size))


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"model": weights, "epoch": 3},
        lambda weights: {"state_dict": weights, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}},
        lambda weights: {"model": {f"module.{name}": tensor for name, tensor in weights.items()}},
        lambda weights: {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()},
        lambda weights: {
            "model": {name: torch.zeros_like(tensor) for name, tensor in weights.items()},
            "model_ema": weights,
        },
        lambda weights: {"model_state_dict": weights, "loss": 0.3},
        lambda weights: {"module": weights, "net": None},
        lambda weights: {"ema": weights, "net": {}},
        lambda weights: {"state_dict": {f"model.module.{name}": tensor for name, tensor in weights.items()}},
        lambda weights: {f"net.backbone.{name}": tensor for name, tensor in weights.items()},
        lambda weights: {name.replace("blocks.0.", "blocks.0._orig_mod."): weights[name] for name in weights},
        lambda weights: {"n_averaged": torch.tensor(5), **{f"module.{name}": weights[name] for name in weights}},
    ],
    ids=[
        "bare", "model", "state_dict", "module.", "module._orig_mod.", "averaged first", "PyTorch's tutorial",
        "DeepSpeed", "ema", "Lightning", "net.backbone.", "a compiled block", "AveragedModel",
    ],
)  # fmt: skip
def test_wrappers_of_training_scripts(suffix: str, wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    original = random_classifier("test_vit", **VIT)
    torch.save(wrap(original.model.state_dict()), tmp_path / f"w{suffix}")
    loaded = load_classifier("test_vit", checkpoint=tmp_path / f"w{suffix}", model_kwargs=VIT)
    assert_same_weights(loaded.model, original.model)


@pytest.mark.parametrize("name", ["model_best.pth.tar", "last.ckpt", "pytorch_model.bin", "W.PTH", "W.SafeTensors"])
def test_names_of_weight_files(name: str, tmp_path: Path) -> None:
    original = random_classifier("test_vit", **VIT)
    save = save_file if name.lower().endswith(".safetensors") else torch.save
    save(original.model.state_dict(), tmp_path / name)
    assert_same_weights(
        load_classifier("test_vit", checkpoint=tmp_path / name, model_kwargs=VIT).model, original.model
    )


def test_a_file_that_can_be_read_in_two_ways_or_in_none_is_refused(tmp_path: Path) -> None:
    """Kin to files of two networks, and of one in a wrapper that nobody knows."""
    weights, path = random_classifier("test_vit", **VIT).model.state_dict(), tmp_path / "w.pth"
    for content, text in (
        ({"net": weights, "model": weights}, r"must hold one state dict, got those under model, net"),
        ({f"model.encoder_q.{name}": weights[name] for name in weights}, r"32 missing .*nor .* without 'model\.'"),
        ({f"net.{name}": weights[name].to("meta") for name in weights}, r"nor do they fit without 'net\.'"),
        ({**weights, "norm.bias": weights["norm.bias"].to("meta")}, r"1 without values or quantised \(norm\.bias\)"),
    ):
        torch.save(content, path)
        with pytest.raises(InputError, match=text):
            load_classifier("test_vit", checkpoint=path, model_kwargs=VIT)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<!DOCTYPE html><html>sign in</html>", "an HTML or XML page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 22\n",
            "a git-lfs pointer; .*git lfs pull",
        ),
    ],
)
def test_what_a_download_left_in_the_place_of_weights_is_named(
    content: bytes, kind: str, suffix: str, tmp_path: Path
) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(InputError, match=f"must hold the weights of a model, got {kind}"):
        load_classifier("test_vit", checkpoint=tmp_path / f"w{suffix}", model_kwargs=VIT)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_program_is_named_and_no_advice_to_run_code_is_given(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "s.pt")
    (tmp_path / "t.pt").write_bytes(b"neither a zip file nor a pickle")
    for name, text in (
        ("s.pt", "got a TorchScript program"),
        ("t.pt", r"no readable PyTorch weight file \(it does not begin as"),
    ):
        with pytest.raises(InputError, match=text) as caught:
            load_classifier("test_vit", checkpoint=tmp_path / name, model_kwargs=VIT)
        assert "weights_only" not in str(caught.value)


def test_deit3_names_of_the_original_files_are_converted(tmp_path: Path) -> None:
    original = random_classifier("deit3_small_patch16_224", **VIT)
    weights = {
        re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): tensor for name, tensor in original.model.state_dict().items()
    }
    assert "blocks.0.gamma_1" in weights
    torch.save({"model": weights}, tmp_path / "w.pth")
    loaded = load_classifier("deit3_small_patch16_224", checkpoint=tmp_path / "w.pth", model_kwargs=VIT)
    assert_same_weights(loaded.model, original.model)


def test_a_file_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    weights = random_classifier("test_vit", **VIT).model.state_dict()
    del weights["norm.weight"]
    weights["extra.weight"] = torch.zeros(3)
    weights["blocks.0.mlp.fc1.bias"] = torch.zeros(5)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(InputError) as caught:
        load_classifier("test_vit", checkpoint=tmp_path / "w.safetensors", model_kwargs=VIT)
    text = str(caught.value)
    assert "1 missing (norm.weight)" in text
    assert "1 too much (extra.weight)" in text
    assert "1 of another shape (blocks.0.mlp.fc1.bias: file [5]" in text


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_tiny_patch4_window7_224", "deit_tiny_patch16_224"])
def test_weights_of_another_architecture_are_refused(name: str, tmp_path: Path) -> None:
    save_file(random_classifier("test_resnet").model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"do not fit the model: \d+ missing .* too much"):
        load_classifier(name, checkpoint=tmp_path / "w.safetensors")


def test_tensors_that_the_conversion_drops_are_too_much(tmp_path: Path) -> None:
    weights = random_classifier("test_vit", **VIT).model.state_dict()
    weights["pre_logits.fc.weight"] = torch.zeros(3, 3)  # timm's conversion leaves these out
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"1 too much \(pre_logits.fc.weight\)"):
        load_classifier("test_vit", checkpoint=tmp_path / "w.safetensors", model_kwargs=VIT)


def test_number_of_classes_given_and_in_the_file_must_agree(tmp_path: Path) -> None:
    save_file(random_classifier("test_vit", **VIT).model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"head.weight: file \[1000, 32\], model \[5, 32\]"):
        load_classifier("test_vit", checkpoint=tmp_path / "w.safetensors", model_kwargs={**VIT, "num_classes": 5})


class _Thing:
    def __init__(self) -> None:
        self.value = 1


def _write_text(path: Path) -> None:
    path.write_text("no weights at all")


def _write_truncated(path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file({"a": torch.zeros(1000)}, path)
    else:
        torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-700])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("write", [_write_text, _write_truncated, lambda path: path.write_bytes(b"")])
def test_damaged_files_are_one_clear_error(suffix: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    write(path)
    with pytest.raises(InputError, match=r"is no readable .* truncated") as caught:
        load_classifier("test_vit", checkpoint=path, model_kwargs=VIT)
    assert "\n" not in str(caught.value)


def test_files_that_need_code_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "thing": _Thing()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"more than tensors \(.*_Thing\) and could run code"):
        load_classifier("test_vit", checkpoint=tmp_path / "w.pth", model_kwargs=VIT)


@pytest.mark.parametrize("content", [{}, [torch.zeros(1)], {"epoch": 3}, {"model": {"a": 3}}])
def test_files_without_state_dict_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match="must hold a state dict"):
        load_classifier("test_vit", checkpoint=tmp_path / "w.pth", model_kwargs=VIT)


def test_random_weights_only_on_demand_and_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        random_classifier("test_vit", **VIT)
    assert "starts from random weights" in caplog.text
    with pytest.raises(InputError, match=r"could not be fetched .*--checkpoint FILE.*local Hugging Face folder") as e:
        load_classifier("test_vit")
    assert isinstance(e.value.__cause__, OSError)


@pytest.mark.parametrize("name", ["timm/test_vit.r160_in1k", "hf-hub:timm/test_vit.r160_in1k", "owner/some-model"])
def test_hub_names_without_network(name: str) -> None:
    with pytest.raises(InputError, match="could not be fetched") as caught:
        load_classifier(name)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "name",
    [
        *("hf-hub:../../x", "hf-hub:/etc/passwd", "timm/../x", "timm/", "hf_hub:", "hf-hub:a/b/c", "hf-hub:a\nb/c"),
        *("hf-hub:https://example.org/x", "local-dir:/tmp", "x" * 300, "a/" * 3000, "../x", "a/.."),
    ],
)
def test_a_name_that_cannot_be_one_is_refused_before_anything_is_sought(name: str) -> None:
    """Kin to reports of model names that were taken for paths, or for addresses."""
    with pytest.raises(
        InputError, match=r"model name must be|model_name must be|neither an existing folder"
    ) as refused:
        load_classifier(name)
    assert refused.value.__cause__ is None or "could not be fetched" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_hub_name_of_timm_with_random_weights_needs_no_network() -> None:
    classifier = random_classifier("timm/test_vit.r160_in1k", **VIT)
    assert classifier.source.name == "test_vit"
    assert classifier.preprocessing.img_size == (160, 160)


def test_pretrained_weights_come_from_the_hub_and_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = dict(random_classifier("test_vit").model.state_dict())
    asked = []

    def fetch(repository: str, *_: object, **__: object) -> dict[str, Tensor]:
        asked.append(repository)
        return dict(weights)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fetch)
    loaded = load_classifier("test_vit", model_type="vit")
    assert asked == ["timm/test_vit.r160_in1k"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.model.state_dict().items())
    with pytest.raises(InputError, match=r"could not be loaded: .*blocks\.1"):
        load_classifier("test_vit", model_kwargs={"depth": 1})
    del weights["norm.weight"]
    with pytest.raises(InputError, match=r"could not be loaded: .*Missing key.*norm\.weight"):
        load_classifier("test_vit")


def test_pretrained_head_of_another_size_is_not_left_at_random() -> None:
    with pytest.raises(InputError, match="for 1000 classes, got num_classes 5"):
        load_classifier("test_vit", model_kwargs={"num_classes": 5})


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("deit_tny_patch16_224", {}, "did you mean deit_tiny_patch16_224"),
        ("zzzz", {}, "timm.list_models"),
        ("", {}, "got nothing"),
        ("test_vit.nope", {}, "timm has test_vit.r160_in1k"),
        ("./no/such/folder", {}, "neither an existing folder nor"),
        ("test_vit", {"checkpoint": Path("none.pth")}, "existing file, got none.pth"),
        ("test_vit", {"checkpoint": Path("a.pth"), "convnext_checkpoint": Path("b.pth")}, "both given"),
        ("owner/name", {"checkpoint": Path("a.pth")}, "the hub id carries its own weights"),
        ("timm/test_vit", {"checkpoint": Path("a.pth")}, "the hub id carries its own weights"),
        ("owner/name", {"model_kwargs": {"depth": 2}}, "model arguments are for timm models, got depth"),
        ("test_vit", {"model_type": "resnet"}, "must be one of vit, convnext, swin, auto, got 'resnet'"),
        ("test_vit", {"model_type": "swin"}, "must be auto or 'vit', the family of test_vit, got 'swin'"),
        ("test_vit", {"model_kwargs": {"nope": 1}}, "unexpected keyword argument 'nope'"),
        ("test_vit", {"model_kwargs": {"pretrained": True}}, "architecture only, got pretrained"),
        ("test_vit", {"model_kwargs": {"act_layer": nn.GELU}}, "numbers, texts, lists and tables"),
        ("test_vit", {"img_size": 0}, "positive whole number of pixels, got 0"),
        ("test_vit", {"img_size": 32, "model_kwargs": {"img_size": 64}}, "img_size is given twice"),
        ("test_vit", {"crop_pct": 2.0}, "crop_pct"),
        ("test_vit", {"model_kwargs": {"in_chans": 1}}, "does not take images of 3 x 160 x 160"),
    ],
)
def test_bad_input(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        load_classifier(name, allow_random_init=True, **options)


def test_suffix_of_a_weight_file(tmp_path: Path) -> None:
    (tmp_path / "w.npz").touch()
    with pytest.raises(InputError, match=r"must be a \.safetensors, \.pth, \.pt file"):
        load_classifier("test_vit", checkpoint=tmp_path / "w.npz")


# --- image size and preprocessing of timm models --------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")  # two, from torch
@pytest.mark.parametrize(("name", "kwargs", "resampled"), [(*TINY[0][:2], "pos_embed"), (*TINY[6][:2], "relative")])
def test_img_size_builds_the_model_at_that_size(
    name: str, kwargs: dict[str, Any], resampled: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(random_classifier(name, **kwargs).model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_classifier(name, checkpoint=tmp_path / "w.safetensors", model_kwargs=kwargs, img_size=48)
    assert loaded.preprocessing.img_size == (48, 48)
    assert loaded.source.arguments["img_size"] == 48
    assert logits(loaded.model, (48, 48)).shape == (2, 1000)
    rebuilt = build_model(loaded.source)
    rebuilt.load_state_dict(loaded.model.state_dict(), strict=True)
    assert resampled in caplog.text


def test_convnext_takes_any_size() -> None:
    classifier = load_classifier("convnext_tiny", allow_random_init=True, model_kwargs=CONVNEXT, img_size=64)
    assert classifier.preprocessing.img_size == (64, 64)
    assert "img_size" not in classifier.source.arguments


def test_preprocessing_is_the_tags_own_with_overrides() -> None:
    classifier = random_classifier("convnext_tiny.fb_in1k", **CONVNEXT)
    default = random_classifier("convnext_tiny", **CONVNEXT)
    assert (classifier.preprocessing.crop_pct, default.preprocessing.crop_pct) == (0.875, 0.95)
    changed = load_classifier("test_vit", allow_random_init=True, model_kwargs=VIT, **OVERRIDES).preprocessing
    assert {name: getattr(changed, name) for name in OVERRIDES} == {**OVERRIDES, "img_size": (32, 32)}


# --- Facebook's ConvNeXt files --------------------------------------------------------------------------


def facebook_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original naming, written down from the original model definition, not from timm's conversion."""
    renamed = {}
    for name, tensor in weights.items():
        new = re.sub(r"^stem\.", "downsample_layers.0.", name)
        new = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", new)
        new = new.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        new = re.sub(r"^head\.norm\.", "norm.", new)
        renamed[re.sub(r"^head\.fc\.", "head.", new)] = tensor
    return renamed


@pytest.fixture(scope="module")
def convnext_weights() -> dict[str, Tensor]:
    return dict(random_classifier("convnext_tiny", **CONVNEXT).model.state_dict())


@pytest.mark.parametrize(
    ("file", "size", "crop_pct"),
    [
        ("convnext_tiny_22k_1k_224.pth", 224, 0.875),
        ("convnext_tiny_1k_224_ema.pth", 224, 0.875),
        ("mine.pth", 224, 0.875),
        ("convnext_tiny_22k_1k_384.pth", 384, 1.0),
    ],
)
def test_facebook_convnext(
    file: str, size: int, crop_pct: float, convnext_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    weights = facebook_names(convnext_weights)
    assert {"downsample_layers.0.0.weight", "stages.3.0.pwconv2.weight", "norm.bias", "head.bias"} < set(weights)
    torch.save({"model": weights}, tmp_path / file)
    loaded = load_classifier(
        "convnext_tiny", model_type="convnext", convnext_checkpoint=tmp_path / file, model_kwargs=CONVNEXT
    )
    assert list(loaded.model.state_dict()) == list(convnext_weights)
    assert all(torch.equal(loaded.model.state_dict()[name], own) for name, own in convnext_weights.items())
    assert loaded.preprocessing.img_size == (size, size)
    assert loaded.preprocessing.crop_pct == crop_pct
    assert loaded.preprocessing.interpolation == "bicubic"
    assert loaded.preprocessing.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("variant", ["tiny", "small", "base", "large"])
def test_facebook_tags_at_224_are_alike(variant: str) -> None:
    records = [
        timm.get_pretrained_cfg(f"convnext_{variant}.{tag}").to_dict() for tag in ("fb_in1k", "fb_in22k_ft_in1k")
    ]
    for name in ("input_size", "crop_pct", "interpolation", "mean", "std", "crop_mode", "num_classes"):
        assert records[0][name] == records[1][name], name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"norm.weight": None}, "1 missing (head.norm.weight)"),
        ({"stages.0.0.dwconv.bias": None}, "1 missing (stages.0.blocks.0.conv_dw.bias)"),
        ({"unknown": torch.zeros(4)}, "1 too much (unknown)"),
        ({"norms.0.weight": torch.zeros(4)}, "1 too much (norms.0.weight)"),  # the conversion drops these
        ({"stem.0.bias": torch.zeros(8)}, "1 too much (downsample_layers.0.0.bias)"),  # two for one place
        ({"stages.9.0.pwconv1.weight": torch.zeros(4, 4)}, "model: 1 too much (stages.9.0.pwconv1.weight)"),
        ({"head.weight": torch.zeros(21841, 32), "head.bias": torch.zeros(21841)}, "head of ImageNet-22k"),
        ({"head.weight": torch.zeros(1000, 16)}, "1 of another shape (head.fc.weight: file [1000, 16]"),
    ],
)
def test_facebook_files_account_for_every_tensor(
    change: dict[str, Tensor | None], text: str, convnext_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    weights = {**facebook_names(convnext_weights), **change}
    torch.save({"model": {name: item for name, item in weights.items() if item is not None}}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=re.escape(text)):
        load_classifier("convnext_tiny", convnext_checkpoint=tmp_path / "w.pth", model_kwargs=CONVNEXT)


def test_facebook_files_are_for_convnext_in_the_original_layout(
    convnext_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({"model": convnext_weights}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="not in the layout of Facebook's"):
        load_classifier("convnext_tiny", convnext_checkpoint=tmp_path / "w.pth", model_kwargs=CONVNEXT)
    with pytest.raises(InputError, match="got the model name 'test_vit'"):
        load_classifier("test_vit", convnext_checkpoint=tmp_path / "w.pth")
    with pytest.raises(InputError, match="needs a ConvNeXt, got deit_tiny_patch16_224"):
        load_classifier("deit_tiny_patch16_224.fb_in1k", convnext_checkpoint=tmp_path / "w.pth", model_kwargs=VIT)


# --- Hugging Face ---------------------------------------------------------------------------------------

COMMON = {"image_size": 32, "num_labels": 5}
TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SWIN_CONFIG = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "patch_size": 2}
HF: list[tuple[str, str, dict[str, Any], str]] = [
    ("ViT", "ViT", {**TRANSFORMER, "patch_size": 8}, "vit"),
    ("DeiT", "DeiT", {**TRANSFORMER, "patch_size": 8}, "vit"),
    ("Swin", "ViT", SWIN_CONFIG, "swin"),
    ("Swinv2", "ViT", SWIN_CONFIG, "swin"),
    ("ConvNext", "ConvNext", {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}, "convnext"),
]
SIZES: dict[str, dict[str, Any]] = {
    "ViT": {"size": 32},
    "DeiT": {"size": 36, "crop_size": 32},
    "ConvNext": {"size": 32, "crop_pct": 0.875},
}


def hf_model(kind: str, values: dict[str, Any], suffix: str = "ForImageClassification") -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **values})
    return getattr(transformers, f"{kind}{suffix}")(config).eval()


def write_processor(folder: Path, kind: str, **values: Any) -> None:
    text = {"image_processor_type": f"{kind}ImageProcessor", "image_mean": [0.4, 0.5, 0.6], **SIZES.get(kind, {})}
    (folder / "preprocessor_config.json").write_text(json.dumps({**text, **values}))


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    hf_model(*HF[0][::2]).save_pretrained(tmp_path)
    write_processor(tmp_path, "ViT")
    return tmp_path


@pytest.mark.parametrize(("kind", "processor", "values", "family"), HF)
def test_hf_folder_is_loaded_exactly_and_built_again(
    kind: str, processor: str, values: dict[str, Any], family: str, tmp_path: Path
) -> None:
    original = hf_model(kind, values)
    original.save_pretrained(tmp_path)
    write_processor(tmp_path, processor)
    loaded = load_classifier(str(tmp_path))
    assert (loaded.family, loaded.num_classes) == (family, 5)
    assert loaded.preprocessing.img_size == (32, 32)
    assert_same_weights(loaded.model, original)
    text = json.dumps(loaded.source.to_dict())
    assert str(tmp_path) not in text
    rebuilt = build_model(ModelSource.from_dict(json.loads(text)))
    rebuilt.load_state_dict(loaded.model.state_dict(), strict=True)
    assert not rebuilt.training
    assert torch.equal(logits(rebuilt), logits(original))


def test_distilled_deit_keeps_both_heads(tmp_path: Path) -> None:
    original = hf_model("DeiT", HF[1][2], suffix="ForImageClassificationWithTeacher")
    original.save_pretrained(tmp_path)
    write_processor(tmp_path, "DeiT")
    loaded = load_classifier(str(tmp_path), model_type="vit")
    assert loaded.source.name == "DeiTForImageClassificationWithTeacher"
    assert_same_weights(loaded.model, original)
    assert list(build_model(loaded.source).state_dict()) == list(original.state_dict())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation_is_restored(attention: str, vit_folder: Path) -> None:
    loaded = load_classifier(str(vit_folder))
    assert loaded.source.arguments["attn_implementation"] == "sdpa"
    source = ModelSource(
        "transformers", loaded.source.name, {**loaded.source.arguments, "attn_implementation": attention}
    )
    rebuilt: Any = build_model(source)
    assert rebuilt.config._attn_implementation == attention


def test_half_precision_folders_are_loaded_in_float32(tmp_path: Path) -> None:
    hf_model(*HF[0][::2]).half().save_pretrained(tmp_path)
    write_processor(tmp_path, "ViT")
    loaded = load_classifier(str(tmp_path))
    assert {tensor.dtype for tensor in [*loaded.model.parameters(), *build_model(loaded.source).parameters()]} == {
        torch.float32
    }


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("ViT", {"size": {"height": 32, "width": 32}, "resample": 2, "image_std": [0.5, 0.5, 0.5]}),
        ("ViT", {"size": 32, "resample": 3, "image_std": [0.2, 0.3, 0.4]}),
        ("DeiT", {"size": 36, "crop_size": 32, "do_center_crop": True, "resample": 3}),
        ("ConvNext", {"size": 32, "crop_pct": 0.875, "resample": 3}),
        ("ConvNext", {"size": {"shortest_edge": 32}, "crop_pct": 0.9, "resample": 3}),
        ("ConvNext", {"size": 384, "crop_pct": 0.95, "resample": 3}),
        ("Bit", {"size": {"shortest_edge": 40}, "crop_size": 32, "do_center_crop": True, "resample": 3}),
    ],
)
@pytest.mark.parametrize("shape", [(90, 60), (61, 94)])
def test_preprocessing_is_the_image_processors(
    kind: str, values: dict[str, Any], shape: tuple[int, int], tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor

    hf_model("ConvNext", HF[4][2]).save_pretrained(tmp_path)  # takes any size
    write_processor(tmp_path, kind, **values)
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8))
    ours = evaluation_transform(load_classifier(str(tmp_path)).preprocessing)(image)
    processor: Any = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    theirs = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    assert ours.shape == theirs.shape
    # Where the margin is odd, the two centre crops may lie one pixel apart.
    height, width = ours.shape[1:]
    shifts = [(0, 0), (0, 1), (1, 0), (1, 1)] if kind in ("ConvNext", "Bit") else [(0, 0)]
    assert any(
        torch.allclose(ours[:, : height - y, : width - x], theirs[:, y:, x:], atol=1e-5)
        or torch.allclose(ours[:, y:, x:], theirs[:, : height - y, : width - x], atol=1e-5)
        for y, x in shifts
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"do_resize": False}, "must resize"),
        ({"rescale_factor": 1.0}, "got rescale_factor 1.0"),
        ({"image_processor_type": "EfficientNetImageProcessor"}, "got EfficientNetImageProcessor"),
        (
            {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": False},
            "one size",
        ),
        ({"size": 32, "crop_size": {"height": 40, "width": 40}, "do_center_crop": True}, "from (32, 32)"),
    ],
)
def test_preprocessing_that_cannot_be_followed(values: dict[str, Any], text: str, vit_folder: Path) -> None:
    write_processor(vit_folder, "ViT", **values)
    with pytest.raises(InputError, match=re.escape(text)):
        load_classifier(str(vit_folder))


def test_hf_folder_without_preprocessor_needs_all_five_flags(vit_folder: Path) -> None:
    (vit_folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="give --img_size, --crop_pct, --interpolation, --mean, --std too"):
        load_classifier(str(vit_folder))
    with pytest.raises(InputError, match="give --std too"):
        load_classifier(str(vit_folder), **{**OVERRIDES, "std": None})
    preprocessing = load_classifier(str(vit_folder), **OVERRIDES).preprocessing
    assert (preprocessing.img_size, preprocessing.crop_mode) == ((32, 32), "center")


def test_hf_overrides_and_sizes_that_the_positions_do_not_fit(vit_folder: Path, tmp_path: Path) -> None:
    assert load_classifier(str(vit_folder), crop_pct=0.5).preprocessing.crop_pct == 0.5
    with pytest.raises(InputError, match="does not take images of 3 x 48 x 48"):
        load_classifier(str(vit_folder), img_size=48)
    other = tmp_path / "convnext"
    hf_model("ConvNext", HF[4][2]).save_pretrained(other)
    write_processor(other, "ConvNext")
    assert load_classifier(str(other), img_size=64).preprocessing.img_size == (64, 64)


@pytest.mark.parametrize(("kind", "processor", "values", "family"), HF)
def test_hf_folder_without_head(
    kind: str,
    processor: str,
    values: dict[str, Any],
    family: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hf_model(kind, values, suffix="Model").save_pretrained(tmp_path)
    write_processor(tmp_path, processor)
    with caplog.at_level(logging.WARNING, logger="vbp"):
        encoder = load_classifier(str(tmp_path))
    assert (encoder.family, encoder.num_classes) == (family, 0)
    assert "random" not in caplog.text


def test_hf_head_of_another_size(vit_folder: Path) -> None:
    config = json.loads((vit_folder / "config.json").read_text())
    labels = {str(index): f"class {index}" for index in range(3)}
    (vit_folder / "config.json").write_text(json.dumps({**config, "id2label": labels, "label2id": {}}))
    with pytest.raises(InputError, match=r"2 of another shape \(classifier.bias: file \[5\], model \[3\]"):
        load_classifier(str(vit_folder))
    assert load_classifier(str(vit_folder), allow_random_init=True).num_classes == 3


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("change", ["missing", "unexpected", "truncated"])
def test_hf_weights_that_do_not_fit(change: str, random: bool, vit_folder: Path) -> None:
    file = vit_folder / "model.safetensors"
    weights = load_file(file)
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        if change == "missing":
            del weights[next(name for name in weights if name.startswith("vit.") and "layernorm" in name)]
        else:
            weights["adapter.weight"] = torch.zeros(2)
        save_file(weights, file, metadata={"format": "pt"})
    text = {
        "missing": r"1 missing \(vit\.",
        "unexpected": r"1 too much \(adapter.weight\)",
        "truncated": "cannot load",
    }
    with pytest.raises(InputError, match=text[change]):
        load_classifier(str(vit_folder), allow_random_init=random)


def test_hf_folder_without_weights(vit_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (vit_folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no weights, one of model\.safetensors"):
        load_classifier(str(vit_folder))
    with caplog.at_level(logging.WARNING, logger="vbp"):
        assert load_classifier(str(vit_folder), allow_random_init=True).num_classes == 5
    assert "the folder holds none" in caplog.text


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (None, "must hold config.json"),
        ("{broken", "no readable JSON"),
        ('{"architecture": "test_vit", "pretrained_cfg": {}}', "--model_name test_vit --checkpoint"),
        ('{"model_type": "nonsense"}', "cannot load an image classifier from the folder"),
        ('{"model_type": "bert"}', "preprocessing"),
    ],
)
def test_folders_that_are_no_classifier(config: str | None, text: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=re.escape(text)):
        load_classifier(str(tmp_path))


def test_folder_of_another_task_is_refused(vit_folder: Path) -> None:
    (vit_folder / "config.json").write_text('{"model_type": "bert", "hidden_size": 32}')
    with pytest.raises(InputError, match="cannot load an image classifier"):
        load_classifier(str(vit_folder), **OVERRIDES)


def test_hf_family_and_file_are_checked_first(vit_folder: Path) -> None:
    (vit_folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(InputError, match="model_type must be auto or 'vit'"):
        load_classifier(str(vit_folder), model_type="swin")
    with pytest.raises(InputError, match="the folder carries its own weights"):
        load_classifier(str(vit_folder), checkpoint=vit_folder / "model.safetensors")


# --- sources --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"library": "timm", "name": "test_vit"}, "must hold library, name and arguments"),
        ({"library": "keras", "name": "test_vit", "arguments": {}}, "must be one of timm, transformers, got 'keras'"),
        ({"library": "timm", "name": 3, "arguments": {}}, "must hold a name"),
    ],
)
def test_bad_sources(values: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        ModelSource.from_dict(values)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (ModelSource("timm", "nope_vit", {}), "got 'nope_vit'"),
        (ModelSource("timm", "test_vit", {"nope": 1}), "timm cannot build test_vit"),
        (ModelSource("transformers", "ViTForImageClassification", {"model_type": "nope"}), "cannot read the config"),
    ],
)
def test_sources_that_cannot_be_built(source: ModelSource, text: str) -> None:
    with pytest.raises(InputError, match=text):
        build_model(source)
