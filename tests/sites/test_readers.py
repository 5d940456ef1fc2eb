"""Sites that several layers read, or that are a part of what a layer reads: each reader has moments of its own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from families import randomise_
from oracles import clamped_logits
from torch import Tensor, nn

import vbp
from vbp import (
    PruningPlan,
    Site,
    auto_plan,
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
from vbp.cost.macs import macs_by_module
from vbp.method.sampling import RandomProbes
from vbp.pruning.criteria import criterion_scores
from vbp.pruning.divergence import DenseReference
from vbp.refit.batchnorm import refit_batchnorm_
from vbp.runtime.session import ALONE
from vbp.statistics.evidence import Evidence
from vbp.statistics.gradients import GradientSum


class TwoReaders(nn.Module):
    """Hidden channels that two layers read, one of them by the name of its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.side = nn.Linear(6, 12), nn.Linear(12, 5), nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x.flatten(1)))
        return self.down(hidden) + torch.tanh(self.side(input=hidden))


class SqueezeAndExcitation(nn.Module):
    """The block of EfficientNet: expansion, depthwise convolution, squeeze-and-excitation, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.expand_norm = nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.norm = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.reduce, self.gate = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 1)
        self.project, self.head = nn.Conv2d(16, 8, 1, bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.depthwise(F.silu(self.expand_norm(self.expand(x))))))
        x = x * self.gate(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head(self.project(x).mean((2, 3)))


class Fire(nn.Module):
    """The end of SqueezeNet: a pair of layers that read the same channels, and one that reads both of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(3, 10, 1)
        self.expand1, self.expand3 = nn.Conv2d(10, 8, 1), nn.Conv2d(10, 8, 3)
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        x = torch.cat([self.expand1(x)[..., 1:-1, 1:-1].relu(), self.expand3(x).relu()], 1)
        return self.last(x).mean((2, 3))


class Grouped(nn.Module):
    """The block of ResNeXt and RegNetY: a convolution in groups, and a squeeze-and-excitation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.norm2 = nn.Conv2d(12, 24, 3, groups=3, bias=False), nn.BatchNorm2d(24)
        self.reduce, self.gate = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.conv3, self.head = nn.Conv2d(24, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()
        x = x * self.gate(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(self.conv3(x).mean((2, 3)))


class Dense(nn.Module):
    """The block of DenseNet: every layer reads all that came before it, behind a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        widths = (6, 10, 14)
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, widths))
        self.layers = nn.ModuleList(nn.Conv2d(width, 4, 3, padding=1, padding_mode="circular") for width in widths)
        self.norm, self.head = nn.BatchNorm2d(18), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(norm(x).relu())], 1)
        return self.head(self.norm(x).relu().mean((2, 3)))


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
VECTORS = torch.randn(40, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = randomise_(kind()).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def pruned_and_clamped(
    model: nn.Module, images: Tensor, keep_ratio: float = 0.6
) -> tuple[PruningPlan, Tensor, Tensor]:
    """Prune the model by variance; return the plan, its logits and those of the dense model with clamped channels."""
    sites = find_sites(model, images[:1], convolutions=True)
    statistics = collect_statistics(model, sites, [images])
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=keep_ratio)
    expected = clamped_logits(model, plan, statistics.means, images)
    cost = plan_cost(model, plan, images[:1])
    prune_(model, plan, statistics.means)
    assert count_macs(model, images[:1]) == cost.macs[1] < cost.macs[0]
    with torch.no_grad():
        return plan, model(images), expected


@pytest.mark.parametrize("kind", [TwoReaders, SqueezeAndExcitation, Fire, Grouped, Dense])
def test_the_pruned_model_is_the_dense_one_with_what_every_reader_sees_clamped(kind: type[nn.Module]) -> None:
    plan, logits, expected = pruned_and_clamped(built(kind), VECTORS if kind is TwoReaders else IMAGES)
    assert plan.kept < plan.total
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_the_sites_of_a_squeeze_and_excitation_block() -> None:
    outer, inner = find_sites(built(SqueezeAndExcitation), IMAGES[:1])
    assert outer == Site(
        ("expand", "gate"), "project", 16, inner=("expand_norm", "depthwise", "norm"), others=("reduce",)
    )
    assert [reader.key for reader in outer.readers] == ["expand", "expand#read:reduce"]
    assert inner == Site(("reduce",), "gate", 6)


