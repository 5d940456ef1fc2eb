"""Layers cut in place: order, widths, gradients and what is frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vbp.sites.cutting import keep_channels_, keep_columns_, keep_rows_

KEPT = [1, 4, 6]


def image(channels: int) -> Tensor:
    """Return one random feature map."""
    return torch.randn(2, channels, 5, 5, dtype=torch.float64)


@pytest.mark.parametrize("layer", [nn.Linear(4, 8), nn.Conv2d(4, 8, 3), nn.Linear(4, 8, bias=False)])
def test_rows_are_those_of_the_whole_layer(layer: nn.Module) -> None:
    layer.double()
    values = image(4) if isinstance(layer, nn.Conv2d) else torch.randn(5, 4, dtype=torch.float64)
    expected = layer(values)[:, KEPT]
    keep_rows_(layer, KEPT)
    torch.testing.assert_close(layer(values), expected)
    assert f"={len(KEPT)}" in repr(layer) or f", {len(KEPT)}" in repr(layer)


def test_columns_gradients_and_frozen_weights() -> None:
    layer, values = nn.Linear(8, 3).double(), torch.randn(5, 8, dtype=torch.float64)
    layer(values).square().sum().backward()
    layer.bias.requires_grad_(False)
    assert layer.weight.grad is not None
    gradient = layer.weight.grad[:, KEPT]
    weight, bias = layer.weight[:, KEPT], layer.bias
    keep_columns_(layer, KEPT)
    assert layer.in_features == len(KEPT)
    torch.testing.assert_close(layer(values[:, KEPT]), values[:, KEPT] @ weight.T + bias)
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, gradient)
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False, affine=False)],
)
def test_channels_apart_are_those_of_the_whole_module(module: nn.Module) -> None:
    module.double().eval()
    for values in module.state_dict().values():
        if values.is_floating_point():
            values.uniform_(0.5, 1.5)
    values = image(8)
    expected = module(values)[:, KEPT]
    keep_channels_(module, KEPT)
    torch.testing.assert_close(module(values[:, KEPT]), expected)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.GroupNorm(1, 8)])
def test_norms_keep_the_order_of_their_weights(norm: nn.Module) -> None:
    assert isinstance(norm.weight, Tensor)
    assert isinstance(norm.bias, Tensor)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    weight, bias = norm.weight[KEPT], norm.bias[KEPT]
    keep_channels_(norm, KEPT)
    assert torch.equal(norm.weight, weight)
    assert torch.equal(norm.bias, bias)
    assert norm(torch.randn(2, len(KEPT))).shape == (2, len(KEPT))


def test_the_layout_in_memory_stays() -> None:
    layer = nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last)
    keep_rows_(layer, KEPT)
    keep_columns_(layer, [0, 2])
    assert layer.weight.shape == (3, 2, 3, 3)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
