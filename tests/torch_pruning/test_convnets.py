"""Convolutional networks: the pruned one equals the dense one with its removed channels clamped to their means."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch_pruning_models import CONVNETS, POINTWISE, assert_close, convnet, prepared

from vbp import InputError, mean_shift
from vbp.method.mean_shift import grouped_mean_shift
from vbp.torch_pruning.compensate import reestimate_batchnorm_
from vbp.torch_pruning.importance import VarianceImportance
from vbp.torch_pruning.pruner import VBPPruner


@pytest.mark.parametrize("name", CONVNETS)
def test_pruning_equals_clamping_to_the_means(name: str) -> None:
    model, images = convnet(name)
    with torch.no_grad():
        dense = model(images)
    pruner, _, clamped = prepared(model, images, global_pruning=False)
    pruner.step()
    with torch.no_grad():
        found = model(images)
    expected = clamped(images)
    assert_close(found, expected)
    assert (expected - dense).abs().max() > 1e-2 * dense.abs().max()
    layers = [layer for layer in clamped.model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    depthwise = [layer for layer in layers if getattr(layer, "groups", 1) == getattr(layer, "in_channels", 0)]
    # All but the first layer lose inputs; a depthwise one loses its channels with the group.
    assert len(clamped.removed) == len(layers) - len(depthwise) - 1


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_consumers_are_exact_under_zero_padding(name: str) -> None:
    model, images = convnet(name, wrap=False)
    pruner, _, clamped = prepared(model, images)
    pruner.step()
    with torch.no_grad():
        assert_close(model(images), clamped(images))


def test_zero_padding_is_exact_inside_and_inexact_at_the_border() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 3, padding=1)).double()
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    pruner, _, clamped = prepared(model, images)
    pruner.step()
    with torch.no_grad():
        found, expected = model(images), clamped(images)
    assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
    assert (found - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["resnet-basic", "mobilenetv2", "densenet"])
def test_the_shift_survives_batchnorm_in_training(name: str) -> None:
    model, images = convnet(name)
    pruner, _, clamped = prepared(model, images)
    pruner.step()
    model.train()
    clamped.model.train()
    with torch.no_grad():
        assert_close(model(images), clamped(images))
    # The running statistics that this pass left fit too: evaluation still agrees.
    model.eval()
    clamped.model.eval()
    with torch.no_grad():
        assert_close(model(images), clamped(images))


def test_the_shift_goes_into_the_running_mean_and_makes_no_parameter() -> None:
    model, images = convnet("resnet-basic")
    names = set(dict(model.named_parameters()))
    means = [norm.running_mean.clone() for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    pruner, _, _ = prepared(model, images, ignored_layers=all_but_first_of_block(model))
    pruner.step()
    assert set(dict(model.named_parameters())) == names
    after = [norm.running_mean for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    assert sum(a.shape == b.shape and not torch.equal(a, b) for a, b in zip(means, after, strict=True)) == 4


def all_but_first_of_block(model: nn.Module) -> list[nn.Module]:
    """Ignore everything but the first convolution of each residual block."""
    return [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and not (name.startswith("layer") and name.endswith(".conv1"))
    ]


def test_a_biased_convolution_before_batchnorm_keeps_the_shift_in_its_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)).double().eval()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    pruner, _, clamped = prepared(model, images)
    bias, running = model[2].bias.clone(), model[3].running_mean.clone()
    pruner.step()
    assert not torch.equal(model[2].bias, bias)
    assert torch.equal(model[3].running_mean, running)
    assert_close(model(images), clamped(images))


def test_an_output_that_is_not_the_norms_alone_gets_a_bias() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, bias=False)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            hidden = self.second(self.first(images).relu())
            normed: torch.Tensor = self.norm(hidden)
            return normed + hidden

    torch.manual_seed(0)
    model, images = Forked().double().eval(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    pruner, _, clamped = prepared(model, images, ignored_layers=[model.second])
    pruner.step()
    assert model.second.bias is not None
    assert_close(model(images), clamped(images))


def test_the_grouped_shift_sums_each_groups_kernel() -> None:
    torch.manual_seed(0)
    for groups, hidden, out in ((1, 6, 4), (2, 6, 4), (3, 6, 9), (6, 6, 6), (6, 6, 12)):
        weight = torch.randn(out, hidden // groups, 3, 2, dtype=torch.float64)
        mean, removed = torch.randn(hidden, dtype=torch.float64), torch.tensor([1, 4])
        gone = torch.zeros(hidden, dtype=torch.float64)
        gone[removed] = mean[removed]
        images = gone[None, :, None, None].expand(1, hidden, 5, 5)
        expected = nn.functional.conv2d(images, weight, groups=groups)[0, :, 1, 1]
        found = grouped_mean_shift(weight, mean, removed, groups)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        if groups == 1:
            torch.testing.assert_close(found, mean_shift(weight, mean, removed), rtol=1e-12, atol=1e-12)


def test_grouped_convolutions_lose_the_same_channels_of_each_group() -> None:
    model, images = convnet("resnext-grouped")
    pruner, _, _ = prepared(model, images, pruning_ratio=0.4)
    pruner.step()
    grouped = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    assert grouped
    for layer in grouped:
        assert layer.groups == 4
        assert layer.in_channels % 4 == layer.out_channels % 4 == 0
        assert layer.weight.shape[1] == layer.in_channels // 4


def test_reestimation_gives_the_moments_of_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout()).double().train()
    batches = [torch.randn(8, 3, 5, 5, dtype=torch.float64) * scale for scale in (1, 3)]
    weight = model[0].weight.clone()
    reestimate_batchnorm_(model, [(batch, None) for batch in batches])
    with torch.no_grad():
        outputs = [model[0](batch).movedim(1, 0).flatten(1) for batch in batches]
    assert_close(model[1].running_mean, torch.stack([output.mean(1) for output in outputs]).mean(0))
    assert_close(model[1].running_var, torch.stack([output.var(1) for output in outputs]).mean(0))
    assert model[1].momentum == 0.3
    assert all(module.training for module in model.modules())
    assert torch.equal(model[0].weight, weight)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="at least one image, got none"):
        reestimate_batchnorm_(model, [])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="Linear has no BatchNorm"):
        reestimate_batchnorm_(nn.Linear(2, 2), batches)


def test_reestimation_makes_a_pruned_network_consistent() -> None:
    model, images = convnet("resnet-basic")
    pruner, _, _ = prepared(model, images, pruning_ratio=0.5)
    pruner.step()
    reestimate_batchnorm_(model, [images])
    state = copy.deepcopy(model.state_dict())
    reestimate_batchnorm_(model, [images])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-9)


def test_a_pruned_network_trains() -> None:
    model, images = convnet("efficientnet")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("blocks.0" not in name)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    pruner, _, _ = prepared(model, images)
    pruner.step()
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    model.train()(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
        assert parameter.is_contiguous()


def test_a_frozen_model_is_traced_and_stays_frozen() -> None:
    model, images = convnet("mobilenetv2-torchvision")
    model.requires_grad_(False)
    importance = VarianceImportance()
    importance.collect_statistics(model, [images])
    VBPPruner(model, images[:1], importance, pruning_ratio=0.2, mean_dict=importance.means).step()
    assert not any(parameter.requires_grad for parameter in model.parameters())
