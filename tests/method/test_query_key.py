"""The logit refit against least squares over all pairs of a query and a key."""

from __future__ import annotations

import pytest
import timm
import torch
from families import FAMILIES, randomise_
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vbp import InputError, collect_statistics, find_sites, make_plan, prune_, variance_scores
from vbp.method.query_key import LogitRefit, logit_refit
from vbp.runtime.forward import logits_of

KEEP, REMOVED = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5])


def pairs(seed: int = 0, offset: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return correlated queries and keys of one head of six channels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(samples: int) -> Tensor:
        mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        return torch.randn(samples, 6, generator=generator, dtype=torch.float64) @ mixing + offset

    return draw(30), draw(40)


def fitted(query: Tensor, key: Tensor, ridge: float, bias: bool = True) -> LogitRefit:
    """Fit with the moments of these samples, over n."""
    second = torch.cov(query.T, correction=0) if bias else query.T @ query / len(query)
    mean = query.mean(0) if bias else torch.zeros(6, dtype=torch.float64)
    return logit_refit("s", second, mean, torch.cov(key.T, correction=0), KEEP, REMOVED, heads=1, ridge=ridge)


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_least_squares_fit_over_all_pairs(bias: bool) -> None:
    query, key = pairs()
    found = fitted(query, key, 1e-9, bias)
    centred = key - key.mean(0)
    lost = (query[:, REMOVED] @ centred[:, REMOVED].T).flatten()
    extended = (
        torch.cat([query[:, KEEP], torch.ones(len(query), 1, dtype=torch.float64)], 1) if bias else query[:, KEEP]
    )
    features = torch.einsum("na,mb->nmab", extended, centred[:, KEEP]).reshape(len(lost), -1)
    solution = torch.linalg.lstsq(features, lost[:, None]).solution.reshape(-1, 4)
    torch.testing.assert_close(found.turn.T, solution[:4], rtol=1e-5, atol=1e-6)
    if bias:
        torch.testing.assert_close(found.shift, solution[4], rtol=1e-5, atol=1e-6)
    residual = lost - (features @ solution.reshape(-1, 1))[:, 0]
    assert found.error.refit == pytest.approx(float(residual.square().mean()), rel=1e-5)
    assert found.error.mean_shift == pytest.approx(float(lost.square().mean()), rel=1e-9)
    assert found.error.energy == pytest.approx(float((query @ centred.T).square().mean()), rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(1e-6, 1), st.floats(-5, 5), st.booleans())
def test_never_worse_than_leaving_it_out(seed: int, ridge: float, offset: float, bias: bool) -> None:
    query, key = pairs(seed, offset)
    found = fitted(query, key, ridge, bias)
    centred = key - key.mean(0)
    lost = query[:, REMOVED] @ centred[:, REMOVED].T
    made_up = (query[:, KEEP] @ found.turn.T + found.shift) @ centred[:, KEEP].T
    assert found.error.refit == pytest.approx(float((lost - made_up).square().mean()), rel=1e-8, abs=1e-10)
    assert found.error.refit <= found.error.mean_shift * (1 + 1e-12)


def test_heads_do_not_meet() -> None:
    query, key = (torch.cat(two, 1) for two in zip(pairs(0), pairs(1), strict=True))
    keep, removed = torch.cat([KEEP, KEEP + 6]), torch.cat([REMOVED, REMOVED + 6])
    cov, other = torch.cov(query.T, correction=0), torch.cov(key.T, correction=0)
    both = logit_refit("s", cov, query.mean(0), other, keep, removed, heads=2, ridge=1e-3)
    parts = [fitted(*pairs(seed), 1e-3) for seed in range(2)]
    # The floor of the penalty comes from the typical variance of all channels: a millionth of the ridge.
    torch.testing.assert_close(both.turn, torch.block_diag(*(part.turn for part in parts)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both.shift, torch.cat([part.shift for part in parts]), rtol=1e-4, atol=1e-6)
    assert both.error.refit == pytest.approx(sum(part.error.refit for part in parts), rel=1e-4)


def test_a_query_layer_without_bias_stays_without() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, qkv_bias=False
    )
    model = randomise_(model).double().eval()
    images = FAMILIES["timm-vit"].example(4)
    sites = find_sites(model, images[:1], attention=True)
    statistics = collect_statistics(model, sites, [images], covariance=True)
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=1.0, attn_keep_ratio=0.5)
    errors = prune_(model, plan, statistics.means, statistics.covariances)
    assert len(errors) == 2
    assert model.get_submodule("blocks.0.attn.qkv").bias is None
    assert bool(logits_of(model(images)).isfinite().all())


def test_a_norm_on_the_queries_rules_it_out() -> None:
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, qk_norm=True
    )
    images = FAMILIES["timm-vit"].example(2, torch.float32)
    with pytest.raises(InputError, match="no prunable attention"):
        find_sites(model, images[:1], attention=True)
