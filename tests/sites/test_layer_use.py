"""Layers that their class does not describe are refused by name; what is left is pruned as the oracle says.

Each case is kin to public reports about pruning or quantisation tools: weights tied between modules, normalised or
masked weights, adapters inside a layer, standardised convolutions, hooks that change features, auxiliary heads.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import clamped_logits
from timm.layers import Linear as TimmLinear
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.ao.nn.qat import Linear as QuantisedLinear
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from vbp import InputError, PruningPlan, SitePlan, collect_statistics, find_sites, make_plan, prune_, variance_scores


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = F.gelu(self.fc1(x))
        return self.fc2(hidden)


class Blocks(nn.Module):
    """Three MLPs on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MLP() for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Normalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Adapted(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + x @ self.lora_a.T @ self.lora_b.T


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


def _quantised(inputs: int, outputs: int) -> nn.Module:
    return QuantisedLinear(inputs, outputs, qconfig=get_default_qat_qconfig("x86"))


def _hooked(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, output: output.roll(1, -1))


def _overridden(layer: nn.Module) -> None:
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) * 2  # type: ignore[method-assign]


def _masked(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.3)


def replaced(make: Callable[[int, int], nn.Module]) -> Callable[[Blocks, str], None]:
    def change(model: Blocks, name: str) -> None:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        model.set_submodule(name, make(old.in_features, old.out_features))

    return change


def wrapped(wrap: Callable[[nn.Module], object]) -> Callable[[Blocks, str], None]:
    return lambda model, name: wrap(model.get_submodule(name)) and None


def tied(model: Blocks, name: str) -> None:
    one, other = (model.get_submodule(name.replace("1", block, 1)) for block in "12")
    other.weight = one.weight


def tied_by_memory(model: Blocks, name: str) -> None:
    one, other = (model.get_submodule(name.replace("1", block, 1)) for block in "12")
    assert isinstance(one.weight, Tensor)
    other.weight = nn.Parameter(one.weight.data)


UNUSUAL = {
    "normalised rows": replaced(Normalised),
    "an adapter inside": replaced(Adapted),
    "a scaled input": replaced(Scaled),
    "quantisation-aware training": replaced(_quantised),
    "weight_norm": wrapped(parametrizations.weight_norm),
    "spectral_norm": wrapped(parametrizations.spectral_norm),
    "weight_norm of old": wrapped(weight_norm),
    "spectral_norm of old": wrapped(spectral_norm),
    "a pruning mask": wrapped(_masked),
    "a hook": wrapped(_hooked),
    "a forward of the instance": wrapped(_overridden),
    "a tied parameter": tied,
    "a view of one memory": tied_by_memory,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("layer", ["fc1", "fc2"])
@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL)
def test_an_unusual_layer_is_no_site_and_the_others_equal_the_oracle(
    change: Callable[[Blocks, str], None], layer: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Blocks()
    change(model, f"blocks.1.{layer}")
    model.eval()  # in float32: fake quantisation knows no other
    images = torch.randn(40, 8)
    model(images)
    with caplog.at_level(logging.INFO, "vbp"):
        sites = find_sites(model, images[:2])
    shared = change in (tied, tied_by_memory)
    assert [site.name for site in sites] == ["blocks.0.fc1"] + ["blocks.2.fc1"] * (not shared)
    assert f"blocks.1.{layer} cannot be pruned by its own weight and bias: " in caplog.text
    statistics = collect_statistics(model, sites, [images])
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.5)
    means = {name: mean.float() for name, mean in statistics.means.items()}
    expected = clamped_logits(model, plan, means, images)
    prune_(model, plan, statistics.means)
    torch.testing.assert_close(model(images), expected)


def test_a_model_of_unusual_layers_alone_says_so() -> None:
    pair = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GELU(), StdConv2d(6, 3, 1)).eval()
    with pytest.raises(
        InputError, match="no prunable site in Sequential: 2 cannot be pruned by its own weight and bia"
    ):
        find_sites(pair, torch.randn(1, 3, 4, 4))


def test_a_subclass_that_computes_the_same_is_a_site() -> None:
    assert len(find_sites(nn.Sequential(TimmLinear(4, 6), nn.GELU(), TimmLinear(6, 4)), torch.randn(2, 4))) == 1


