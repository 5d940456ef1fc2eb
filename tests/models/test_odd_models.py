"""Models that keep what they compute, ask for versions, hold empty tensors or have norms without a bias."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import clamped_logits
from torch import Tensor, nn

import vbp
from vbp.runtime.forward import copy_model, logits_of
from vbp.statistics.gradients import GradientSum


class Cached(nn.Module):
    """Keeps its biases from one pass in evaluation mode to the next, as the attention of LeViT and TinyViT."""

    def __init__(self) -> None:
        super().__init__()
        self.biases, self.cache = nn.Parameter(torch.randn(6)), dict[str, Tensor]()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        if "biases" not in self.cache:
            self.cache["biases"] = self.biases * 2
        return self.down(F.gelu(self.up(x + self.cache["biases"])))


class Versioned(nn.Module):
    """Reads only state dicts that tell their version, as MNASNet of torchvision."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.norm(self.up(x))))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"version should be set to 2 instead of {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Empty(nn.Module):
    """Puts no tokens before the others, as towers without a class token do: tensors with a dimension of size 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)[:, None]
        prefix, tokens = tokens[:, :0], tokens[:, 0:]
        tokens = torch.cat([prefix * 2, tokens], 1)
        hidden = F.gelu(self.up(tokens))
        return self.down(torch.cat([hidden[:, :0], hidden], 1)).mean(1)


class RmsNorm(nn.Module):
    """A norm without a bias, and with its activation inside, as those of MobileNetV5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.rand(width) + 0.5), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.act(x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight)
        return output


class WithoutBias(nn.Module):
    """Norms without a bias between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.inner, self.down = nn.Linear(6, 12, bias=False), RmsNorm(12), nn.Linear(12, 6, bias=False)
        self.norm, self.last = nn.LayerNorm(6, bias=False), nn.Linear(6, 12)
        self.within, self.head = nn.LayerNorm(12, bias=False), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.down(self.inner(self.up(x))))
        return self.head(F.gelu(self.within(self.last(x))))


class LogitsByAnotherName(Cached):
    """Returns its logits as the only entry of an output, under a name of features, as PPLCNet does."""

    def forward(self, x: Tensor) -> Any:
        return OrderedDict(last_hidden_state=super().forward(x))


VECTORS = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().eval()


@pytest.mark.parametrize("kind", [Cached, Versioned, Empty, WithoutBias, LogitsByAnotherName])
def test_an_odd_model_goes_all_the_way(kind: type[nn.Module], tmp_path: Path) -> None:
    model = built(kind)
    logits_of(model(VECTORS)).sum().backward()
    sites = vbp.find_sites(model, VECTORS[:1])
    statistics = vbp.collect_statistics(model, sites, [VECTORS], covariance=True)
    plan = vbp.make_plan(sites, vbp.variance_scores(statistics), keep_ratio=0.5)
    macs = vbp.plan_cost(model, plan, VECTORS[:1]).macs
    pruned = copy_model(model)
    vbp.prune_(pruned, plan, statistics.means)
    assert macs[1] == vbp.count_macs(pruned, VECTORS[:1]) < macs[0]
    if all(site.exact for site in sites):
        expected = clamped_logits(model, plan, statistics.means, VECTORS)
        torch.testing.assert_close(logits_of(pruned(VECTORS)), expected, rtol=1e-10, atol=1e-10)
    vbp.save_pruned(pruned, tmp_path / "m.pth", plans=plan)
    loaded = vbp.load_pruned(tmp_path / "m.pth", model=built(kind))
    assert torch.equal(logits_of(loaded(VECTORS)), logits_of(pruned(VECTORS)))
    vbp.prune_(refitted := copy_model(model), plan, statistics.means, statistics.covariances)
    assert logits_of(refitted(VECTORS)).isfinite().all()


def test_a_model_with_a_cached_tensor_of_a_pass_with_gradients_is_copied() -> None:
    model = built(Cached).float()
    images = VECTORS.float()
    model(images).sum().backward()
    assert not model.cache["biases"].is_leaf
    other = copy_model(model)
    assert torch.equal(other(images), model(images))
    assert other.cache["biases"].is_leaf
    assert not model.cache["biases"].is_leaf
    gradients = GradientSum(model, vbp.find_sites(model, images[:1]))
    gradients.add_(images, torch.arange(20) % 5)
    assert torch.equal(copy_model(model).double()(VECTORS), copy_model(model.double())(VECTORS))


def test_what_a_copy_shares_is_not_copied() -> None:
    model = built(Cached)
    other = copy_model(model, {id(model.biases): model.biases})
    assert other.biases is model.biases
    assert other.up.weight is not model.up.weight


@pytest.mark.parametrize("output", [{"last_hidden_state": torch.zeros(2, 3, 4)}, {"a": torch.zeros(2, 3), "b": 1}, 7])
def test_features_are_no_logits(output: Any) -> None:
    with pytest.raises(vbp.InputError, match="a classifier must return"):
        logits_of(output)
