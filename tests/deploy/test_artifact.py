"""A saved model comes back with bit-equal logits, without network, or the error says why not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from families import FAMILIES, Family
from pruned_models import logits, pruned_in_place
from torch import nn

from vbp import InputError, ModelSource, load_classifier, load_pruned, read_artifact, save_pruned


def test_models_of_ones_own_come_back_through_a_fresh_one(family: Family, tmp_path: Path) -> None:
    model = family.build()
    fresh = family.build()
    images = family.example(2, torch.float32)
    plan = pruned_in_place(model, images)
    save_pruned(model, tmp_path / "m.pth", plans=plan)
    loaded = load_pruned(tmp_path / "m.pth", model=fresh)
    assert loaded is fresh
    assert torch.equal(logits(loaded, images), logits(model, images))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_timm_models_are_built_from_the_file_alone(name: str, tmp_path: Path) -> None:
    classifier = load_classifier(name, allow_random_init=True, model_kwargs={"num_classes": 5})
    images = torch.randn(2, 3, *classifier.preprocessing.img_size)
    plan = pruned_in_place(classifier.model, images)
    file = tmp_path / "m.pth"
    save_pruned(classifier.model, file, plans=plan, source=classifier.source, preprocessing=classifier.preprocessing)
    assert torch.equal(logits(load_pruned(file), images), logits(classifier.model, images))
    artifact = read_artifact(file)
    assert artifact.plans == (plan,)
    assert artifact.source == classifier.source
    assert artifact.preprocessing == classifier.preprocessing


def test_hugging_face_models_are_built_from_the_file_alone(tmp_path: Path) -> None:
    model = FAMILIES["hf-vit"].build()
    images = FAMILIES["hf-vit"].example(2, torch.float32)
    source = ModelSource("transformers", type(model).__name__, model.config.to_dict())
    plan = pruned_in_place(model, images)
    save_pruned(model, tmp_path / "m.pth", plans=plan, source=source)
    assert torch.equal(logits(load_pruned(tmp_path / "m.pth"), images), logits(model, images))


def test_the_file_holds_plain_types(vit: nn.Module, tmp_path: Path) -> None:
    plan = pruned_in_place(vit, FAMILIES["timm-vit"].example())
    save_pruned(vit, tmp_path / "m.pth", plans=plan, metrics={"top1": 1.5})
    content = torch.load(tmp_path / "m.pth", weights_only=True)
    assert type(content["state_dict"]) is dict
    assert content["metrics"] == {"top1": 1.5}
    assert all(value.is_contiguous() for value in content["state_dict"].values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    family = FAMILIES["timm-vit"]
    model = family.build().to(dtype)
    plan = pruned_in_place(model, family.example(2, dtype))
    save_pruned(model, tmp_path / "m.pth", plans=plan)
    loaded = load_pruned(tmp_path / "m.pth", model=family.build())
    assert {value.dtype for value in loaded.state_dict().values()} == {dtype}
    images = family.example(2, dtype)
    assert torch.equal(logits(loaded, images), logits(model, images))


def test_a_gained_bias_comes_back(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2, bias=False))

    model, images = build(), torch.randn(9, 3)
    save_pruned(model, tmp_path / "m.pth", plans=pruned_in_place(model, images))
    assert torch.equal(load_pruned(tmp_path / "m.pth", model=build())(images), model(images))


def test_a_model_pruned_twice_comes_back(tmp_path: Path) -> None:
    family = FAMILIES["timm-vit"]
    model, images = family.build(), family.example(2, torch.float32)
    plans = [pruned_in_place(model, images), pruned_in_place(model, images, 0.5)]
    save_pruned(model, tmp_path / "m.pth", plans=plans)
    loaded = load_pruned(tmp_path / "m.pth", model=family.build())
    assert torch.equal(logits(loaded, images), logits(model, images))


def test_errors_name_the_file_and_the_remedy(vit: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "m.pth"
    plan = pruned_in_place(vit, FAMILIES["timm-vit"].example())
    save_pruned(vit, file, plans=plan)
    with pytest.raises(InputError, match="pass it: load_pruned"):
        load_pruned(file)
    with pytest.raises(InputError, match="must be an existing file"):
        load_pruned(tmp_path / "absent.pth")
    with pytest.raises(InputError, match=r"does not exist in|must have 128 channels"):
        load_pruned(file, model=timm.create_model("test_convnext"))
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    with pytest.raises(InputError, match="do not fit VisionTransformer"):
        load_pruned(file, model=copy.deepcopy(other))
    whole = file.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"junk" * 100):
        file.write_bytes(damage)
        with pytest.raises(InputError, match=r"m\.pth is damaged or no file of a pruned model"):
            load_pruned(file)


def test_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    torch.save({"format": "vbp-pruned/99"}, tmp_path / "new.pth")
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "foreign.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("new", "foreign", "list"):
        with pytest.raises(InputError, match="must have format vbp-pruned/2, got"):
            load_pruned(tmp_path / f"{name}.pth")


def test_a_file_without_weights_is_refused(vit: nn.Module, tmp_path: Path) -> None:
    save_pruned(vit, tmp_path / "m.pth", plans=())
    content = torch.load(tmp_path / "m.pth", weights_only=True)
    torch.save({**content, "state_dict": {"head.weight": 3}}, tmp_path / "m.pth")
    with pytest.raises(InputError, match="must hold tensors by name"):
        read_artifact(tmp_path / "m.pth")
    del content["state_dict"]
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(InputError, match="lacks 'state_dict'"):
        read_artifact(tmp_path / "m.pth")


def test_a_failed_write_leaves_the_earlier_file_whole(
    vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.pth"
    plan = pruned_in_place(vit, FAMILIES["timm-vit"].example())
    save_pruned(vit, file, plans=plan)
    before = file.read_bytes()

    def full_disk(content: object, target: object) -> None:
        target.write(b"half a file")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="earlier files are whole"):
        save_pruned(vit, file, plans=plan)
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pth"]
