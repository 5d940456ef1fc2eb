"""The oracle: a pruned model equals the dense one whose removed channels are clamped to their means."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, Family, randomise_
from oracles import clamped_logits
from torch import Tensor, nn

from vbp import (
    InputError,
    PruningPlan,
    Statistics,
    collect_statistics,
    count_parameters,
    find_sites,
    make_plan,
    mean_shift,
    prune_,
    variance_scores,
)
from vbp.pruning.surgery import check_prunable
from vbp.runtime.forward import logits_of


def prepared(family: Family) -> tuple[nn.Module, Tensor, Statistics, PruningPlan]:
    """Return a float64 model with noticeable weights, images, statistics and a global plan at 0.6."""
    model = randomise_(family.build()).double().eval()
    images = family.example(4)
    sites = find_sites(model, images[:1])
    statistics = collect_statistics(model, sites, [images])
    return model, images, statistics, make_plan(sites, variance_scores(statistics), keep_ratio=0.6)


def test_pruning_equals_clamping_to_the_means(family: Family) -> None:
    model, images, statistics, plan = prepared(family)
    expected = clamped_logits(model, plan, statistics.means, images)
    before = count_parameters(model)
    prune_(model, plan, statistics.means)
    with torch.no_grad():
        logits = logits_of(model(images))
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert count_parameters(model) < before
    for entry in plan.sites:
        assert model.get_submodule(entry.site.producers[0]).weight.shape[0] == len(entry.keep)
        assert model.get_submodule(entry.site.consumer).weight.shape[1] == len(entry.keep)


def test_pruning_without_means_equals_clamping_to_zero(family: Family) -> None:
    model, images, statistics, plan = prepared(family)
    zeros = {name: torch.zeros_like(mean) for name, mean in statistics.means.items()}
    expected = clamped_logits(model, plan, zeros, images)
    compensated = clamped_logits(model, plan, statistics.means, images)
    prune_(model, plan)
    with torch.no_grad():
        logits = logits_of(model(images))
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(logits, compensated, rtol=1e-3)


def test_keep_ratio_one_changes_nothing(family: Family) -> None:
    model = family.build().eval()
    images = family.example(2, torch.float32)
    with torch.no_grad():
        before = logits_of(model(images))
    sites = find_sites(model, images[:1])
    statistics = collect_statistics(model, sites, [images])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    prune_(model, make_plan(sites, variance_scores(statistics), keep_ratio=1.0), statistics.means)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(logits_of(model(images)), before)


def test_a_pruned_model_still_trains(family: Family) -> None:
    model, images, statistics, plan = prepared(family)
    prune_(model, plan, statistics.means)
    logits_of(model.train()(images)).square().sum().backward()
    for entry in plan.sites:
        for name in (*entry.site.producers, entry.site.consumer):
            layer = model.get_submodule(name)
            for parameter in (layer.weight, layer.bias):
                assert parameter.is_contiguous()
                assert parameter.grad is not None
                assert parameter.grad.shape == parameter.shape


@pytest.mark.parametrize("bias", [True, False])
def test_a_consumer_without_bias_gains_one(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2, bias=bias)).double()
    images = torch.randn(30, 3, dtype=torch.float64)
    sites = find_sites(model, images)
    statistics = collect_statistics(model, sites, [images])
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.5)
    expected = clamped_logits(model, plan, statistics.means, images)
    prune_(model, plan, statistics.means)
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(model[2].bias, nn.Parameter)
    assert "2.bias" in model.state_dict()


def test_the_shift_of_a_convolution_sums_its_kernel() -> None:
    weight, mean = torch.randn(5, 6, 3, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    removed = torch.tensor([1, 4])
    by_hand = torch.zeros(5, dtype=torch.float64)
    for out in range(5):
        for channel in (1, 4):
            by_hand[out] += weight[out, channel].sum() * mean[channel]
    torch.testing.assert_close(mean_shift(weight, mean, removed), by_hand, rtol=1e-12, atol=1e-12)


def test_a_plan_that_does_not_fit_leaves_the_model_untouched() -> None:
    model, _, statistics, plan = prepared(FAMILIES["timm-vit"])
    pruned = copy.deepcopy(model)
    prune_(pruned, plan, statistics.means)
    state = {name: value.clone() for name, value in pruned.state_dict().items()}
    with pytest.raises(InputError, match="must have 128 channels, got widths"):
        prune_(pruned, plan, statistics.means)
    assert all(torch.equal(state[name], value) for name, value in pruned.state_dict().items())
    with pytest.raises(InputError, match=r"site blocks\.0\.mlp\.fc1 does not exist in Linear"):
        prune_(nn.Linear(2, 2), plan)
    last = plan.sites[-1].site.name
    means = {name: mean for name, mean in statistics.means.items() if name != last}
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=f"means of site {last} must be 128 numbers, got none"):
        prune_(model, plan, means)
    assert all(torch.equal(dense[name], value) for name, value in model.state_dict().items())


def test_frozen_layers_stay_frozen() -> None:
    model, _, statistics, plan = prepared(FAMILIES["timm-vit"])
    model.requires_grad_(False)
    prune_(model, plan, statistics.means)
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Scales(nn.Module):
    """An MLP whose code uses a number of hidden channels, or means the first ones."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.kind = nn.Linear(8, 12), nn.Linear(12, 8), kind

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if self.kind == "in place":
            hidden[..., :3].mul_(9)
        output: Tensor = self.fc2(hidden.relu())
        return output / {"layer": self.fc1.out_features, "shape": hidden.shape[-1]}.get(self.kind, 1)


@pytest.mark.parametrize("kind", ["layer", "shape", "in place"])
def test_code_that_uses_the_number_of_channels_is_found_out(kind: str) -> None:
    """Kin to reports of pruned models that run, and return something else: a constant follows from a width."""
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Linear(8, 8), Scales(kind), nn.Linear(8, 5)).eval(), torch.randn(4, 8)
    plain = nn.Sequential(nn.Linear(8, 8), Scales(""), nn.Linear(8, 5)).eval()
    sites = find_sites(plain, images)
    check_prunable(plain, sites, images)
    with pytest.raises(InputError, match="fewer channels in 1: its code needs that width: the output is off by"):
        check_prunable(model, sites, images)
    with pytest.raises(InputError, match=r"no prunable site in Sequential.*1\.fc1 is no site: its code needs"):
        find_sites(model, images)
