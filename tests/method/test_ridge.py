"""The refit against least squares on the hidden values themselves, and against the dense model with predictions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from families import FAMILIES, Family, randomise_
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import hidden_values, made_values
from torch import Tensor, nn

from vbp import (
    InputError,
    PruningPlan,
    Site,
    Statistics,
    collect_statistics,
    find_sites,
    make_plan,
    prune_,
    variance_scores,
)
from vbp.method.covariance import ChannelCovariance
from vbp.method.ridge import (
    RIDGE,
    as_matrix,
    block_diagonal,
    fold_into_weight,
    reconstruction,
    ridge_coefficients,
    ridge_penalty,
)


def least_squares(rows: Tensor, keep: list[int], removed: list[int], ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Fit the removed columns to the kept ones and a constant with numpy, the ridge as further equations.

    Gives the slopes and the constants.
    """
    values = rows.numpy()
    weight = np.sqrt(ridge_penalty(torch.cov(rows.T), ridge).numpy()[keep] * (len(values) - 1))
    features = np.vstack([np.c_[values[:, keep], np.ones(len(values))], np.c_[np.diag(weight), np.zeros(len(keep))]])
    targets = np.vstack([values[:, removed], np.zeros((len(keep), len(removed)))])
    solution = np.linalg.lstsq(features, targets, rcond=None)[0]
    return torch.from_numpy(solution[:-1].T), torch.from_numpy(solution[-1])


