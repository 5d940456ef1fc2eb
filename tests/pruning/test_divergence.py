"""Divergence of pruned models and the sites' shares of it, against plain formulas and finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, randomise_
from torch import Tensor, nn

from vbp import InputError, PruningPlan, collect_statistics, find_sites, make_plan, prune_, variance_scores
from vbp.pruning.divergence import DenseReference, cost_multipliers, held_out_places, mean_multipliers
from vbp.runtime.forward import logits_of


def pruned_model(name: str, keep_ratio: float = 0.5) -> tuple[nn.Module, nn.Module, PruningPlan, Tensor]:
    """Return a dense model, the same pruned with mean shift, the plan, and images."""
    family = FAMILIES[name]
    model, images = randomise_(family.build()).double().eval(), family.example(4)
    sites = find_sites(model, images[:1])
    statistics = collect_statistics(model, sites, [images])
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=keep_ratio)
    pruned = copy.deepcopy(model)
    prune_(pruned, plan, statistics.means)
    return model, pruned, plan, images


def divergence_of(dense: Tensor, pruned: Tensor) -> float:
    """Return the mean KL by its definition."""
    p = dense.softmax(-1)
    return float((p * (p.log() - pruned.softmax(-1).log())).sum(-1).mean())


@pytest.mark.parametrize("name", ["timm-vit", "hf-swin", "timm-convnext-conv", "timm-convnext-linear"])
def test_shares_are_half_the_slopes_of_the_divergence(name: str) -> None:
    model, pruned, plan, images = pruned_model(name)
    reference = DenseReference(model, [images[:3], images[3:]])
    with torch.no_grad():
        dense, cut = logits_of(model(images)), logits_of(pruned(images))
    assert reference.divergence(pruned) == pytest.approx(divergence_of(dense, cut), rel=1e-4)
    shares = reference.site_contributions(pruned, plan)
    assert list(shares) == [entry.site.name for entry in plan.sites]
    entry = plan.sites[0]

    def with_amplitude(amplitude: float) -> float:
        # What the errors do is linear in the consumer's weight, once it reads all channels again.
        changed = copy.deepcopy(model)
        for one in plan.sites:
            layer, small = changed.get_submodule(one.site.consumer), pruned.get_submodule(one.site.consumer)
            share = amplitude if one is entry else 1.0
            full = torch.zeros_like(layer.weight)
            full[:, list(one.keep)] = small.weight
            with torch.no_grad():
                layer.weight += share * (full - layer.weight)
                layer.bias += share * (small.bias - layer.bias)
        with torch.no_grad():
            return divergence_of(dense, logits_of(changed(images)))

    step = 1e-3
    slope = (with_amplitude(1 + step) - with_amplitude(1 - step)) / (2 * step)
    assert with_amplitude(1.0) == pytest.approx(divergence_of(dense, cut), rel=1e-6)
    assert shares[entry.site.name] == pytest.approx(slope / 2, rel=1e-3, abs=1e-5)


def test_models_are_left_as_they_were() -> None:
    model, pruned, plan, images = pruned_model("timm-vit")
    model.train()
    pruned.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference = DenseReference(model, [images])
    reference.site_contributions(pruned, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in pruned.parameters())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert reference.divergence(model) == pytest.approx(0, abs=1e-12)


def test_prices_compare_with_the_median_site() -> None:
    found = cost_multipliers(
        {"a": 1.0, "b": 2.0, "c": 1.0, "none": 0.0}, {"a": 1.0, "b": 4.0, "c": 100.0, "none": 3.0}
    )
    assert found == {"a": 0.5, "b": 1.0, "c": 4.0, "none": 1.0}
    assert cost_multipliers({"a": 1.0, "b": 1.0}, {"a": -1.0, "b": 0.0}) == {"a": 1.0, "b": 1.0}


def test_rounds_are_averaged_by_their_logarithms() -> None:
    # Three quarters of the way to the first; then the mean, in which the start counts for less and less.
    assert mean_multipliers([{"a": 16.0, "b": 1.0}]) == pytest.approx({"a": 8.0, "b": 1.0})
    assert mean_multipliers([{"a": 4.0, "b": 2.0}, {"a": 0.25, "b": 64.0}]) == pytest.approx({"a": 1.0, "b": 8.0})
    many = mean_multipliers([{"a": 3.0}] * 1000)
    assert many["a"] == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize(
    ("images", "judging"), [(3, 0), (4, 1), (100, 25), (256, 64), (400, 64), (1000, 125), (2048, 256), (50_000, 256)]
)
def test_few_images_judge_and_most_are_fitted_to(images: int, judging: int) -> None:
    assert held_out_places(images) == range(judging)


def test_no_image_is_an_error() -> None:
    model, _, _, _ = pruned_model("timm-vit")
    with pytest.raises(InputError, match="at least one image"):
        DenseReference(model, [])
