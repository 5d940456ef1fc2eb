"""Criteria by name: Torch-Pruning's importances and plain formulas as oracles, and what each of them needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from families import FAMILIES, randomise_
from torch import Tensor, nn
from torch.func import functional_call

from vbp import InputError, Site, collect_statistics, find_sites, make_plan, output_variance_scores
from vbp.pruning.baselines import lamp_scores, magnitude_scores, random_scores, snip_scores, taylor_scores
from vbp.pruning.criteria import criterion_scores, eliminations, needs_of
from vbp.runtime.choices import Criterion
from vbp.runtime.processes import Processes
from vbp.sites.site import weight_slices
from vbp.statistics.evidence import Evidence
from vbp.statistics.gradients import GradientSum

LABELS = torch.tensor([0, 3, 6, 1])


def _normed() -> nn.Module:
    """Return an MLP with a norm among its hidden channels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.LayerNorm(10), nn.GELU(), nn.Linear(10, 7))


def _case(name: str) -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    generator = torch.Generator().manual_seed(1)
    if name == "normed":
        images = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
        model = randomise_(_normed()).double().eval()
    else:
        images = FAMILIES[name].example(4)
        model = randomise_(FAMILIES[name].build()).double().eval()
    return model, images, find_sites(model, images[:1])


def collect_gradients(
    model: nn.Module, sites: tuple[Site, ...], batches: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    running = GradientSum(model, sites)
    for pixels, labels in batches:
        running.add_(pixels, labels)
    return running.mean(Processes())


def _loss(model: nn.Module, images: Tensor) -> Tensor:
    return F.cross_entropy(model(images), LABELS)


Oracle = tuple[Callable[[nn.Module, tuple[Site, ...], dict[str, Tensor]], dict[str, Tensor]], Any]
_BARE: dict[str, Any] = {"group_reduction": "sum", "normalizer": None}
ORACLES: dict[str, Oracle] = {
    "l1": (lambda m, s, g: magnitude_scores(m, s, power=1), tp.importance.GroupMagnitudeImportance(p=1)),
    "l2": (lambda m, s, g: magnitude_scores(m, s, power=2), tp.importance.GroupMagnitudeImportance(p=2)),
    "lamp": (lambda m, s, g: lamp_scores(m, s), tp.importance.LAMPImportance()),
    "taylor": (taylor_scores, tp.importance.GroupTaylorImportance(multivariable=True, **_BARE)),
    "snip": (snip_scores, tp.importance.GroupTaylorImportance(multivariable=False, **_BARE)),
}


@pytest.mark.parametrize("criterion", ORACLES)
@pytest.mark.parametrize("name", ["timm-vit", "timm-convnext-conv", "normed"])
def test_baselines_are_those_of_torch_pruning(name: str, criterion: str) -> None:
    model, images, sites = _case(name)
    scores, importance = ORACLES[criterion]
    found = scores(model, sites, collect_gradients(model, sites, [(images, LABELS)]))
    reference = copy.deepcopy(model)
    _loss(reference, images).backward()  # type: ignore[no-untyped-call]
    graph = tp.DependencyGraph().build_dependency(reference, example_inputs=images[:1], verbose=False)
    for site in sites:
        layer = reference.get_submodule(site.producers[0])
        prune = tp.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_out_channels
        wanted = importance(graph.get_pruning_group(layer, prune, list(range(site.hidden))))
        # Torch-Pruning adds up in float32.
        torch.testing.assert_close(found[site.name], wanted.double(), rtol=2e-5, atol=1e-7)


def test_taylor_is_the_slope_of_the_loss_along_each_layer_of_a_channel() -> None:
    model, images, sites = _case("timm-vit")
    site, channel = sites[0], 3
    parameters = dict(model.named_parameters())

    def slope(part: Any) -> float:
        gate = torch.ones((), dtype=torch.float64, requires_grad=True)
        scale = torch.ones(len(part.places), dtype=torch.float64).index_fill(0, torch.tensor([channel]), 0.0)
        scale = scale + gate * (1 - scale)
        weight = parameters[part.parameter].detach()
        gated = weight * (scale[:, None] if part.dim == 0 else scale)
        logits = functional_call(model, {part.parameter: gated}, (images,))
        (found,) = torch.autograd.grad(F.cross_entropy(logits, LABELS), [gate])
        return float(found)

    scores = taylor_scores(model, sites, collect_gradients(model, sites, [(images, LABELS)]))
    wanted = sum(abs(slope(part)) for part in weight_slices(model, site))
    assert float(scores[site.name][channel]) == pytest.approx(wanted, rel=1e-9)


def test_sites_of_an_attention_share_its_packed_layer() -> None:
    model = randomise_(FAMILIES["timm-vit"].build()).double()
    sites = find_sites(model, FAMILIES["timm-vit"].example(1), attention=True)
    scores = magnitude_scores(model, sites, power=1)
    values, pairs = ([site for site in sites if site.kind == kind] for kind in ("value", "query_key"))
    for block, (value, pair) in enumerate(zip(values, pairs, strict=True)):
        attention = model.get_submodule(f"blocks.{block}.attn")
        query, key, made = attention.qkv.weight.detach().abs().view(3, value.hidden, -1).sum(2)
        read = attention.proj.weight.detach().abs().sum(0)
        for site, sums in ((pair, query + key), (value, made + read)):
            torch.testing.assert_close(scores[site.name], sums / sums.mean())


def test_lamp_compares_sites_by_construction() -> None:
    model, _, sites = _case("timm-vit")
    before = lamp_scores(model, sites)
    with torch.no_grad():
        for part in weight_slices(model, sites[0]):
            model.get_parameter(part.parameter).mul_(1e3)
    after = lamp_scores(model, sites)
    for name, scores in before.items():
        assert float(scores.max()) == 1
        torch.testing.assert_close(after[name], scores)


def test_dead_channels_score_nothing_and_spoil_nothing() -> None:
    model, _, sites = _case("timm-vit")
    with torch.no_grad():
        for part in weight_slices(model, sites[0]):
            model.get_parameter(part.parameter).zero_()
    for scores in (magnitude_scores(model, sites, power=2), lamp_scores(model, sites)):
        assert not scores[sites[0].name].any()
        assert scores[sites[1].name].isfinite().all()
        assert scores[sites[1].name].any()


def test_random_scores_depend_on_seed_and_site_alone() -> None:
    sites = tuple(Site((name,), "reader", 50) for name in "ab")
    scores = random_scores(sites, seed=1)
    assert torch.equal(random_scores(sites[1:], seed=1)["b"], scores["b"])
    assert not torch.equal(scores["a"], scores["b"])
    assert not torch.equal(random_scores(sites, seed=2)["a"], scores["a"])


def test_gradients_are_of_the_mean_loss_whatever_the_batches() -> None:
    model, images, sites = _case("timm-vit")
    model.train().requires_grad_(False)
    model.get_parameter("head.weight").requires_grad_()
    whole = collect_gradients(model, sites, [(images, LABELS)])
    assert model.training
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["head.weight"]
    reference = copy.deepcopy(model).eval().requires_grad_()
    _loss(reference, images).backward()  # type: ignore[no-untyped-call]
    parts = collect_gradients(model, sites, [(images[:1], LABELS[:1]), (images[1:], LABELS[1:])])
    assert set(whole) == {part.parameter for site in sites for part in weight_slices(model, site)}
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, reference.get_parameter(name).grad)
        torch.testing.assert_close(parts[name], gradient)


