"""Every architecture: its sites, the oracle, training, cost, and a saved file that comes back bit-equal.

The oracle is the dense model whose removed channels are held at their means where the consumer reads them. Where a
norm lies between (GRN, LayerNorm), it is the dense model with that norm restricted to the channels that stay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, CLASSES, WRITTEN_WIDTH, Architecture, noticeable_
from torch import Tensor, nn
from torch.nn import functional as F

from vbp import (
    InputError,
    ModelSource,
    PruningPlan,
    Site,
    SitePlan,
    Statistics,
    collect_statistics,
    count_macs,
    count_parameters,
    load_classifier,
    load_pruned,
    make_plan,
    plan_cost,
    prune_,
    save_pruned,
    variance_scores,
)
from vbp.pruning.attention import rotate_
from vbp.pruning.surgery import check_prunable
from vbp.runtime.forward import logits_of
from vbp.sites.layers import channel_dim

PRUNABLE = [entry for entry in ARCHITECTURES if entry.sites]
ATTENTION = [entry for entry in PRUNABLE if isinstance(entry.attention, int)]
WITHOUT_ATTENTION = [entry for entry in ARCHITECTURES if isinstance(entry.attention, str)]
REFUSED = [entry for entry in ARCHITECTURES if not entry.sites]


def _name(entry: Architecture) -> str:
    return entry.label


def over(entries: list[Architecture]) -> pytest.MarkDecorator:
    """Run a test on each of these architectures."""
    return pytest.mark.parametrize("entry", entries, ids=_name)


@dataclass(frozen=True)
class Prepared:
    """A dense float64 model with noticeable weights, and a plan for it; not to be changed."""

    model: nn.Module
    images: Tensor
    sites: tuple[Site, ...]
    statistics: Statistics
    scores: Mapping[str, Tensor]
    plan: PruningPlan

    def pruned(self, plan: PruningPlan | None = None) -> nn.Module:
        """Return a pruned and compensated copy."""
        model = copy.deepcopy(self.model)
        prune_(model, plan or self.plan, self.statistics.means)
        return model


@cache
def prepared(entry: Architecture, attention: bool = False) -> Prepared:
    """Return the model, its statistics and a global plan at 0.6; heads keep half of their channels."""
    images = entry.images(4)
    model = noticeable_(entry.build().double(), images)
    sites = entry.find(model, images, attention=attention)
    statistics = collect_statistics(model, sites, [images])
    scores = variance_scores(statistics, norm_per_layer=True)
    plan = make_plan(sites, scores, keep_ratio=0.6, attn_keep_ratio=0.5 if attention else None)
    return Prepared(model, images, sites, statistics, scores, plan)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits in evaluation mode, without gradients."""
    with torch.no_grad():
        return logits_of(model.eval()(images))


# The reference


