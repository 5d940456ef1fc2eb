"""Sites are found by structure, in every library, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, Family
from torch import Tensor, nn

from vbp import InputError, Site, collect_statistics, count_macs, find_sites
from vbp.method.sampling import RandomProbes
from vbp.sites.mlp import find_mlps


def test_each_family_gives_its_mlps(family: Family) -> None:
    model = family.build()
    sites = find_sites(model, family.example(1, torch.float32))
    assert len(sites) == family.sites
    for site in sites:
        producer, consumer = model.get_submodule(site.producers[0]), model.get_submodule(site.consumer)
        assert producer.weight.shape[0] == consumer.weight.shape[1] == site.hidden


def test_finding_leaves_the_model_as_it_was(family: Family) -> None:
    model = family.build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_sites(model, family.example(1, torch.float32))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Block(nn.Module):
    """Two linear layers whose forward pass each test chooses."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.up, self.down, self.side = nn.Linear(4, hidden), nn.Linear(hidden, 4), nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        raise AssertionError


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class QuickGelu(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(F.dropout(hidden * torch.sigmoid(1.702 * hidden), 0.1, self.training))


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x), inplace=True))


class Squared(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)) ** 2)


@pytest.mark.parametrize("kind", [Plain, QuickGelu, InPlace, Squared])
def test_any_way_to_write_an_activation(kind: type[Block]) -> None:
    assert find_sites(kind(), torch.randn(2, 4)) == (Site(("up",), "down", 6),)


class Normalised(Block):
    """A division by the norm over the channels, written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        return self.down(hidden / (hidden.norm(2, -1, keepdim=True) + 1))


class NormalisedWithoutDim(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        return self.down(hidden / (hidden.norm(2, -1)[:, None] + 1))


class MeanOverPositions(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        return self.down((hidden - hidden.mean(0)[None]) / (hidden.norm(2, 0) + 1)[None])


@pytest.mark.parametrize(("kind", "exact"), [(Normalised, False), (MeanOverPositions, True)])
def test_a_norm_written_by_hand_is_followed(kind: type[Block], exact: bool) -> None:
    (site,) = find_sites(kind(), torch.randn(2, 4))
    assert (site.producers, site.consumer, site.exact) == (("up",), "down", exact)


class CalledByName(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(input=F.gelu(self.up(input=x)))


def test_layers_called_by_name_are_followed_and_observed() -> None:
    """Kin to reports of hooks that get an empty tuple of arguments."""
    model, images = CalledByName(), torch.randn(5, 4)
    sites = find_sites(model, {"x": images})
    assert sites == (Site(("up",), "down", 6),)
    hidden = F.gelu(model.up(images)).detach()
    found = collect_statistics(model, sites, [images], covariance=True, sensitivity=RandomProbes())
    torch.testing.assert_close(found.means["up"], hidden.double().mean(0))
    torch.testing.assert_close(found.variances["up"], hidden.double().var(0))
    assert [mlp.site for mlp in find_mlps(model, images, sites)] == list(sites)


class NoActivation(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class UsedElsewhere(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        return self.down(hidden) + hidden.mean()


class PreActivationUsed(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(F.gelu(hidden)) * hidden.softmax(-1).sum()


class Returned(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.gelu(self.up(x))
        return self.down(hidden), hidden


class Mixed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)).flip(-1))


class Transposed(Block):
    def __init__(self) -> None:
        super().__init__(hidden=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)).t())


class RunTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.down(F.gelu(self.up(x))))))


class NotFromTheImage(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(torch.ones(4))))


class ScaledPerChannel(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)) * torch.arange(6.0))


@pytest.mark.parametrize(
    "kind",
    [
        NormalisedWithoutDim,
        NoActivation,
        UsedElsewhere,
        PreActivationUsed,
        Returned,
        Mixed,
        Transposed,
        RunTwice,
        NotFromTheImage,
        ScaledPerChannel,
    ],
)
def test_hidden_channels_used_in_another_way_are_no_site(kind: type[Block]) -> None:
    with pytest.raises(InputError, match=f"no prunable site in {kind.__name__}: looked for a Linear"):
        find_sites(kind(), torch.randn(4, 4))


def test_a_pointwise_convolution_pair_is_a_site_and_a_wider_kernel_is_none() -> None:
    pair = nn.Sequential(nn.Conv2d(3, 5, 1), nn.GELU(), nn.Conv2d(5, 3, 1))
    assert find_sites(pair, torch.randn(1, 3, 4, 4)) == (Site(("0",), "2", 5),)
    wide = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GELU(), nn.Conv2d(5, 3, 3))
    with pytest.raises(InputError):
        find_sites(wide, torch.randn(1, 3, 8, 8))


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, *, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.fc2(self.fc1(pixel_values).relu())


def test_example_inputs_that_are_not_the_models_arguments_are_refused() -> None:
    """Kin to reports of a TypeError from deep inside a tracer."""
    assert len(find_sites(ByName(), {"pixel_values": torch.randn(2, 8)})) == 1
    with pytest.raises(InputError, match=r"must be the arguments of ByName.forward, got 1 .*a dict by their names"):
        find_sites(ByName(), torch.randn(2, 8))
    with pytest.raises(InputError, match=r"must be the arguments of ByName.forward, got images "):
        find_sites(ByName(), {"images": torch.randn(2, 8)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_example_inputs_take_the_type_of_the_model(dtype: torch.dtype) -> None:
    """Kin to reports of half-precision models that a counter or a tracer stops at with a float32 input."""
    model, images = FAMILIES["timm-vit"].build().to(dtype), FAMILIES["timm-vit"].example(1, torch.float32)
    assert find_sites(model, images) == find_sites(model, images.to(dtype))
    assert count_macs(model, images) == count_macs(model, images.to(dtype))


def test_a_model_that_does_not_run_is_one_error_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(
        InputError, match=r"must run on example_inputs, got RuntimeError in Sequential: mat1 and mat2"
    ):
        find_sites(model, torch.randn(1, 9))
    model[2].to("meta")
    with pytest.raises(InputError, match=r"must run on example_inputs, got .* whole weights"):
        find_sites(model, torch.randn(1, 8))
    program = torch.export.export(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), (torch.randn(1, 8),)).module()
    with pytest.raises(
        InputError, match=r"must have an evaluation mode, got a .*; give the module that it was made from"
    ):
        find_sites(program, torch.randn(1, 8))