def test_the_parts_of_a_concatenation_are_sites_of_their_own() -> None:
    squeeze, first, second = find_sites(built(Fire), IMAGES[:1], convolutions=True)
    assert {reader.layer for reader in squeeze.readers} == {"expand1", "expand3"}
    assert (first.consumer, first.columns) == ("last", (0,))
    assert (second.consumer, second.columns) == ("last", (8,))
    *_, last = find_sites(built(Dense), IMAGES[:1], convolutions=True)
    assert last == Site(("layers.2",), "head", 4, inner=("norm",), columns=(14,), inner_offsets=(14,))
    stem = find_sites(built(Dense), IMAGES[:1], convolutions=True)[0]
    assert [reader.first for reader in stem.readers] == [0] * 4
    assert len(stem.inner) == 4


class Shuffle(nn.Module):
    """Two layers whose channels alternate in what a third one reads, as in ShuffleNet; and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.first(x).relu(), self.second(x).relu()], -1)
        return self.down(self.up(self.last(both.flatten(1))).relu())


def test_channels_that_alternate_are_no_sites() -> None:
    assert [site.name for site in find_sites(built(Shuffle), VECTORS[:1])] == ["up"]


@pytest.mark.parametrize("kind", [TwoReaders, SqueezeAndExcitation, Fire, Grouped, Dense])
def test_the_refit_is_no_worse_at_any_reader(kind: type[nn.Module]) -> None:
    model, images = built(kind), VECTORS if kind is TwoReaders else IMAGES
    sites = find_sites(model, images[:1], convolutions=True)
    statistics = collect_statistics(model, sites, [images], covariance=True)
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.6)
    errors = prune_(model, plan, statistics.means, statistics.covariances)
    names = {reader.key for entry in plan.sites if entry.removed for reader in entry.site.readers}
    assert {error.site for error in errors} == names
    assert all(error.refit <= error.mean_shift * (1 + 1e-9) for error in errors)
    assert sum(error.refit for error in errors) < sum(error.mean_shift for error in errors)


@pytest.mark.parametrize("kind", [SqueezeAndExcitation, Fire, Grouped, Dense])
def test_auto_plans_and_the_shares_of_the_divergence(kind: type[nn.Module]) -> None:
    model = built(kind).float()
    images = IMAGES.float()
    sites = find_sites(model, images[:1], convolutions=True)
    statistics = collect_statistics(model, sites, [images], covariance=True, sensitivity=RandomProbes())
    reference = DenseReference(model, [images])
    choice = auto_plan(model, sites, statistics, reference, keep_ratio=0.7)
    # Groups of a convolution keep as many channels each.
    assert abs(choice.plan.kept - choice.plan.requested) <= (3 if kind is Grouped else 0)
    prune_(pruned := copy.deepcopy(model), choice.plan, choice.means, choice.covariances)
    shares = reference.site_contributions(pruned, choice.plan)
    # Where nothing was removed no error is made.
    assert set(shares) == {site.name for site in sites}
    if any(isinstance(module, nn.BatchNorm2d) for module in pruned.modules()):
        refit = refit_batchnorm_(pruned, choice.plan, [images], reference)
        assert refit.divergences[refit.chosen] == min(refit.divergences.values())


@pytest.mark.parametrize("kind", [SqueezeAndExcitation, Grouped, Dense])
def test_a_pruned_model_comes_back_from_a_file_and_trains(kind: type[nn.Module], tmp_path: Path) -> None:
    model = built(kind)
    plan, *_ = pruned_and_clamped(model, IMAGES)
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    save_pruned(model, tmp_path / "m.pth", plans=plan)
    assert torch.equal(load_pruned(tmp_path / "m.pth", model=built(kind))(IMAGES), model(IMAGES))
    model.train()(IMAGES).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_dense_model_is_refused_by_a_plan_whose_channels_lie_elsewhere() -> None:
    model = built(Dense)
    sites = find_sites(model, IMAGES[:1], convolutions=True)
    plan = make_plan(sites, {site.name: torch.arange(float(site.hidden)) for site in sites}, keep_ratio=0.5)
    model.head = nn.Linear(16, 5)
    with pytest.raises(vbp.InputError, match="must have 4 channels, got widths"):
        prune_(model, plan)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("efficientnet_b0", {}),
        ("mobilenetv3_small_050", {}),
        ("mnasnet_small", {}),
        ("rexnet_100", {"width_mult": 0.25, "depth_mult": 0.3}),
        ("tinynet_e", {}),
    ],
)
def test_most_of_the_work_of_networks_with_squeeze_and_excitation_is_in_sites(
    name: str, arguments: dict[str, float]
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments).double().eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sites, macs = find_sites(model, images[:1]), macs_by_module(model, images[:1])
    layers = {name for site in sites for name in (*site.layers, *site.inner)}
    assert sum(macs.get(name, 0) for name in layers) > 0.6 * macs[""]
    _, logits, expected = pruned_and_clamped(model, images)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_as_many_channels_stay_in_each_group_and_a_gradient_goes_with_them() -> None:
    model = built(Grouped)
    sites = find_sites(model, IMAGES[:1], convolutions=True)
    assert [(site.name, site.heads) for site in sites] == [("conv1", 3), ("conv2", 3), ("reduce", 1)]
    with pytest.raises(vbp.InputError, match="convolutions=True"):
        find_sites(nn.Sequential(model.conv1, model.norm1, nn.ReLU(), model.conv2), IMAGES[:1])
    statistics = collect_statistics(model, sites, [IMAGES])
    model(IMAGES).square().sum().backward()
    before = copy.deepcopy(model.conv2)
    before.weight.grad = model.conv2.weight.grad.clone()
    for scope in ("global", "per_layer", "equal"):
        plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.5, scope=scope, min_keep_ratio=0.3)
        for entry in plan.sites[:2]:
            size = entry.site.hidden // 3
            assert len({sum(channel // size == group for channel in entry.keep) for group in range(3)}) == 1
    prune_(model, plan)
    assert (model.conv2.in_channels, model.conv2.out_channels, model.conv2.groups) == (6, 12, 3)
    (first, second, _) = (list(entry.keep) for entry in plan.sites)
    rows = torch.tensor([[row, channel % 4] for row in second[:4] for channel in first[:2]])
    for mine, whole in ((model.conv2.weight, before.weight), (model.conv2.weight.grad, before.weight.grad)):
        assert torch.equal(mine[:4].flatten(0, 1), whole[rows[:, 0], rows[:, 1]])


@pytest.mark.parametrize("criterion", "random l1 l2 lamp taylor snip output_variance elimination".split())
@pytest.mark.parametrize("kind", [Grouped, Dense])
def test_every_criterion_scores_them(kind: type[nn.Module], criterion: str) -> None:
    model = built(kind).float()
    sites = find_sites(model, IMAGES[:1], convolutions=True)
    gradients = GradientSum(model, sites)
    gradients.add_(IMAGES.float(), torch.arange(6) % 5)
    statistics = collect_statistics(model, sites, [IMAGES.float()], covariance=True)
    scores = criterion_scores(criterion, model, sites, Evidence(statistics, gradients.mean(ALONE.processes)))
    assert {name: len(score) for name, score in scores.items()} == {site.name: site.hidden for site in sites}
    prune_(model, make_plan(sites, scores, keep_ratio=0.5))
    assert model(IMAGES.float()).shape == (6, 5)


def test_the_sensitivity_of_a_grouped_convolution_is_that_of_the_weights_that_it_has() -> None:
    """A grouped convolution is an ungrouped one with zeros; only the gradients of its own weights count."""
    model = built(Grouped)
    site = find_sites(model, IMAGES[:1], convolutions=True)[0]
    probes = RandomProbes(input_columns=2000, output_columns=2000)
    sums = collect_statistics(model, [site], [IMAGES], sensitivity=probes).sensitivities[site.name]
    inputs = sums.inputs[:-1, :-1]
    block = torch.block_diag(*[torch.ones(4, 4, dtype=torch.bool)] * 3)
    assert bool((inputs[~block] == 0).all())
    # The trace is the mean square of the gradient with respect to the weights, channels counted from the pivot.
    assert float(inputs.trace()) > 0
