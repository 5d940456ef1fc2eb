"""Channel moments against `torch.var` in float64, on data that breaks the naive formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vbp.method.moments import CPU_CHUNK, ChannelMoments, channel_moments


def running(values: Tensor, sizes: list[int]) -> ChannelMoments:
    """Feed batches one after the other, as a statistics pass does."""
    moments: ChannelMoments | None = None
    for batch in values.split(sizes):
        found = channel_moments(batch, None if moments is None else moments.mean)
        moments = found if moments is None else moments.merge(found)
    assert moments is not None
    return moments


def assert_matches(moments: ChannelMoments, values: Tensor, tolerance: float) -> None:
    """Compare with the two-pass float64 reference."""
    reference = values.double()
    assert moments.count == values.shape[0]
    torch.testing.assert_close(moments.mean, reference.mean(0), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(moments.variance, reference.var(0), rtol=tolerance, atol=0)


@pytest.mark.parametrize(("mean", "deviation"), [(100.0, 1e-2), (0.0, 1.0), (-1e4, 1.0), (3.0, 1e3)])
def test_float32_with_a_mean_far_from_zero(mean: float, deviation: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (mean + deviation * torch.randn(20_000, 7, generator=generator, dtype=torch.float64)).float()
    assert_matches(running(values, [3_000] * 6 + [2_000]), values, 2e-6)


def test_the_naive_formula_fails_where_ours_holds() -> None:
    values = (100 + 1e-2 * torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))).float()
    naive = values.square().mean(0) - values.mean(0).square()
    truth = values.double().var(0)
    assert ((naive - truth).abs() > truth).any()
    assert_matches(running(values, [20_000]), values, 2e-6)


def test_a_mean_that_drifts_from_batch_to_batch() -> None:
    steps = torch.arange(10.0, dtype=torch.float64).repeat_interleave(500)[:, None]
    noise = torch.randn(5_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = (50 * steps + noise).float()
    assert_matches(running(values, [500] * 10), values, 2e-6)


def test_constant_channels_have_variance_zero() -> None:
    values = torch.full((1_000, 3), 0.1)
    moments = running(values, [400, 600])
    assert torch.equal(moments.variance, torch.zeros(3, dtype=torch.float64))


def test_more_values_than_one_piece_of_the_cache() -> None:
    values = torch.randn(CPU_CHUNK // 5, 16, generator=torch.Generator().manual_seed(0)) + 5
    assert_matches(channel_moments(values), values, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    values = (torch.randn(10_000, 4, generator=torch.Generator().manual_seed(0)) + 8).to(dtype)
    assert_matches(running(values, [5_000] * 2), values, 5e-6)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**31), st.floats(-1e3, 1e3))
def test_any_grouping_gives_the_same_moments(sizes: list[int], seed: int, mean: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = mean + torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    parts = [channel_moments(batch) for batch in values.split(sizes)]
    left = parts[0]
    for part in parts[1:]:
        left = left.merge(part)
    right = parts[-1]
    for part in reversed(parts[:-1]):
        right = part.merge(right)
    whole = channel_moments(values)
    for merged in (left, right):
        assert merged.count == whole.count
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(merged.m2, whole.m2, rtol=1e-9, atol=1e-9)


def test_one_sample_has_no_variance() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        _ = channel_moments(torch.ones(1, 2)).variance


def test_leading_dimensions_and_layout_do_not_matter() -> None:
    images = torch.randn(4, 5, 6, 7, dtype=torch.float64)
    rows = images.movedim(1, -1)
    assert_matches(channel_moments(rows), rows.reshape(-1, 5), 1e-12)
    assert_matches(channel_moments(rows.contiguous()), rows.reshape(-1, 5), 1e-12)
