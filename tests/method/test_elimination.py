"""Greedy elimination against the direct formula: every step is the cheapest there is, and costs what it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vbp import InputError
from vbp.method import elimination as module
from vbp.method.elimination import Elimination, eliminate
from vbp.method.ridge import as_matrix, reconstruction, ridge_coefficients, ridge_penalty


def random_site(hidden: int, out: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a covariance of some rank, its channels of different size, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, hidden, generator=generator, dtype=torch.float64)
    mixing *= 10 ** torch.linspace(-2, 2, hidden, dtype=torch.float64)
    return mixing.T @ mixing, torch.randn(out, hidden, generator=generator, dtype=torch.float64)


def direct_cost(covariance: Tensor, weight: Tensor, gone: list[int], ridge: float) -> float:
    """Solve the refit of a set from the beginning: its error, and the penalty that it pays."""
    removed = torch.tensor(sorted(gone))
    keep = torch.tensor([channel for channel in range(len(covariance)) if channel not in gone])
    matrix = as_matrix(weight)
    if not len(keep):
        return float(torch.trace(matrix @ covariance @ matrix.T))
    coefficients = ridge_coefficients(covariance, keep, removed, ridge)
    added = matrix[:, removed] @ coefficients
    paid = float((added.square() * ridge_penalty(covariance, ridge)[keep]).sum())
    return reconstruction("", covariance, weight, coefficients, keep, removed).refit + paid


def brute_force(covariance: Tensor, weight: Tensor, ridge: float, heads: int = 1) -> Elimination:
    """Try every channel at every step."""
    hidden = len(covariance)
    gone: list[int] = []
    costs = [0.0]
    while len(gone) < hidden:
        lost = [sum(channel * heads // hidden == head for channel in gone) for head in range(heads)]
        allowed = [
            channel
            for channel in range(hidden)
            if channel not in gone and lost[channel * heads // hidden] == min(lost)
        ]
        tried = {channel: direct_cost(covariance, weight, [*gone, channel], ridge) for channel in allowed}
        best = min(tried, key=lambda channel: tried[channel])
        gone.append(best)
        costs.append(tried[best])
    return Elimination(torch.tensor(gone), torch.tensor(costs, dtype=torch.float64))


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([(1, 1), (6, 1), (9, 1), (8, 2), (9, 3)]),
    st.integers(1, 5),
    st.integers(1, 11),
    st.sampled_from([1e-4, 1e-2, 1.0]),
    st.sampled_from([1, 3, 64]),
    st.integers(0, 2**31),
)
def test_every_step_is_the_cheapest(
    shape: tuple[int, int], out: int, rank: int, ridge: float, block: int, seed: int
) -> None:
    hidden, heads = shape
    covariance, weight = random_site(hidden, out, rank, seed)
    before, module._BLOCK = module._BLOCK, block
    try:
        found = eliminate(covariance, weight, ridge=ridge, heads=heads)
    finally:
        module._BLOCK = before
    expected = brute_force(covariance, weight, ridge, heads)
    energy = float(expected.cost[-1])
    assert sorted(found.order.tolist()) == list(range(hidden))
    torch.testing.assert_close(found.cost, expected.cost, rtol=1e-6, atol=1e-9 * energy)
    if rank >= hidden:  # otherwise channels tie at no cost at all
        assert found.order.tolist() == expected.order.tolist()


def test_blocks_change_nothing_on_a_larger_site() -> None:
    covariance, weight = random_site(150, 20, 400)
    found = eliminate(covariance, weight, ridge=1e-3)
    for count in (1, 63, 64, 65, 149):
        gone = found.order[:count].tolist()
        assert float(found.cost[count]) == pytest.approx(direct_cost(covariance, weight, gone, 1e-3), rel=1e-8)


def test_channels_that_cost_nothing_go_first() -> None:
    covariance, weight = random_site(8, 3, 20)
    covariance[5] = covariance[:, 5] = 0  # never varies
    weight[:, 2] = 0  # is not read
    found = eliminate(covariance, weight, ridge=1e-3)
    assert set(found.order[:2].tolist()) == {2, 5}
    assert abs(float(found.cost[2])) < 1e-12 * float(found.cost[-1])


def test_a_copy_goes_before_a_channel_of_smaller_effect() -> None:
    covariance = torch.eye(3, dtype=torch.float64)
    covariance[0, 1] = covariance[1, 0] = 1
    weight = torch.tensor([[5.0, 5.0, 1.0]], dtype=torch.float64)
    found = eliminate(covariance, weight, ridge=1e-6)
    assert int(found.order[0]) in (0, 1)
    assert int(found.order[1]) == 2


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 2)])
def test_a_kernel_counts_at_every_offset(kernel: tuple[int, ...]) -> None:
    covariance, _ = random_site(6, 1, 20)
    weight = torch.randn(4, 6, *kernel, generator=torch.Generator().manual_seed(0))
    found = eliminate(covariance, weight, ridge=1e-2)
    expected = brute_force(covariance, weight, 1e-2)
    assert found.order.tolist() == expected.order.tolist()
    torch.testing.assert_close(found.cost, expected.cost, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e-3, 10), min_size=1, max_size=30), st.integers(0, 2**31))
def test_sorted_scores_give_the_order_back(steps: list[float], seed: int) -> None:
    order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(seed))
    cost = torch.tensor([0.0, *steps], dtype=torch.float64).cumsum(0)
    scores = Elimination(order, cost).scores
    assert torch.equal(scores.argsort(stable=True), order)
    expected = cost.diff().cummax(0).values.clamp_min(0)
    torch.testing.assert_close(scores[order], expected, rtol=1e-12, atol=1e-300)


def test_what_is_no_covariance_is_one_error() -> None:
    covariance, weight = random_site(4, 2, 9)
    with pytest.raises(InputError, match=r"ridge must be in \(0, 1\], got 0"):
        eliminate(covariance, weight, ridge=0)
    with pytest.raises(InputError, match="not positive definite"):
        eliminate(-covariance, weight, ridge=1e-3)
    covariance[1, 2] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        eliminate(covariance, weight, ridge=1e-3)
