"""What a convolution reads at each offset of its kernel, against the convolution itself; sensitivities of kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from vbp import auto_plan, collect_statistics, find_sites, prune_
from vbp.method.sampling import RandomProbes
from vbp.pruning.divergence import DenseReference
from vbp.sites.layers import reads

IMAGES = torch.randn(6, 3, 13, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (1, 7), "padding": (0, 3)},
        {"kernel_size": 3, "dilation": 2, "padding": "same"},
        {"kernel_size": 2, "padding": 1},
        {"kernel_size": 5, "padding": 2, "padding_mode": "reflect"},
        {"kernel_size": 3},
    ],
)
def test_the_offsets_of_a_kernel_make_up_the_convolution(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, bias=False, **settings).double()
    check(layer)


@pytest.mark.parametrize("stride", [1, 2])
def test_padding_in_the_forward_pass_is_seen_too(stride: int) -> None:
    torch.manual_seed(0)
    check(Conv2dSame(3, 5, 3, stride=stride, bias=False).double())


def check(layer: nn.Conv2d) -> None:
    output = layer(IMAGES)
    kernels = layer.weight.flatten(2).unbind(2)
    parts = [
        torch.einsum("oc,nchw->nohw", kernel, read)
        for kernel, read in zip(kernels, reads(layer, IMAGES, output), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(0), output, rtol=1e-12, atol=1e-12)


def small_network() -> nn.Module:
    """Return conv -> norm -> activation -> conv with a kernel and stride, pooled into a classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).double().eval()  # fmt: skip


def test_sensitivities_of_a_kernel_are_those_of_its_weight_gradients() -> None:
    model, images = small_network(), IMAGES[:2]
    sites = find_sites(model, images[:1], convolutions=True)
    assert [(site.name, site.consumer) for site in sites] == [("0", "3"), ("3", "7")]
    found = collect_statistics(model, sites, [images], sensitivity=RandomProbes()).sensitivities["0"]
    one = found.recentred(torch.zeros(8, dtype=torch.float64))
    inputs, consumer = torch.zeros_like(one.inputs), model.get_submodule("3")
    for image in range(2):
        noise, left, _ = RandomProbes().of(image, 1, 4, 6, 8)
        model.zero_grad()
        (2 * model(images[image : image + 1]).softmax(-1).sqrt() * noise).sum().backward()
        for offset in consumer.weight.grad.flatten(2).unbind(2):
            gradient = torch.cat([offset, consumer.bias.grad[:, None]], 1)
            sketch = left[0, :6].double().T @ gradient
            inputs += sketch.T @ sketch / left.shape[2]
    torch.testing.assert_close(one.inputs, inputs, rtol=1e-8, atol=1e-10)


def test_auto_prunes_between_larger_kernels() -> None:
    model, images = small_network(), IMAGES
    sites = find_sites(model, images[:1], convolutions=True)
    statistics = collect_statistics(model, sites, [images], covariance=True, sensitivity=RandomProbes())
    reference = DenseReference(model, [images])
    choice = auto_plan(model, sites, statistics, reference, keep_ratio=0.6)
    assert choice.plan.kept == round(14 * 0.6)
    prune_(model, choice.plan, choice.means, choice.covariances)
    assert reference.divergence(model) == pytest.approx(min(one.divergence for one in choice.tried))
