"""Costs: MACs by the paper's convention, and a plan's promise kept to the last parameter."""

from __future__ import annotations

import pytest
import timm
import torch
from families import Family
from torch import nn

from vbp import (
    collect_statistics,
    count_macs,
    count_parameters,
    find_sites,
    format_plan,
    make_plan,
    plan_cost,
    prune_,
    variance_scores,
)


@pytest.mark.parametrize(
    ("name", "gmacs", "mparams"),
    # As the paper's tables (and timm's and fvcore's) give them.
    [
        ("deit_tiny_patch16_224", 1.26, 5.72),
        ("convnext_tiny", 4.47, 28.59),
        ("deit_small_patch16_224", 4.61, 22.05),
    ],
)
def test_published_figures_of_dense_models(name: str, gmacs: float, mparams: float) -> None:
    model = timm.create_model(name)
    assert round(count_macs(model, torch.zeros(1, 3, 224, 224)) / 1e9, 2) == gmacs
    assert round(count_parameters(model) / 1e6, 2) == mparams


def test_macs_of_a_model_counted_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(2), nn.LayerNorm(16), nn.Linear(16, 5))
    by_hand = 16 * 8 * 3 * 9 + 5 * 8 * 16 + 8 * 16 * 5
    assert count_macs(model, torch.zeros(3, 3, 4, 4)) == by_hand


def test_a_plan_saves_what_it_says(family: Family) -> None:
    model, images = family.build(), family.example(2, torch.float32)
    sites = find_sites(model, images[:1])
    statistics = collect_statistics(model, sites, [images])
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.5)
    cost = plan_cost(model, plan, images[:1])
    assert cost.macs[0] == count_macs(model, images[:1]) == count_macs(model, images)
    prune_(model, plan, statistics.means)
    assert (cost.macs[1], cost.params[1]) == (count_macs(model, images), count_parameters(model))
    assert cost.macs[1] < cost.macs[0]


def test_a_plan_can_be_read_before_it_is_applied(vit: nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    sites = find_sites(vit, images)
    scores = variance_scores(collect_statistics(vit, sites, [images]))
    plan = make_plan(sites, scores, keep_ratio=0.6, round_to=16)
    text = format_plan(plan, plan_cost(vit, plan, images[:1]))
    for name, (kept, total) in plan.widths.items():
        assert any(name in line and f"{kept} of {total}" in line for line in text.splitlines())
    assert f"asked for {plan.requested}: {plan.kept - plan.requested:+d} through round_to 16" in text
    assert "MACs" in text
    equal = make_plan(sites, scores, keep_ratio=0.604, scope="equal")
    assert "asked for 155: -1 through equal widths, round_to 1" in format_plan(
        equal, plan_cost(vit, equal, images[:1])
    )
    exact = make_plan(sites, scores, keep_ratio=0.5)
    assert "asked for" not in format_plan(exact, plan_cost(vit, exact, images[:1]))


def test_attention_that_torch_fuses_is_counted_like_its_twin_of_timm() -> None:
    """Kin to reports of FLOP counters that see no `nn.MultiheadAttention` in evaluation: 11.3 G for 17.6 G."""
    torchvision = pytest.importorskip("torchvision")
    for heads, dim in ((4, 32), (2, 16)):
        fused = torchvision.models.VisionTransformer(32, 8, 2, heads, dim, 2 * dim, num_classes=5)
        twin = timm.models.VisionTransformer(
            32, 8, num_classes=5, embed_dim=dim, depth=2, num_heads=heads, mlp_ratio=2
        )
        image = torch.zeros(1, 3, 32, 32)
        assert count_macs(fused, image) == count_macs(fused, image.repeat(3, 1, 1, 1)) == count_macs(twin, image)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("weights", [True, False])
def test_attention_alone_is_counted_once(weights: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            mixed: torch.Tensor = self.attention(tokens, tokens, tokens, need_weights=weights)[0]
            return mixed

    projections, products = 4 * 7 * 16 * 16, 2 * 7 * 7 * 16
    assert count_macs(Attention(), torch.zeros(2, 7, 16)) == projections + products


def test_a_plan_saves_in_an_encoder_of_torch_what_its_layers_lose() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.encoder(tokens).mean(1))
            return logits

    model, tokens = Encoder(), torch.randn(4, 7, 16)
    sites = find_sites(model, tokens)
    plan = make_plan(sites, variance_scores(collect_statistics(model, sites, [tokens])), keep_ratio=0.5)
    cost = plan_cost(model, plan, tokens)
    assert cost.macs[0] - cost.macs[1] == 2 * 7 * 16 * (64 - plan.kept) == 2 * 7 * 16 * 32
