"""Convolutional networks through the core: larger kernels on request, exact but for zero-padded borders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from families import randomise_
from oracles import clamped_logits
from torch import nn

from vbp import (
    InputError,
    collect_statistics,
    count_macs,
    find_sites,
    load_pruned,
    make_plan,
    plan_cost,
    prune_,
    save_pruned,
    variance_scores,
)
from vbp.sites.site import Reader


def resnet(padding_mode: str = "zeros") -> nn.Module:
    """Return a ResNet of bottleneck blocks, one a stage, with running statistics of a trained one's size."""
    torch.manual_seed(0)
    model = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=16, num_classes=5
    )
    randomise_(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(50, 150)
        if isinstance(module, nn.Conv2d):
            module.padding_mode = padding_mode
            module._reversed_padding_repeated_twice = [side for side in reversed(module.padding) for _ in range(2)]
    return model.double().eval()


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_larger_kernels_are_looked_at_on_request_alone() -> None:
    model = resnet()
    with pytest.raises(InputError, match=r"no prunable site in ResNet.*convolutions=True"):
        find_sites(model, IMAGES)
    sites = find_sites(model, IMAGES, convolutions=True)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    with pytest.raises(InputError, match=r"looked for a Linear or Conv2d layer, of a kernel of any size") as refused:
        find_sites(plain, IMAGES, convolutions=True)
    assert "--convolutions" not in str(refused.value)  # it would not help
    # The stem, which a block and its shortcut read, and two sites a block: between the 1x1 and the 3x3 kernel, and
    # between the 3x3 and the second 1x1.
    assert len(sites) == 9
    assert sites[0].readers == (
        Reader("conv1", "layer1.0.downsample.0", 0),
        Reader("conv1#read:layer1.0.conv1", "layer1.0.conv1", 0),
    )
    assert [site.exact for site in sites] == [True, *[False, True] * 4]
    assert all(len(site.inner) == 1 for site in sites)


def test_the_oracle_where_padding_wraps_around() -> None:
    model = resnet("circular")
    sites = find_sites(model, IMAGES[:1], convolutions=True)
    assert all(site.exact for site in sites)
    statistics = collect_statistics(model, sites, [IMAGES])
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.6)
    expected = clamped_logits(model, plan, statistics.means, IMAGES)
    cost = plan_cost(model, plan, IMAGES[:1])
    prune_(model, plan, statistics.means)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-10, atol=1e-10)
    assert count_macs(model, IMAGES[:1]) == cost.macs[1] < cost.macs[0]
    model.train()(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_zero_padding_is_exact_inside_and_inexact_at_the_border() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).double()
    sites = find_sites(model, IMAGES, convolutions=True)
    statistics = collect_statistics(model, sites, [IMAGES])
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.5)
    expected = clamped_logits(model, plan, statistics.means, IMAGES)
    prune_(model, plan, statistics.means)
    difference = (model(IMAGES) - expected).abs()
    assert difference[..., 1:-1, 1:-1].max() < 1e-10
    assert difference.max() > 1e-3


def test_a_pruned_resnet_comes_back_from_a_file(tmp_path: Path) -> None:
    model = resnet()
    sites = find_sites(model, IMAGES[:1], convolutions=True)
    statistics = collect_statistics(model, sites, [IMAGES])
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.6)
    prune_(model, plan, statistics.means)
    save_pruned(model, tmp_path / "m.pth", plans=plan)
    assert torch.equal(load_pruned(tmp_path / "m.pth", model=resnet())(IMAGES), model(IMAGES))
