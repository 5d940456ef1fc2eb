"""Pruning inside attention: as many channels in every head, the original softmax scale, the residual stream whole."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, Family, randomise_
from named_attention import ATTENTION_NAMES, named_transformer
from oracles import clamped_logits
from torch import Tensor, nn

from vbp import (
    InputError,
    PruningPlan,
    Site,
    SitePlan,
    Statistics,
    collect_statistics,
    count_macs,
    count_parameters,
    find_sites,
    load_pruned,
    make_plan,
    plan_cost,
    prune_,
    save_pruned,
    variance_scores,
)
from vbp.pruning.surgery import check_prunable
from vbp.runtime.forward import logits_of

WITH_ATTENTION = ["timm-vit", "timm-deit", "timm-swin", "hf-vit", "hf-deit", "hf-swin"]


def prepared(family: Family, **ratios: float) -> tuple[nn.Module, Tensor, Statistics, PruningPlan]:
    """Return a float64 model, images, statistics and a plan that includes attention."""
    model = randomise_(family.build()).double().eval()
    images = family.example(3)
    sites = find_sites(model, images[:1], attention=True)
    statistics = collect_statistics(model, sites, [images])
    ratios = {"keep_ratio": 0.6, "attn_keep_ratio": 0.5, **ratios}
    return model, images, statistics, make_plan(sites, variance_scores(statistics), **ratios)  # type: ignore[arg-type]


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits without gradients."""
    with torch.no_grad():
        return logits_of(model(images))


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_every_attention_is_found_once(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().double()
    sites = find_sites(model, family.example(1), attention=True)
    kinds = [site.kind for site in sites]
    assert kinds.count("value") == kinds.count("query_key") == kinds.count("mlp") == family.sites
    assert len({site.name for site in sites}) == len(sites)
    assert all(site.kind == "mlp" for site in find_sites(model, family.example(1)))


class Between(nn.Module):
    """An attention with functions between its layers and the softmax, and before the projection."""

    def __init__(self, queries: Callable[[Tensor], Tensor], outputs: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.queries, self.outputs = queries, outputs

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(self.queries(query), key, value)
        return self.proj(self.outputs(mixed).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("function", "free"),
    [
        (lambda x: x, True),
        (lambda x: 2 * x / 3, True),
        (lambda x: -x.clone(), True),
        (lambda x: x + x.mean(2, keepdim=True), True),
        (lambda x: x + 1.0, False),
        (lambda x: 1.0 - x, False),
        (lambda x: x + torch.ones(2, 3, 1)[:1, :1], False),
        (lambda x: torch.div(2.0, x), False),
        (lambda x: x * x, False),
        (lambda x: x.abs(), False),
        (F.gelu, False),
        (lambda x: x - x.amax(2, keepdim=True), False),
    ],
)
def test_any_basis_serves_where_nothing_but_factors_and_sums_stands_between(
    function: Callable[[Tensor], Tensor], free: bool
) -> None:
    image = torch.randn(1, 3, 8)
    for queries, outputs, kinds in ((function, abs, (free, False)), (torch.clone, function, (True, free))):
        sites: tuple[Site, ...] = ()
        with contextlib.suppress(InputError):
            sites = find_sites(Between(queries, outputs), image, attention=True)
        if not sites:  # no weights of such queries make up for another scale of the softmax
            assert queries is function
            assert not free
            continue
        found = {site.kind: site.rotatable for site in sites if site.kind != "mlp"}
        assert found == {"query_key": kinds[0], "value": kinds[1]}


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_any_basis_serves_in_every_family(name: str) -> None:
    family = FAMILIES[name]
    sites = find_sites(family.build().double(), family.example(1), attention=True)
    assert all(site.rotatable is (site.kind != "mlp") for site in sites)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_heads_keep_the_same_number_and_the_model_runs(
    name: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIMM_FUSED_ATTN", "1" if fused else "0")
    model, images, statistics, plan = prepared(FAMILIES[name])
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    check_prunable(model, [entry.site for entry in plan.sites], images[:1])
    cost = plan_cost(model, plan, images[:1])
    for entry in plan.sites:
        size = entry.site.hidden // entry.site.heads
        counts = {sum(channel // size == head for channel in entry.keep) for head in range(entry.site.heads)}
        assert len(counts) == 1
    prune_(model, plan, statistics.means)
    assert logits(model, images).isfinite().all()
    assert (count_macs(model, images[:1]), count_parameters(model)) == (cost.macs[1], cost.params[1])
    assert cost.macs[1] < cost.macs[0]
    logits_of(model.train()(images)).sum().backward()
    for entry in plan.sites:
        for layer in entry.site.producers:
            assert model.get_submodule(layer).weight.grad is not None


def zeroed_logits(model: nn.Module, plan: PruningPlan, images: Tensor) -> Tensor:
    """Run the dense model with the rows of removed query and key channels set to zero."""
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for entry in plan.sites:
            for name, first in entry.site.rows:
                layer = zeroed.get_submodule(name)
                rows = [first + channel for channel in entry.removed]
                layer.weight[rows] = 0
                if layer.bias is not None:
                    layer.bias[rows] = 0
    return logits(zeroed, images)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_removal_equals_zeroed_channels_under_the_original_softmax_scale(name: str, fused: bool) -> None:
    model, images, statistics, plan = prepared(FAMILIES[name], keep_ratio=1.0)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    # Sites are found anew: only fused attention derives its scale from the number of channels.
    sites = find_sites(model, images[:1], attention=True)
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=1.0, attn_keep_ratio=0.5)
    expected = zeroed_logits(model, plan, images)
    prune_(model, plan)
    torch.testing.assert_close(logits(model, images), expected, rtol=1e-10, atol=1e-10)


def assert_scale_is_the_dense_models(model: nn.Module, images: Tensor) -> list[Site]:
    """Prune attention alone, compare with the dense model without the channels, and return the query/key sites."""
    sites = find_sites(model, images[:1], attention=True)
    statistics = collect_statistics(model, sites, [images])
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=1.0, attn_keep_ratio=0.5)
    expected, dense = zeroed_logits(model, plan, images), logits(model, images)
    prune_(model, plan)
    found = logits(model, images)
    torch.testing.assert_close(found, expected)
    assert float((found - dense).abs().max()) > 1e-4
    return [site for site in sites if site.kind == "query_key"]


_FOUR: dict[str, Any] = {"depths": [1] * 4, "num_attention_heads": [2] * 4, "mlp_ratios": [2] * 4}
_TWO: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
COMPUTED: dict[str, tuple[int, dict[str, Any]]] = {
    "Pvt": (32, {**_FOUR, "hidden_sizes": [16] * 4, "sequence_reduction_ratios": [1] * 4}),
    "Data2VecVision": (32, {**_TWO, "patch_size": 8}),
    "DonutSwin": (32, {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
    "MobileViT": (128, {"hidden_sizes": [16] * 3, "neck_hidden_sizes": [8] * 6 + [16], "num_attention_heads": 2}),
}


@pytest.mark.parametrize(("kind", "kernel"), [*((kind, "eager") for kind in COMPUTED), ("Data2VecVision", "sdpa")])
def test_a_scale_that_code_computes_from_the_head_size_stays_the_dense_models(kind: str, kernel: str) -> None:
    """Kin to reports of a softmax that changes when heads shrink: `math.sqrt(self.attention_head_size)`."""
    import transformers

    size, arguments = COMPUTED[kind]
    arguments = {**arguments, "attn_implementation": kernel} if kind == "Data2VecVision" else arguments
    config = getattr(transformers, f"{kind}Config")(image_size=size, num_labels=7, **arguments)
    model = randomise_(getattr(transformers, f"{kind}ForImageClassification")(config)).double().eval()
    found = assert_scale_is_the_dense_models(model, torch.randn(3, 3, size, size, dtype=torch.float64))
    assert all(site.implicit_scale for site in found)


class Scaled(nn.Module):
    """An attention whose softmax has a scale of one's choice."""

    def __init__(self, attend: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.proj, self.attend = nn.Linear(8, 24), nn.Linear(8, 8), attend
        self.d_k, self.scale, self.temperature = 4, 0.5, nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).reshape(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return (x + self.proj(self.attend(self, query, key, value).transpose(1, 2).flatten(2))).mean(1)


def _weighted(scores: Tensor, value: Tensor) -> Tensor:
    return scores.softmax(-1) @ value


SCALES: dict[str, tuple[bool, Callable[[Any, Tensor, Tensor, Tensor], Tensor]]] = {
    "queries first": (True, lambda m, q, k, v: _weighted(q / math.sqrt(q.shape[-1]) @ k.mT, v)),
    "both": (True, lambda m, q, k, v: _weighted((q * q.size(-1) ** -0.25) @ (k * k.size(-1) ** -0.25).mT, v)),
    "a power": (True, lambda m, q, k, v: _weighted(q @ k.mT * q.shape[-1] ** -0.5, v)),
    "a tensor": (True, lambda m, q, k, v: _weighted((q @ k.mT).div(torch.tensor(float(k.shape[-1])).sqrt()), v)),
    "given to the kernel": (
        True,
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(q.shape[-1])),
    ),
    "none given": (True, lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v)),
    "a number kept elsewhere": (False, lambda m, q, k, v: _weighted(q @ k.mT / math.sqrt(m.d_k), v)),
    "a number": (False, lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.5)),
    "a parameter": (False, lambda m, q, k, v: _weighted(q @ k.mT * m.temperature, v)),
    "kept": (False, lambda m, q, k, v: _weighted(q @ k.mT * m.scale, v)),
}


@pytest.mark.parametrize("kind", SCALES)
def test_whatever_expression_computes_the_scale_it_stays_the_dense_models(kind: str) -> None:
    implicit, attend = SCALES[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Scaled(attend)).double().eval()
    (site,) = assert_scale_is_the_dense_models(model, torch.randn(3, 5, 8, dtype=torch.float64))
    assert site.implicit_scale is implicit


def test_an_attention_that_depends_on_its_head_size_in_another_way_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Scaled(lambda m, q, k, v: _weighted(q @ k.mT / q.shape[-1] ** 2, v)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"behind 1.qkv is no site: what it computes depends in another way"):
        find_sites(model, torch.randn(3, 5, 8), attention=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_value_channels_are_compensated_like_any_other(name: str) -> None:
    """With queries and keys zeroed in both, the pruned model is the dense one with values clamped to their means."""
    model, images, statistics, plan = prepared(FAMILIES[name])
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for entry in plan.sites:
            if entry.site.kind == "query_key":
                for layer_name, first in entry.site.rows:
                    layer = silent.get_submodule(layer_name)
                    rows = [first + channel for channel in entry.removed]
                    layer.weight[rows] = 0
                    if layer.bias is not None:
                        layer.bias[rows] = 0
    consumers = PruningPlan(tuple(entry for entry in plan.sites if entry.site.consumer), plan.keep_ratio, plan.scope)
    expected = clamped_logits(silent, consumers, statistics.means, images)
    prune_(model, plan, statistics.means)
    torch.testing.assert_close(logits(model, images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_attributes_stay_true(name: str) -> None:
    model, _, statistics, plan = prepared(FAMILIES[name])
    prune_(model, plan, statistics.means)
    for entry in plan.sites:
        if entry.site.kind != "value":
            continue
        size = len(entry.keep) // entry.site.heads
        module = model.get_submodule(entry.site.producers[0].rpartition(".")[0])
        found = [getattr(module, attribute, None) for attribute in ("head_dim", "attention_head_size")]
        assert all(value in (None, size) for value in found)
        assert all(
            getattr(module, attribute, None) in (None, len(entry.keep)) for attribute in ("attn_dim", "all_head_size")
        )


@pytest.mark.parametrize("names", ATTENTION_NAMES)
def test_widths_are_known_under_all_their_names(names: tuple[str, str]) -> None:
    model, images = named_transformer(names)
    sites = find_sites(model, images[:1], attention=True)
    statistics = collect_statistics(model, sites, [images])
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.5)
    expected = zeroed_logits(model, plan, images)
    prune_(model, plan)
    assert [getattr(model.attn, name) for name in names] == [6, 12]
    assert model.attn.scale == 12**-0.5
    torch.testing.assert_close(logits(model, images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_the_residual_stream_keeps_its_width(name: str) -> None:
    model, _, statistics, plan = prepared(FAMILIES[name])
    before = {site.consumer: model.get_submodule(site.consumer).weight.shape[0] for site in _consumed(plan)}
    prune_(model, plan, statistics.means)
    assert before == {name: model.get_submodule(name).weight.shape[0] for name in before}


def _consumed(plan: PruningPlan) -> list[Site]:
    return [entry.site for entry in plan.sites if entry.site.consumer]


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_a_pruned_attention_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model, images, statistics, plan = prepared(family)
    prune_(model, plan, statistics.means)
    save_pruned(model, tmp_path / "m.pth", plans=plan)
    loaded = load_pruned(tmp_path / "m.pth", model=family.build().double())
    assert torch.equal(logits(loaded, images), logits(model, images))
    assert PruningPlan.from_dict(plan.to_dict()) == plan


def test_pruning_twice_composes() -> None:
    model, images, _statistics, plan = prepared(FAMILIES["timm-vit"], keep_ratio=1.0)
    first_scale = model.get_submodule("blocks.0.attn").scale
    prune_(model, plan)
    sites = find_sites(model, images[:1], attention=True)
    again = make_plan(
        sites, variance_scores(collect_statistics(model, sites, [images])), keep_ratio=1.0, attn_keep_ratio=0.5
    )
    expected = zeroed_logits(model, again, images)
    prune_(model, again)
    torch.testing.assert_close(logits(model, images), expected, rtol=1e-10, atol=1e-10)
    assert model.get_submodule("blocks.0.attn").scale == pytest.approx(first_scale * 2)


def test_query_and_key_channels_are_ranked_by_what_they_add_to_the_logits() -> None:
    model, images, statistics, _ = prepared(FAMILIES["timm-vit"])
    scores = variance_scores(statistics)["blocks.0.attn.qkv"]
    seen: list[Tensor] = []
    handle = model.get_submodule("blocks.0.attn.qkv").register_forward_hook(lambda *args: seen.append(args[2]))
    logits(model, images)
    handle.remove()
    query, key = seen[0][..., :32].reshape(-1, 32), seen[0][..., 32:64].reshape(-1, 32)
    torch.testing.assert_close(scores, query.square().mean(0) * key.square().mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("round_to", [1, 4])
def test_rounding_and_ratios_count_in_each_head(round_to: int) -> None:
    _, _, statistics, plan = prepared(FAMILIES["timm-vit"], attn_keep_ratio=0.6, round_to=round_to)
    kept = {len(entry.keep) for entry in plan.sites if entry.site.kind != "mlp"}
    assert kept == {2 * (10 if round_to == 1 else 8)}
    assert plan.total == 2 * 128
    for entry in plan.sites:
        if entry.site.kind == "value":
            score = variance_scores(statistics)[entry.site.name].reshape(2, 16)
            best = {
                head * 16 + int(index)
                for head in range(2)
                for index in score[head].topk(len(entry.keep) // 2).indices
            }
            assert set(entry.keep) == best


def test_an_unequal_number_in_the_heads_of_a_plan_is_refused() -> None:
    _, _, _, plan = prepared(FAMILIES["timm-vit"])
    data = plan.to_dict()
    entry = next(entry for entry in data["sites"] if entry["site"]["kind"] == "value")
    entry["keep"] = sorted({*entry["keep"][1:], 31, 30, 29})
    with pytest.raises(InputError, match="as many channels in each head"):
        PruningPlan.from_dict(data)


class Rotary(nn.Module):
    """An attention whose queries and keys are turned in pairs of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        angle = torch.linspace(0, 1, 4)
        query = query * angle.cos() + query.flip(-1) * angle.sin()
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "model",
    [
        Rotary(),
        nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    ],
    ids=["rotary", "none", "packed"],
)
def test_attention_that_cannot_be_pruned_is_refused(model: nn.Module) -> None:
    with pytest.raises(InputError, match=r"no prunable attention in .*looked for query, key and value layers"):
        find_sites(model, torch.randn(2, 3, 8), attention=True)


class WritesItsWidth(nn.Module):
    """An attention that reshapes to the width it was built with."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (query @ key.transpose(-2, -1) / math.sqrt(4)).softmax(-1)
        return self.proj((attention @ value).transpose(1, 2).reshape(x.shape))


def test_code_that_needs_its_width_is_found_out_before_anything_is_modified() -> None:
    model = nn.Sequential(nn.Linear(8, 8), WritesItsWidth())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"1.qkv is no site: the model does not run with fewer channels .*shape "):
        find_sites(model, torch.randn(2, 3, 8), attention=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_plan_keeps_entries_of_every_kind() -> None:
    site = Site(("a", "a"), "", 8, "query_key", (0, 8), heads=2, implicit_scale=True)
    plan = PruningPlan((SitePlan(site, (0, 1, 4, 5)),), 0.5, "global", attn_keep_ratio=0.5)
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    assert (plan.total, plan.kept) == (0, 0)


def test_distilled_and_registered_tokens_do_not_matter() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2,
                              reg_tokens=3, num_classes=4)  # fmt: skip
    sites = find_sites(model, torch.zeros(1, 3, 32, 32), attention=True)
    assert [site.kind for site in sites] == ["mlp", "value", "query_key"]


def test_a_model_of_attention_alone() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).mean(1))

    torch.manual_seed(0)
    model, images = Only().double(), torch.randn(2, 3, 8, dtype=torch.float64)
    sites = find_sites(model, images, attention=True)
    scores = variance_scores(collect_statistics(model, sites, [images]))
    for scope in ("global", "per_layer"):
        plan = make_plan(sites, scores, keep_ratio=0.5, scope=scope)  # type: ignore[arg-type]
        assert [len(entry.keep) for entry in plan.sites] == [4, 4]
    expected = zeroed_logits(model, plan, images)
    prune_(model, plan)
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
