"""A native checkpoint loads without vbp and gives bit-equal logits, or the error says why it cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruned_models import logits, pruned_in_place
from torch import nn

from vbp import InputError, ModelSource, OutputError, Preprocessing, build_model, load_classifier, save_native
from vbp.deploy.native import Block, mlp_ratio

NAMES = tuple("abcdefg")
PREPROCESSING = Preprocessing((32, 32), 0.8, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]}
BY_STAGE = {"mlp_ratio": [42 / 16, 83 / 32]}
HF_VIT = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
HF_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
HF_DINO = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Case:
    """A small model, what is kept of it, and what its configuration then says."""

    library: str
    name: str
    arguments: Mapping[str, Any]
    keep_ratio: float
    says: Mapping[str, Any]
    size: int = 32

    def pruned(self) -> tuple[nn.Module, ModelSource, dict[str, Any], torch.Tensor]:
        """Return the model, its source, its plan and images."""
        arguments: dict[str, Any] = {**self.arguments, "num_classes": 7}
        name = self.name
        if self.library == "transformers":
            import transformers

            name = f"{self.name}ForImageClassification"
            config = getattr(transformers, f"{self.name}Config")(num_labels=7, **self.arguments)
            arguments = {**config.to_dict(), "architectures": [name]}
        source = ModelSource("timm" if self.library == "timm" else "transformers", name, arguments)
        model, images = build_model(source), torch.randn(2, 3, self.size, self.size)
        plan = pruned_in_place(model, images, self.keep_ratio, scope="per_layer")
        return model, source, {"plans": plan}, images


CASES = {
    "timm-vit": Case("timm", "vit_tiny_patch16_224", VIT, 0.5, {"mlp_ratio": 2.0}),
    "timm-deit": Case("timm", "deit_tiny_distilled_patch16_224", VIT, 0.65, {"mlp_ratio": 83 / 32}),
    "timm-swin": Case("timm", "swin_tiny_patch4_window7_224", SWIN, 0.5, {"mlp_ratio": 2.0}, 64),
    "timm-swin-by-stage": Case("timm", "swin_tiny_patch4_window7_224", SWIN, 0.65, BY_STAGE, 64),
    "timm-swinv2": Case("timm", "swinv2_tiny_window8_256", SWIN, 0.5, {"mlp_ratio": 2.0}, 64),
    "timm-gated": Case("timm", "eva02_tiny_patch14_224", VIT, 0.65, {"mlp_ratio": 55 / 32}),
    "timm-gated-rows": Case("timm", "vit_giant_patch14_dinov2", VIT, 0.65, {"mlp_ratio": 110 / 32}),
    "hf-vit": Case("transformers", "ViT", HF_VIT, 0.5, {"intermediate_size": 32}),
    "hf-deit": Case("transformers", "DeiT", HF_VIT, 0.75, {"intermediate_size": 48}),
    "hf-swin": Case("transformers", "Swin", HF_SWIN, 0.5, {"mlp_ratio": 2.0}),
    "hf-dinov2": Case("transformers", "Dinov2", HF_DINO, 0.5, {"mlp_ratio": 2}),
}  # fmt: skip

LOADING = """
import json, pathlib, sys
sys.modules["vbp"] = None
import timm, torch
from transformers import AutoModelForImageClassification
for folder in map(pathlib.Path, sys.argv[1:]):
    images, expected = torch.load(folder.with_suffix(".pt"))
    config = json.loads((folder / "config.json").read_text())
    with torch.no_grad():
        if "architecture" not in config:
            model = AutoModelForImageClassification.from_pretrained(folder).eval()
            assert torch.equal(model(images).logits, expected), folder
            assert model.config.id2label[6] == "g"
            continue
        by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        by_arguments = timm.create_model(
            config["architecture"], checkpoint_path=folder / "model.safetensors",
            num_classes=config["num_classes"], **config["model_args"],
        ).eval()
        assert torch.equal(by_folder(images), expected) and torch.equal(by_arguments(images), expected), folder
        assert by_folder.pretrained_cfg["label_names"][6] == "g"
