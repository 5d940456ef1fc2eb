"""Changes of basis inside attention: exact for any moments, and no directions are better."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vbp.method.principal import head_blocks, query_key_basis, value_basis

HEADS, SIZE, OUT = 2, 4, 9


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return random numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(seed: int = 0, *, rank: int = SIZE, scale: float = 1.0) -> Tensor:
    """Return random second moments of every head."""
    factor = draw(HEADS, SIZE, rank, seed=seed)
    return scale * factor @ factor.mT


def best_by_hand(matrix: Tensor, rank: int) -> Tensor:
    """Return what the best approximation of this rank leaves, from the singular values."""
    return torch.linalg.svdvals(matrix)[..., rank:].square().sum(-1)


def root(matrix: Tensor) -> Tensor:
    """Return the symmetric root."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT


@pytest.mark.parametrize("query_rank", [0, 2, SIZE])
@pytest.mark.parametrize("key_rank", [0, 1, SIZE])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_all_directions_together_change_no_logit(query_rank: int, key_rank: int, scale: float) -> None:
    """Also for moments without full rank: a dead head, a single token, keys that are all alike."""
    found = query_key_basis(moments(1, rank=query_rank, scale=scale), moments(2, rank=key_rank))
    torch.testing.assert_close(
        found.query.mT @ found.key, torch.eye(SIZE, dtype=torch.float64).expand(HEADS, -1, -1), rtol=0, atol=1e-10
    )
    assert bool((found.cost >= 0).all() and (found.cost.diff(dim=-1) <= 0).all())
    torch.testing.assert_close(found.query.norm(dim=-1), found.key.norm(dim=-1))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, SIZE - 1))
def test_no_logits_of_this_rank_are_nearer(seed: int, rank: int) -> None:
    """The error over all independent pairs is that of Eckart and Young, and the costs tell it."""
    query, key = moments(seed), moments(seed + 1)
    found = query_key_basis(query, key)
    lost = found.query[:, rank:].mT @ found.key[:, rank:]
    error = (query @ lost @ key @ lost.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(error, found.cost[:, rank:].sum(-1), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(error, best_by_hand(root(query) @ root(key), rank), rtol=1e-6, atol=1e-8)


def test_channels_by_hand_are_no_better() -> None:
    query, key = moments(3), moments(4)
    found = query_key_basis(query, key)
    for gone in torch.combinations(torch.arange(SIZE), 2):
        by_channels = (query[:, gone][:, :, gone] * key[:, gone][:, :, gone]).sum((-2, -1))
        assert bool((found.cost[:, 2:].sum(-1) <= by_channels).all())


@pytest.mark.parametrize("rank", [0, 2, SIZE])
@pytest.mark.parametrize("weight", ["full", "two alike", "zero", "few outputs"])
def test_all_value_directions_together_change_no_output(rank: int, weight: str) -> None:
    columns = draw(HEADS, 3 if weight == "few outputs" else OUT, SIZE)
    if weight == "two alike":
        columns[..., 1] = columns[..., 0]
    elif weight == "zero":
        columns[0] = 0
    found = value_basis(moments(1, rank=rank), columns)
    torch.testing.assert_close(found.columns @ found.value, columns, rtol=0, atol=1e-10)
    assert found.value.shape == (HEADS, SIZE, SIZE)
    assert found.columns.shape == columns.shape
    assert found.cost.shape == (HEADS, SIZE)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, SIZE - 1))
def test_no_values_of_this_rank_are_nearer(seed: int, rank: int) -> None:
    covariance, weight = moments(seed), draw(HEADS, OUT, SIZE, seed=seed + 1)
    found = value_basis(covariance, weight)
    lost = found.columns[..., rank:] @ found.value[:, rank:]
    error = (lost @ covariance @ lost.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(error, found.cost[:, rank:].sum(-1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(error, best_by_hand(weight @ root(covariance), rank), rtol=1e-6, atol=1e-7)


def test_a_direction_without_variance_goes_first() -> None:
    covariance = torch.diag(torch.tensor([2.0, 0.0, 1.0, 3.0], dtype=torch.float64)).expand(HEADS, -1, -1)
    found = value_basis(covariance, torch.eye(SIZE, dtype=torch.float64).expand(HEADS, -1, -1))
    assert found.cost[0].tolist() == pytest.approx([3, 2, 1, 0])
    assert found.value[0].abs().argmax(-1).tolist() == [3, 0, 2, 1]


def test_blocks_of_heads() -> None:
    matrix = draw(HEADS * SIZE, HEADS * SIZE)
    blocks = head_blocks(matrix, HEADS)
    assert torch.equal(torch.block_diag(*blocks)[:SIZE, :SIZE], matrix[:SIZE, :SIZE])
    assert torch.equal(blocks[1], matrix[SIZE:, SIZE:])