class ReadElsewhere(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(torch.relu(F.linear(x, self.fc1.weight)), self.fc1.weight.t())


def test_a_weight_that_other_code_reads_is_refused() -> None:
    with pytest.raises(
        InputError, match="fc1 cannot be pruned by its own weight and bias: linear reads its parameters"
    ):
        find_sites(ReadElsewhere(), torch.randn(2, 8))


def accumulated(x: Tensor) -> Tensor:
    return torch.cumsum(x, -1)


class Scripted(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.scripted = torch.jit.script(accumulated)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(x))
        return self.fc2(hidden) + self.scripted(hidden)[..., :1]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted_code_that_reads_hidden_channels_is_seen() -> None:
    with pytest.raises(InputError, match="its channels are also used by cumsum"):
        find_sites(Scripted(), torch.randn(2, 8))


class Auxiliary(MLP):
    """An auxiliary head that only training runs, a norm that learns in training, and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.aux = nn.BatchNorm1d(8), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = F.gelu(self.fc1(self.norm(x)))
        if self.training and random.random() < 2:
            return self.fc2(hidden), self.aux(input=hidden)
        return self.fc2(hidden)


def test_a_path_of_training_alone_is_looked_at_and_leaves_no_trace() -> None:
    model = Auxiliary().eval()
    before, state = copy.deepcopy(model.state_dict()), random.getstate()
    with pytest.raises(InputError, match="the input of fc2 is no site: its channels are also read by aux"):
        find_sites(model, torch.randn(1, 8))
    assert random.getstate() == state
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Stubborn(nn.Linear):
    """Lets nobody change its width."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "out_features" and hasattr(self, "weight"):
            raise AttributeError("this width is fixed")
        super().__setattr__(name, value)


@pytest.mark.parametrize("compensated", [False, True])
def test_an_error_midway_leaves_the_model_bit_for_bit(compensated: bool) -> None:
    """Kin to reports of models that are half pruned after an exception."""
    torch.manual_seed(0)
    model = Blocks()
    images = torch.randn(20, 8)
    sites = find_sites(model, images)
    model.set_submodule("blocks.2.fc1", Stubborn(8, 12))
    statistics = collect_statistics(model, sites, [images])
    plan = PruningPlan(tuple(SitePlan(site, (0, 3, 5)) for site in sites), 0.25, "per_layer")
    parameters, before = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    with pytest.raises(AttributeError, match="this width is fixed"):
        prune_(model, plan, statistics.means if compensated else None)
    assert all(one is parameters[name] for name, one in model.named_parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [model.get_submodule(site.producers[0]).out_features for site in sites] == [12, 12, 12]


def test_a_layer_that_became_unusual_after_it_was_found_is_refused() -> None:
    model = Blocks().eval()
    sites = find_sites(model, torch.randn(2, 8))
    parametrizations.weight_norm(model.get_submodule("blocks.1.fc1"))
    plan = PruningPlan(tuple(SitePlan(site, (0, 3, 5)) for site in sites), 0.25, "per_layer")
    with pytest.raises(InputError, match=r"site blocks.1.fc1 is none: .* it holds parametrizations.weight.original0"):
        prune_(model, plan)
    assert model.get_parameter("blocks.0.fc1.weight").shape == (12, 8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_are_named() -> None:
    """Kin to reports of a quantised model in which a pruner finds nothing, and does not say why."""
    quantised = torch.ao.quantization.quantize_dynamic(MLP().eval(), {nn.Linear})
    with pytest.raises(InputError, match=r"no prunable site in MLP: fc1 cannot be pruned .*its weight is quantised"):
        find_sites(quantised, torch.randn(2, 8))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_scripted_module_keeps_its_mode() -> None:
    """Kin to reports of a model that a tool leaves in another mode where a part of it is TorchScript."""
    model = nn.Sequential(nn.Linear(8, 12), torch.jit.script(nn.Sequential(nn.GELU())), nn.Linear(12, 8)).train()
    assert len(find_sites(model, torch.randn(2, 8))) == 1
    assert all(module.training for module in model.modules())