"""


def test_they_load_in_a_process_without_vbp(tmp_path: Path) -> None:
    for name, case in CASES.items():
        model, source, plans, images = case.pruned()
        said = save_native(
            model, tmp_path / name, source=source, preprocessing=PREPROCESSING, class_names=NAMES, **plans
        )
        assert said == case.says, name
        assert type(said.get("mlp_ratio")) is type(case.says.get("mlp_ratio")), name
        torch.save((images, logits(model, images)), tmp_path / f"{name}.pt")
    folders = [str(tmp_path / name) for name in CASES]
    subprocess.run([sys.executable, "-c", LOADING, *folders], check=True, timeout=180)


def test_their_preprocessing_and_class_names_are_read_back(tmp_path: Path) -> None:
    model, source, plans, _ = CASES["hf-vit"].pruned()
    squash = Preprocessing((32, 32), 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3, "squash")
    for name, preprocessing in (("crop", PREPROCESSING), ("squash", squash)):
        save_native(model, tmp_path / name, source=source, preprocessing=preprocessing, class_names=NAMES, **plans)
        classifier = load_classifier(str(tmp_path / name))
        assert (classifier.preprocessing, classifier.class_names) == (preprocessing, NAMES)
    model, source, plans, _ = CASES["timm-vit"].pruned()
    save_native(model, tmp_path / "timm", source=source, preprocessing=PREPROCESSING, **plans)
    config = timm.data.resolve_data_config(model=timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True))
    assert config["input_size"] == (3, 32, 32)
    assert (tuple(config["mean"]), tuple(config["std"])) == (PREPROCESSING.mean, PREPROCESSING.std)
    assert (config["crop_pct"], config["crop_mode"], config["interpolation"]) == (0.8, "center", "bicubic")


def test_what_the_configuration_cannot_say_is_refused(tmp_path: Path) -> None:
    def refused(case: Case, message: str, **options: Any) -> None:
        _, source, _, images = case.pruned()
        dense = build_model(source)
        plan = pruned_in_place(dense, images, **{"keep_ratio": 0.5, **options})
        with pytest.raises(InputError, match=message):
            save_native(dense, tmp_path / "native", plans=plan, source=source)
        assert not list(tmp_path.iterdir())

    torch.manual_seed(0)
    refused(
        CASES["hf-vit"],
        r"41 channels on 32, 42 .* --equal_widths.* with --keep_ratio 0\.65625",
        keep_ratio=0.65,
        scope="per_layer",
    )
    refused(CASES["timm-vit"], "can say that attention was pruned", attention=True)
    convnext = Case("timm", "convnext_tiny", {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}, 0.5, {}, 64)
    refused(convnext, "unexpected keyword argument 'mlp_ratio'", scope="per_layer")
    refused(convnext, "no number in it gives them", scope="global", keep_ratio=0.6)
    small = {"image_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4}
    hf_convnext = Case("transformers", "ConvNext", small, 0.5, {}, 64)
    refused(hf_convnext, "no number in it gives them", scope="per_layer")
    refused(CASES["hf-dinov2"], "expected int, got float", keep_ratio=0.65, scope="per_layer")


def test_the_keep_ratio_that_is_proposed_gives_equal_widths(tmp_path: Path) -> None:
    _, source, _, images = CASES["timm-vit"].pruned()
    for keep_ratio in (0.3, 0.61, 0.777):
        dense = build_model(source)
        plan = pruned_in_place(dense, images, keep_ratio, scope="global")
        with pytest.raises(InputError, match="--keep_ratio") as caught:
            save_native(dense, tmp_path / "native", plans=plan, source=source)
        proposed = float(str(caught.value).split("--keep_ratio ")[1].split(",")[0])
        again = build_model(source)
        plan = pruned_in_place(again, images, proposed, scope="per_layer")
        assert abs(proposed - keep_ratio) < 1 / 128
        assert save_native(again, tmp_path / str(keep_ratio), plans=plan, source=source)


def test_equal_widths_can_be_said_at_any_keep_ratio(tmp_path: Path) -> None:
    _, source, _, images = CASES["hf-vit"].pruned()
    for scope, widths in (("per_layer", {41, 42}), ("equal", {42})):
        dense = build_model(source)
        plan = pruned_in_place(dense, images, 0.65, scope=scope)
        assert {kept for kept, _ in plan.widths.values()} == widths
    assert (plan.kept, plan.requested) == (84, 83)
    assert save_native(dense, tmp_path / "native", plans=plan, source=source) == {"intermediate_size": 42}


def test_a_folder_in_use_and_a_failed_write_leave_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source, plans, _ = CASES["timm-vit"].pruned()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="new or empty folder"):
        save_native(model, tmp_path / "used", source=source, **plans)
    monkeypatch.setattr(json, "dumps", _full_disk)
    with pytest.raises(OutputError, match="No space left"):
        save_native(model, tmp_path / "new", source=source, **plans)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["used"]
    with pytest.raises(InputError, match=r"timm builds models in float32, got torch\.float64"):
        save_native(model.double(), tmp_path / "new", source=source, **plans)


def _full_disk(*_: object, **__: object) -> str:
    raise OSError(28, "No space left on device")


@given(
    st.lists(st.sampled_from([3, 24, 96, 192, 384, 768, 1408]), min_size=1, max_size=4),
    st.integers(1, 5000),
    st.integers(1, 999),
)
def test_the_ratio_gives_each_width_exactly(inputs: list[int], numerator: int, denominator: int) -> None:
    exact = Fraction(numerator, denominator)
    blocks = [Block(number, int(number * exact), 1) for number in inputs]
    ratio = mlp_ratio(blocks)
    assert ratio is not None  # the exact ratio is one
    assert [int(block.inputs * ratio) for block in blocks] == [block.width for block in blocks]


def test_there_is_no_ratio_for_unequal_widths() -> None:
    assert mlp_ratio([Block(32, 41, 64), Block(32, 42, 64)]) is None


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_others_may_read_what_the_umask_allows(name: str, tmp_path: Path) -> None:
    """Kin to reports of a model on a shared disk that nobody but its writer could load: weights had mode 0600."""
    model, source, plans, _ = CASES[name].pruned()
    mask = os.umask(0o027)
    try:
        save_native(model, tmp_path / "native", source=source, preprocessing=PREPROCESSING, **plans)
    finally:
        os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "native").iterdir()} == {0o640}