@contextmanager
def clamped(model: nn.Module, plan: PruningPlan, means: Mapping[str, Tensor]) -> Iterator[None]:
    """Hold the removed channels at their means, silence removed queries and keys, restrict norms to what stays."""
    handles = []
    for entry in plan.sites:
        for name in norms_of(model, entry.site):
            handles.append(model.get_submodule(name).register_forward_hook(_restricted(entry.keep)))
        for reader in entry.site.readers:
            hook = _held(reader.first, entry.removed, means[reader.key])
            handles.append(model.get_submodule(reader.layer).register_forward_pre_hook(hook))
        if entry.site.readers:
            continue
        for name, places in entry.site.places:
            rows = [places[index] for index in entry.removed]
            handles.append(model.get_submodule(name).register_forward_hook(_silenced(rows)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def norms_of(model: nn.Module, site: Site) -> set[str]:
    """Return the norms over a site's channels: LayerNorm modules, and GRN by its bare parameters."""
    inner = {name for name in site.inner if isinstance(model.get_submodule(name), nn.LayerNorm)}
    return inner | {name.rpartition(".")[0] for name in site.parameters}


def _held(first: int, removed: tuple[int, ...], means: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        hidden = args[0].movedim(channel_dim(module), -1).clone()
        hidden[..., [first + channel for channel in removed]] = means[list(removed)]
        return (hidden.movedim(-1, channel_dim(module)),)

    return hook


def _silenced(rows: list[int]) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        changed = output.movedim(channel_dim(module), -1).clone()
        changed[..., rows] = 0
        return changed.movedim(-1, channel_dim(module))

    return hook


def _restricted(keep: tuple[int, ...]) -> Any:
    """Return a hook that computes a norm over the kept channels alone; the others keep their dense output."""

    def hook(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        kept, weight = list(keep), module.weight.flatten()[list(keep)]
        bias = None if module.bias is None else module.bias.flatten()[kept]
        # timm's GRN behind convolutions alone has its channels first.
        dim = getattr(module, "channel_dim", -1)
        values = args[0].movedim(dim, -1)[..., kept]
        if isinstance(module, nn.LayerNorm):
            normed = F.layer_norm(values, (len(kept),), weight, bias, module.eps)
        else:
            energy = values.square().sum((1, 2), keepdim=True).sqrt()
            normed = values + weight * values * energy / (energy.mean(-1, keepdim=True) + 1e-6) + bias
        changed = output.movedim(dim, -1).clone()
        changed[..., kept] = normed
        return changed.movedim(-1, dim)

    return hook


# Hidden channels


@over(PRUNABLE)
def test_all_sites_are_found(entry: Architecture) -> None:
    case = prepared(entry)
    assert len(case.sites) == entry.sites
    assert sum(not site.exact for site in case.sites) == entry.inexact
    assert {site.kind for site in case.sites} == {"mlp"}
    check_prunable(case.model, case.sites, case.images[:1])


@over(PRUNABLE)
def test_pruning_equals_clamping_to_the_means(entry: Architecture) -> None:
    case = prepared(entry)
    # A global plan may spare a site; this one spares none, and leaves so little that a wrong order shows.
    deep = make_plan(case.sites, case.scores, keep_ratio=0.1, scope="per_layer")
    assert all(planned.removed for planned in deep.sites)
    dense = logits(case.model, case.images)
    assert dense.isfinite().all()
    for plan in (case.plan, deep):
        with clamped(case.model, plan, case.statistics.means):
            expected = logits(case.model, case.images)
        torch.testing.assert_close(logits(case.pruned(plan), case.images), expected, rtol=1e-10, atol=1e-10)
        # The test would see a plan that does nothing, and a forgotten compensation.
        size = float(expected.abs().max())
        assert (expected - dense).abs().max() > 1e-4 * size
        bare = copy.deepcopy(case.model)
        prune_(bare, plan)
        assert (expected - logits(bare, case.images)).abs().max() > 1e-3 * size


@over(PRUNABLE)
def test_a_pruned_model_trains(entry: Architecture) -> None:
    case = prepared(entry)
    missing = without_gradient(case.pruned(), case.images)
    # A layer that no logit depends on has no gradient in the dense model either.
    assert not missing or missing <= without_gradient(copy.deepcopy(case.model), case.images)


def without_gradient(model: nn.Module, images: Tensor) -> set[str]:
    """Run one training step; name the weights whose gradient is missing or zero throughout."""
    missing = set()
    torch.manual_seed(0)  # stochastic depth drops the same blocks of every model
    logits_of(model.train()(images)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous()
        gradient = parameter.grad
        if gradient is not None:
            assert gradient.shape == parameter.shape
            assert gradient.isfinite().all()
        if parameter.ndim > 1 and (gradient is None or not gradient.any()):
            missing.add(name)
    return missing


@over(PRUNABLE)
def test_cost_falls_as_planned(entry: Architecture) -> None:
    case = prepared(entry)
    pruned, example = case.pruned(), case.images[:1]
    promise = plan_cost(case.model, case.plan, example)
    before, after = promise.macs
    assert before == count_macs(case.model, example)
    assert after == count_macs(pruned, example) < before
    assert promise.params[0] == count_parameters(case.model)
    # By hand, and with the biases that the compensation adds.
    gained = sum(
        parameter.numel()
        for name, parameter in pruned.named_parameters()
        if name not in dict(case.model.named_parameters())
    )
    assert promise.params[1] == count_parameters(pruned) - gained
    cut = sum(len(entry.removed) * channel_parameters(case.model, entry.site) for entry in case.plan.sites)
    # A layer between two sites loses rows and columns, which the count by hand would take twice where they cross.
    read = {reader.layer for site in case.sites for reader in site.readers}
    if not read & {name for site in case.sites for name in site.producers}:
        assert promise.params[0] - promise.params[1] == cut


def channel_parameters(model: nn.Module, site: Site) -> int:
    """Count the parameters that belong to one hidden channel: rows, columns, and what norms hold for it."""
    owned = 0
    for name in (*site.producers, *site.inner):
        layer = model.get_submodule(name)
        for parameter in (layer.weight, layer.bias):
            owned += 0 if parameter is None else parameter[0].numel()
    columns = sum(model.get_submodule(reader.layer).weight[:, 0].numel() for reader in site.readers)
    return owned + columns + len(site.parameters)


def dense_model(entry: Architecture, images: Tensor) -> tuple[nn.Module, ModelSource | None]:
    """Return a float32 model with noticeable weights, and what builds it again where a library does."""
    if entry.library == "timm" and entry.build_by_hand is None:
        arguments = {**entry.arguments, "num_classes": CLASSES}
        classifier = load_classifier(entry.name, allow_random_init=True, model_kwargs=arguments)
        return noticeable_(entry.split_(classifier.model), images), classifier.source
    model = noticeable_(entry.build(), images)
    if entry.library == "transformers":
        name = type(model).__name__
        return model, ModelSource("transformers", name, {**model.config.to_dict(), "architectures": [name]})
    return model, None


def assert_comes_back(entry: Architecture, attention: bool, file: Path) -> None:
    """Prune a model, save it, and load it from the file alone, or into a fresh model where it does not suffice."""
    images = entry.images(2, torch.float32)
    model, source = dense_model(entry, images)
    sites = entry.find(model, images, attention=attention)
    statistics = collect_statistics(model, sites, [images])
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.6)
    prune_(model, plan, statistics.means)
    save_pruned(model, file, plans=plan, source=source)
    loaded = load_pruned(file) if source is not None else load_pruned(file, model=entry.build())
    state = model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(logits(loaded, images), logits(model, images))


@over(PRUNABLE)
def test_a_saved_model_comes_back_bit_equal(entry: Architecture, tmp_path: Path) -> None:
    assert_comes_back(entry, attention=False, file=tmp_path / "m.pth")


# Attention


@over(ATTENTION)
def test_pruned_attention_equals_clamped_values_and_silent_queries(entry: Architecture) -> None:
    case = prepared(entry, attention=True)
    kinds = [site.kind for site in case.sites]
    assert kinds.count("value") == entry.attention
    assert kinds.count("query_key") == (0 if entry.values_alone else entry.attention)
    assert kinds.count("mlp") == entry.sites
    check_prunable(case.model, case.sites, case.images[:1])
    with clamped(case.model, case.plan, case.statistics.means):
        expected = logits(case.model, case.images)
    pruned = case.pruned()
    torch.testing.assert_close(logits(pruned, case.images), expected, rtol=1e-10, atol=1e-10)
    for planned in case.plan.sites:
        assert len(set(channels_per_head(planned))) == 1
    promise = plan_cost(case.model, case.plan, case.images[:1])
    alone = plan_cost(case.model, prepared(entry).plan, case.images[:1])
    assert promise.macs[1] == count_macs(pruned, case.images[:1]) < alone.macs[1]


@over(ATTENTION)
def test_the_principal_basis_of_attention_changes_no_logit(entry: Architecture) -> None:
    """Of every attention that can be pruned."""
    case = prepared(entry, attention=True)
    sites = [site for site in case.sites if site.kind != "mlp"]
    assert all(site.rotatable for site in sites)
    statistics = collect_statistics(case.model, sites, [case.images], covariance=True)
    turned = copy.deepcopy(case.model)
    whole = [SitePlan(site, tuple(range(site.hidden)), "principal") for site in sites]
    rotate_(turned, whole, statistics.means, statistics.covariances)
    torch.testing.assert_close(logits(turned, case.images), logits(case.model, case.images), rtol=0, atol=1e-10)
    plan = make_plan(case.sites, case.scores, keep_ratio=1.0, attn_keep_ratio=0.5, attn_basis="principal")
    pruned = copy.deepcopy(case.model)
    every = collect_statistics(case.model, case.sites, [case.images], covariance=True)
    prune_(pruned, plan, every.means, every.covariances)
    assert logits(pruned, case.images).isfinite().all()
    assert count_macs(pruned, case.images[:1]) == plan_cost(case.model, plan, case.images[:1]).macs[1]


def channels_per_head(planned: SitePlan) -> list[int]:
    """Count the kept channels of each head."""
    if planned.site.kind == "mlp":
        return [len(planned.keep)]
    size = planned.site.hidden // planned.site.heads
    return torch.bincount(torch.tensor(planned.keep) // size, minlength=planned.site.heads).tolist()


@over(ATTENTION)
def test_a_model_with_pruned_attention_trains(entry: Architecture) -> None:
    case = prepared(entry, attention=True)
    missing = without_gradient(case.pruned(), case.images)
    assert not missing or missing <= without_gradient(copy.deepcopy(case.model), case.images)


@over(ATTENTION)
def test_a_saved_model_with_pruned_attention_comes_back(entry: Architecture, tmp_path: Path) -> None:
    assert_comes_back(entry, attention=True, file=tmp_path / "m.pth")


@over(WITHOUT_ATTENTION)
def test_attention_is_refused_by_name(entry: Architecture) -> None:
    model, example = entry.build(), entry.images(1, torch.float32)
    kind = type(model).__name__
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        InputError, match=f"no prunable attention in {kind}: looked for query, key and value"
    ) as caught:
        entry.find(model, example, attention=True)
    needs_width = "does not run with fewer channels in its heads" in str(caught.value)
    assert needs_width == (WRITTEN_WIDTH in str(entry.attention))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# Refusals and documents


@over(REFUSED)
def test_a_model_without_sites_is_refused_by_name(entry: Architecture) -> None:
    model = entry.build()
    with pytest.raises(InputError, match=f"no prunable site in {type(model).__name__}: looked for a Linear or 1x1"):
        entry.find(model, entry.images(1, torch.float32))


def test_every_architecture_has_its_own_name() -> None:
    assert len({entry.label for entry in ARCHITECTURES}) == len(ARCHITECTURES)
    assert all(bool(entry.sites) != bool(entry.refusal) for entry in ARCHITECTURES)


@over(list(ARCHITECTURES))
def test_the_document_says_what_is_found(entry: Architecture) -> None:
    document = Path(__file__).parents[2] / "docs" / "architectures.md"
    assert f"| {' | '.join(entry.cells())} |" in document.read_text(encoding="utf-8")
