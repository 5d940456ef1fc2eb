"""The refit of a kernel from moments: against least squares on the patches themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vbp import InputError
from vbp.method.patch_fit import PatchMoments, fit_patches

_RANDOM = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_RANDOM, dtype=torch.float64)


def moments(patches: Tensor, outputs: Tensor, weight: Tensor) -> PatchMoments:
    total = PatchMoments.zero(weight)
    for read, wanted in zip(patches.split(100), outputs.split(100), strict=True):
        total.add_(PatchMoments.of(read, wanted, weight))
    return total


def test_many_patches_give_the_layer_that_made_the_outputs() -> None:
    patches, made, start = normal(20_000, 6) + 3, normal(4, 7), normal(4, 7)
    outputs = patches @ made[:, :-1].T + made[:, -1] + 0.1 * normal(20_000, 4)
    fit = fit_patches(
        moments(patches[:10_000], outputs[:10_000], start), moments(patches[10_000:], outputs[10_000:], start)
    )
    assert fit.change is not None
    torch.testing.assert_close(start + fit.change, made, atol=0.05, rtol=0)
    variance = outputs[10_000:].var(0, correction=0).sum()
    found = outputs[10_000:] - torch.cat([patches[10_000:], torch.ones(10_000, 1)], 1) @ (start + fit.change).T
    assert fit.after == pytest.approx(float(found.square().sum(1).mean() / variance), rel=1e-9)
    assert fit.after < 0.01 < fit.before


def test_the_fit_is_the_ridge_regression_of_what_the_layer_lacks() -> None:
    patches, outputs, weight = normal(500, 3) * torch.tensor([1.0, 2, 3]) + 1, normal(500, 2), normal(2, 4)
    both = moments(patches, outputs, weight)
    change = fit_patches(both, both).change
    assert change is not None
    lacks = outputs - patches @ weight[:, :-1].T - weight[:, -1]
    centred, level = patches - patches.mean(0), lacks.mean(0)
    penalty = 3 / 500 * (centred.square().mean(0) + 1e-6 * centred.square().mean(0).median())
    slope = torch.linalg.solve(centred.T @ centred / 500 + penalty.diag(), centred.T @ (lacks - level) / 500).T
    torch.testing.assert_close(change, torch.cat([slope, (level - slope @ patches.mean(0))[:, None]], 1))


def test_nothing_changes_where_held_out_patches_say_that_it_harms() -> None:
    weight = normal(2, 31)
    noise = moments(normal(60, 30), normal(60, 2), torch.zeros_like(weight))
    other = normal(500, 30)
    exact = moments(other, other @ weight[:, :-1].T + weight[:, -1], weight)
    nearly = moments(other, other @ weight[:, :-1].T + weight[:, -1] + 0.1 * normal(500, 2), weight)
    assert fit_patches(noise, nearly).change is None
    assert fit_patches(noise, exact).change is None
    assert fit_patches(PatchMoments.zero(weight), nearly).change is None


def test_values_that_are_not_finite_are_an_error() -> None:
    patches, weight = normal(50, 3), normal(2, 4)
    good = moments(patches, normal(50, 2), weight)
    patches[3, 1] = torch.inf
    with pytest.raises(InputError, match="not finite"):
        fit_patches(moments(patches, normal(50, 2), weight), good)
