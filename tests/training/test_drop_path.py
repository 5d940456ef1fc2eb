"""Stochastic depth and learning rates by layer, on models of timm and Hugging Face."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from families import FAMILIES
from pruned_models import pruned_in_place
from timm.layers import DropPath
from torch import nn

from vbp import InputError, Trainer, TrainerSettings
from vbp.training.drop_path import set_drop_path_
from vbp.training.optim import layer_groups

CPU = torch.device("cpu")


def rates(model: nn.Module) -> list[float]:
    """Return the rates at which branches are left out, in the order of the modules; 0 without such a module."""
    return [
        child.drop_prob if isinstance(child, DropPath) else 0.0
        for name, child in model.named_modules()
        if name.rpartition(".")[2].startswith("drop_path")
    ]


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_the_rates_are_those_of_timm_and_evaluation_stays_as_it_is(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    images = torch.randn(4, 3, 160, 160)
    before, keys = model(images), list(model.state_dict())
    set_drop_path_(model, 0.4)
    assert torch.equal(model(images), before)
    assert list(model.state_dict()) == keys
    assert not torch.equal(model.train()(images), before)
    if name == "test_vit":  # timm's ConvNeXt counts its stages
        assert rates(model) == pytest.approx(rates(timm.create_model(name, drop_path_rate=0.4)))
    set_drop_path_(model, 0.0)
    assert set(rates(model)) == {0.0}


def test_a_model_of_hugging_face_has_it_too() -> None:
    model = FAMILIES["hf-swin"].build()
    set_drop_path_(model, 0.2)
    assert max(rates(model)) == pytest.approx(0.2)


def test_a_model_without_a_place_for_it_is_refused() -> None:
    with pytest.raises(InputError, match="drop_path needs a model whose residual branches have a place for it, got"):
        set_drop_path_(FAMILIES["hf-vit"].build(), 0.1)
    with pytest.raises(InputError, match=r"drop_path must be in \[0, 1\), got 1.0"):
        set_drop_path_(timm.create_model("test_vit"), 1.0)


def test_each_layer_of_a_pruned_model_has_its_rate_and_all_the_same_weight_decay() -> None:
    model = timm.create_model("test_vit", num_classes=3).eval()
    pruned_in_place(model, torch.randn(1, 3, 160, 160))
    groups = layer_groups(model, 1e-3, 0.5, 0.05)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rate_of = {names[parameter]: group["lr"] for group in groups for parameter in group["params"]}
    assert rate_of.keys() == dict(model.named_parameters()).keys()
    last = len(model.blocks) - 1
    assert rate_of["head.weight"] == 1e-3
    assert rate_of[f"blocks.{last}.mlp.fc1.weight"] == pytest.approx(rate_of[f"blocks.{last - 1}.mlp.fc1.weight"] * 2)
    assert rate_of["patch_embed.proj.weight"] == min(rate_of.values())
    assert {group["weight_decay"] for group in groups} == {0.05}


def test_a_trainer_lowers_each_rate_to_zero_and_reports_the_largest() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    plain = Trainer(copy.deepcopy(model), TrainerSettings(steps=4, learning_rate=1e-3), device=CPU)
    assert len(plain.optimizer.param_groups) == 1
    trainer = Trainer(model, TrainerSettings(steps=4, learning_rate=1e-3, layer_decay=0.5), device=CPU)
    peaks = [group["lr"] for group in trainer.optimizer.param_groups]
    assert max(peaks) == 1e-3
    assert min(peaks) < 3e-4
    for _ in range(4):
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.0] * len(peaks), abs=1e-12)
    copied = Trainer(copy.deepcopy(model), trainer.settings, device=CPU)
    copied.load_state_dict(trainer.state_dict(), trainer.process_state())
    assert copied.steps_done == trainer.steps_done


def test_a_model_that_does_not_say_what_its_layers_are_is_refused() -> None:
    with pytest.raises(InputError, match="layer_decay needs a model of timm, which says what its layers are, got"):
        layer_groups(FAMILIES["hf-vit"].build(), 1e-3, 0.5, 0.05)
    with pytest.raises(InputError, match=r"layer_decay must be in \(0, 1\], got 0.0"):
        layer_groups(timm.create_model("test_vit"), 1e-3, 0.0, 0.05)