def test_statistics_and_gradients_share_a_reading_and_do_not_see_each_other() -> None:
    model, images, sites = _case("timm-vit")
    read = []

    def batches() -> Any:
        for start in (0, 2):
            read.append(start)
            yield images[start : start + 2], LABELS[start : start + 2]

    running = GradientSum(model, sites)
    statistics = collect_statistics(model, sites, running.tee(batches()))
    assert read == [0, 2]
    alone = collect_statistics(model, sites, batches())
    for name, moments in alone.moments.items():
        assert statistics.moments[name].count == moments.count
        assert torch.equal(statistics.moments[name].mean, moments.mean)
    for name, gradient in collect_gradients(model, sites, [(images, LABELS)]).items():
        torch.testing.assert_close(running.mean(Processes())[name], gradient)


def test_no_images_and_infinite_gradients_are_refused() -> None:
    model, images, sites = _case("timm-vit")
    with pytest.raises(InputError, match="at least one labelled image, got none"):
        collect_gradients(model, sites, [])
    with torch.no_grad():
        model.get_parameter("head.bias")[0] = torch.nan
    with pytest.raises(InputError, match="must be finite, got NaN or infinity"):
        collect_gradients(model, sites, [(images, LABELS)])


def _evidence(model: nn.Module, images: Tensor, sites: tuple[Site, ...]) -> Evidence:
    statistics = collect_statistics(model, sites, [images], covariance=True)
    return Evidence(statistics, collect_gradients(model, sites, [(images, LABELS)]))


@pytest.mark.parametrize("criterion", sorted({*get_args(Criterion)} - {"auto"}))
def test_every_criterion_scores_every_kind_of_site(criterion: str) -> None:
    model, images, _ = _case("timm-vit")
    sites = find_sites(model, images[:1], attention=True)
    scores = criterion_scores(criterion, model, sites, _evidence(model, images, sites))
    assert set(scores) == {site.name for site in sites}
    plan = make_plan(sites, scores, keep_ratio=0.4)
    assert plan.kept == plan.requested


def test_elimination_takes_counts_from_the_output_and_its_own_order_within() -> None:
    model, images, sites = _case("timm-vit")
    with torch.no_grad():  # two channels that never vary tie for the first to go
        for part in weight_slices(model, sites[0])[:1]:
            model.get_parameter(part.parameter)[[7, 2]] = 0
    evidence = _evidence(model, images, sites)
    assert evidence.statistics is not None
    scores = criterion_scores("elimination", model, sites, evidence)
    counts = make_plan(sites, output_variance_scores(model, sites, evidence.statistics), keep_ratio=0.5).widths
    plan = make_plan(sites, scores, keep_ratio=0.5)
    assert plan.widths == counts
    for name, found in eliminations(model, sites, evidence.statistics).items():
        assert scores[name].argsort().tolist() == found.order.tolist()


def test_needs_are_named_and_their_lack_refused() -> None:
    assert needs_of(["l1", "random", "lamp", "l2"]) == frozenset()
    assert needs_of(["variance", "snip"]) == {"statistics", "gradients"}
    assert needs_of(["elimination"]) == {"statistics", "covariance"}
    assert needs_of(["auto"]) == {"statistics", "covariance", "sensitivity"}
    with pytest.raises(InputError, match=r"criterion must be one of auto, variance, .*, got 'vraiance'"):
        needs_of(["vraiance"])
    model, images, sites = _case("timm-vit")
    with pytest.raises(InputError, match=r"criterion auto makes plans, not scores.*call vbp\.auto_plan"):
        criterion_scores("auto", model, sites, Evidence())
    means = Evidence(collect_statistics(model, sites, [images]))
    for criterion, evidence, missing in (
        ("variance", Evidence(), "statistics"),
        ("elimination", means, "covariance"),
        ("taylor", means, "gradients"),
    ):
        with pytest.raises(InputError, match=f"{criterion} needs {missing}, got none"):
            criterion_scores(criterion, model, sites, evidence)