def output_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return what a model makes of images, whatever its shape."""
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[no-any-return]


def predicted_logits(model: nn.Module, plan: PruningPlan, images: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """Run the dense model with the removed channels replaced by the fit from the kept ones."""
    handles = []
    for entry in plan.sites:
        if not entry.site.consumer or not entry.removed:
            continue
        keep, removed = list(entry.keep), list(entry.removed)
        seen = rows[entry.site.name]
        fit = least_squares(seen, keep, removed, max(RIDGE, min(1.0, seen.shape[1] / len(seen))))

        def replace(module: nn.Module, args: tuple[Tensor], keep=keep, removed=removed, fit=fit) -> tuple[Tensor]:  # type: ignore[no-untyped-def]
            dim = 1 if isinstance(module, nn.Conv2d) else -1
            hidden = args[0].movedim(dim, -1).clone()
            hidden[..., removed] = hidden[..., keep] @ fit[0].T + fit[1]
            return (hidden.movedim(-1, dim),)

        handles.append(model.get_submodule(entry.site.consumer).register_forward_pre_hook(replace))
    with torch.no_grad():
        logits = output_of(model, images)
    for handle in handles:
        handle.remove()
    return logits


def predict_queries_and_keys_(model: nn.Module, plan: PruningPlan, images: Tensor) -> None:
    """Replace removed query and key channels by the fit from those that stay in their head, from now on."""
    dense = copy.deepcopy(model)
    for entry in plan.sites:
        if entry.site.kind != "query_key":
            continue
        size = entry.site.hidden // entry.site.heads
        for (name, first), keys in zip(entry.site.rows, (False, True), strict=True):
            made = made_values(dense, name, images)[..., first : first + entry.site.hidden]
            rows = (made - made.mean(1, keepdim=True) if keys else made).flatten(0, -2)
            for head in range(entry.site.heads):
                keep, removed = (
                    [channel for channel in channels if channel // size == head]
                    for channels in (entry.keep, entry.removed)
                )
                fit = least_squares(rows, keep, removed)

                def replace(module, args, output, start=first, keep=keep, removed=removed, fit=fit):  # type: ignore[no-untyped-def]
                    output = output.clone()
                    kept = output[..., [start + channel for channel in keep]]
                    output[..., [start + channel for channel in removed]] = kept @ fit[0].T + fit[1]
                    return output

                model.get_submodule(name).register_forward_hook(replace)


def swiglu() -> nn.Module:
    """Return a small DINOv2 with packed SwiGLU."""
    model: nn.Module = timm.create_model(
        "vit_giant_patch14_dinov2", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=7
    )
    return model


def kernels() -> nn.Module:
    """Return a consumer with a 3x3 kernel that meets no padding."""
    return nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 4, 3, padding=1, padding_mode="circular"))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, bool]]] = {
    "linear and values": (FAMILIES["timm-vit"].build, {"attention": True}),
    "hf linear and values": (FAMILIES["hf-vit"].build, {"attention": True}),
    "swin": (FAMILIES["timm-swin"].build, {}),
    "1x1 convolution": (FAMILIES["timm-convnext-conv"].build, {}),
    "3x3 convolution": (kernels, {"convolutions": True}),
    "swiglu": (swiglu, {}),
}


def prepared(
    build: Callable[[], nn.Module], options: dict[str, bool], size: int
) -> tuple[nn.Module, Tensor, tuple[Site, ...], Statistics]:
    """Return a float64 model, images, sites and statistics with covariance."""
    model = randomise_(build()).double().eval()
    images = Family(build, size, 0).example(4)
    sites = find_sites(model, images[:1], **options)
    return model, images, sites, collect_statistics(model, sites, [images], covariance=True)


@pytest.mark.parametrize("case", list(CASES))
def test_the_refitted_model_is_the_dense_one_with_least_squares_predictions(case: str) -> None:
    build, options = CASES[case]
    model, images, sites, statistics = prepared(build, options, 64 if case in ("swin", "1x1 convolution") else 32)
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.6)
    rows = {site.name: hidden_values(model, site.consumer, images).flatten(0, 1) for site in sites if site.consumer}
    dense = copy.deepcopy(model)
    predict_queries_and_keys_(dense, plan, images)
    expected = predicted_logits(dense, plan, images, rows)
    shifted = copy.deepcopy(model)
    prune_(shifted, plan, statistics.means)
    errors = prune_(model, plan, statistics.means, statistics.covariances)
    with torch.no_grad():
        torch.testing.assert_close(output_of(model, images), expected, rtol=1e-8, atol=1e-8)
        assert not torch.allclose(output_of(shifted, images), expected, rtol=1e-3)
    assert [error.site for error in errors] == [e.site.name for e in plan.sites if e.removed]
    assert all(0 <= error.refit < error.mean_shift for error in errors)


def test_the_reported_error_is_that_of_the_consumers_output() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 9, generator=generator, dtype=torch.float64) @ torch.randn(9, 9, dtype=torch.float64) + 3
    model = nn.Sequential(nn.Identity(), nn.Linear(9, 5)).double()
    weight = model[1].weight.detach()
    keep, removed = torch.tensor([0, 2, 3, 7]), torch.tensor([1, 4, 5, 6, 8])
    cov = torch.cov(rows.T)
    fitted = ridge_coefficients(cov, keep, removed, 0.1)
    found = reconstruction("s", cov, weight, fitted, keep, removed)
    deviation = rows - rows.mean(0)
    after_refit = deviation[:, keep] @ fold_into_weight(weight, fitted, keep, removed).T
    for error, expected in (
        (found.refit, deviation @ weight.T - after_refit),
        (found.mean_shift, deviation[:, removed] @ weight[:, removed].T),
        (found.energy, deviation @ weight.T),
    ):
        assert error == pytest.approx(float(expected.var(0).sum()), rel=1e-10)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 12),
    st.integers(2, 20),
    st.floats(0, 6),
    st.floats(1e-9, 1),
    st.integers(0, 2**31),
    st.data(),
)
def test_never_worse_than_the_mean_shift(
    hidden: int, samples: int, decades: float, ridge: float, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(samples, hidden, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    rows *= 10 ** torch.linspace(-decades, decades, hidden, dtype=torch.float64)
    rows[:, torch.rand(hidden, generator=generator) < 0.2] = 4.0  # dead channels
    weight = torch.randn(3, hidden, generator=generator, dtype=torch.float64)
    permutation = torch.randperm(hidden, generator=generator)
    kept = data.draw(st.integers(1, hidden - 1))
    keep, removed = permutation[:kept].sort().values, permutation[kept:].sort().values
    cov = torch.cov(rows.T)
    fitted = ridge_coefficients(cov, keep, removed, ridge)
    assert bool(fitted.isfinite().all())
    found = reconstruction("s", cov, weight, fitted, keep, removed)
    # What is left of rounding, on the scale of what is subtracted.
    assert found.refit <= found.mean_shift * (1 + 1e-9) + 1e-13 * float(
        (weight.square() * cov.diagonal()).sum()
        + ((weight[:, removed] @ fitted).square() * cov.diagonal()[keep]).sum()
    )


def test_dead_channels_neither_predict_nor_are_predicted() -> None:
    cov = torch.zeros(4, 4, dtype=torch.float64)
    cov[:2, :2] = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    fitted = ridge_coefficients(cov, torch.tensor([0, 2]), torch.tensor([1, 3]), 1e-3)
    expected = torch.tensor([[1 / 2.002, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(fitted, expected, rtol=1e-8, atol=1e-12)
    nothing = ridge_coefficients(torch.zeros(3, 3), torch.tensor([0]), torch.tensor([1, 2]), 1e-3)
    assert torch.equal(nothing, torch.zeros(2, 1, dtype=torch.float64))


def test_a_massive_channel_does_not_drown_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    rows[:, 5] = rows[:, 4]
    keep, removed = torch.tensor([0, 1, 2, 4]), torch.tensor([3, 5])
    before = ridge_coefficients(torch.cov(rows.T), keep, removed, 1e-3)
    rows[:, 0] *= 1e8
    after = ridge_coefficients(torch.cov(rows.T), keep, removed, 1e-3)
    torch.testing.assert_close(after[:, 1:], before[:, 1:], rtol=1e-6, atol=1e-6)
    assert float(after[1, 3]) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("groups", [2, 6])
def test_groups_predict_within_themselves(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    cov, size = torch.cov(rows.T), 6 // groups
    keep, removed = torch.tensor([0, 2, 3, 4]), torch.tensor([1, 5])
    fitted = ridge_coefficients(block_diagonal(cov, groups), keep, removed, 1e-2)
    for place, channel in enumerate(removed.tolist()):
        inside = [other for other in keep.tolist() if other // size == channel // size]
        expected = torch.zeros(4, dtype=torch.float64)
        if inside:
            alone = ridge_coefficients(cov, torch.tensor(inside), torch.tensor([channel]), 1e-2)
            expected[[keep.tolist().index(other) for other in inside]] = alone[0]
        torch.testing.assert_close(fitted[place], expected, rtol=1e-6, atol=1e-9)


def test_one_kept_channel_and_fewer_samples_than_channels() -> None:
    model = nn.Sequential(nn.Linear(3, 20), nn.GELU(), nn.Linear(20, 2)).double()
    images = torch.randn(5, 3, dtype=torch.float64)
    sites = find_sites(model, images)
    statistics = collect_statistics(model, sites, [images], covariance=True)
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.05)
    assert len(plan.sites[0].keep) == 1
    (error,) = prune_(model, plan, statistics.means, statistics.covariances)
    assert error.refit < error.mean_shift
    assert bool(model(images).isfinite().all())


def test_the_mean_of_the_output_stays_whatever_the_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 2)).bfloat16()
    images = torch.randn(500, 3).bfloat16()
    sites = find_sites(model, images)
    statistics = collect_statistics(model, sites, [images], covariance=True)
    hidden = model[1](model[0](images)).double()
    dense = copy.deepcopy(model[2]).double()
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.5)
    prune_(model, plan, statistics.means, statistics.covariances)
    pruned = copy.deepcopy(model[2]).double()
    with torch.no_grad():
        mean, expected = pruned(hidden[:, plan.sites[0].keep]).mean(0), dense(hidden).mean(0)
    torch.testing.assert_close(mean, expected, rtol=0, atol=2e-3)  # one rounding of the bias to bfloat16


def test_what_cannot_be_refitted_leaves_the_model_untouched() -> None:
    model, _, sites, statistics = prepared(FAMILIES["timm-vit"].build, {}, 32)
    plan = make_plan(sites, variance_scores(statistics), keep_ratio=0.5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    last = statistics.covariances[sites[-1].name]
    broken = {**statistics.covariances, sites[-1].name: ChannelCovariance(last.count, last.mean, last.m2 * torch.nan)}
    absent = {sites[0].name: statistics.covariances[sites[0].name]}
    for covariances, means, ridge, message in (
        (broken, statistics.means, RIDGE, r"site blocks\.1\.mlp\.fc1: .* not finite"),
        (
            absent,
            statistics.means,
            RIDGE,
            r"covariance of site blocks\.1\.mlp\.fc1 must be of 128 channels, got none",
        ),
        (statistics.covariances, None, RIDGE, "covariances need the means"),
        (statistics.covariances, statistics.means, 0.0, "ridge must be in"),
    ):
        with pytest.raises(InputError, match=message):
            prune_(model, plan, means, covariances, ridge=ridge)
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_consumer_matrix_has_a_row_for_each_output_and_offset() -> None:
    weight = torch.randn(5, 4, 3, 2)
    assert torch.equal(as_matrix(weight)[1 * 6 + 2 * 2 + 1], weight[1, :, 2, 1].double())
