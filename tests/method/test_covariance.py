"""Running covariances against `torch.cov` in float64, on data that breaks the naive formulas; sampled tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, randomise_
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import hidden_values, made_values
from torch import Tensor, nn

from vbp import InputError, Statistics, collect_statistics, find_sites
from vbp.method import covariance as module
from vbp.method.covariance import ChannelCovariance, RunningCovariance, covariance_bytes
from vbp.method.sampling import TokenSample, TokenSampler


def running(values: Tensor, sizes: list[int]) -> ChannelCovariance:
    """Feed batches one after the other, as a statistics pass does."""
    sums = RunningCovariance()
    for batch in values.split(sizes):
        sums.add_(batch)
    found = sums.finish()
    assert found is not None
    return found


def correlated(samples: int, hidden: int, mean: float, deviation: float) -> Tensor:
    """Return samples of correlated channels in float64."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    return mean + deviation * torch.randn(samples, hidden, generator=generator, dtype=torch.float64) @ mixing


def assert_matches(found: ChannelCovariance, values: Tensor, tolerance: float) -> None:
    """Compare with the two-pass float64 reference, each entry on the scale of its two deviations."""
    reference = torch.cov(values.double().T)
    scale = reference.diagonal().sqrt()
    assert found.count == values.shape[0]
    assert torch.equal(found.m2, found.m2.T)
    error = (found.covariance - reference) / (scale[:, None] * scale)
    assert float(error.abs().max()) < tolerance
    assert bool(((found.mean - values.double().mean(0)).abs() <= tolerance * (scale + found.mean.abs())).all())


@pytest.mark.parametrize(("mean", "deviation"), [(100.0, 1e-2), (0.0, 1.0), (-1e4, 1.0), (3.0, 1e3)])
def test_float32_with_a_mean_far_from_zero(mean: float, deviation: float) -> None:
    values = correlated(20_000, 7, mean, deviation).float()
    assert_matches(running(values, [3_000] * 6 + [1_999, 1]), values, 1e-6)


def test_a_mean_that_drifts_from_batch_to_batch() -> None:
    steps = torch.arange(10.0, dtype=torch.float64).repeat_interleave(500)[:, None]
    values = (50 * steps + correlated(5_000, 3, 0, 1)).float()
    assert_matches(running(values, [500] * 10), values, 2e-6)


def test_pieces_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_CHUNK", 40)
    values = correlated(93, 4, 5, 1)
    assert_matches(running(values, [93]), values, 1e-13)


def test_blocks_of_channels_the_last_of_them_narrower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_BLOCK", 3)
    values = correlated(93, 8, 5, 1)
    assert_matches(running(values, [50, 43]), values, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_multiplied_in_float32_also_under_autocast(dtype: torch.dtype) -> None:
    values = correlated(5_000, 4, 8, 1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = running(values, [2_500] * 2)
    assert_matches(found, values, 2e-6)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**31), st.floats(-1e3, 1e3))
def test_any_grouping_gives_the_same_covariance(sizes: list[int], seed: int, mean: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = mean + torch.randn(sum(sizes) + 1, 3, generator=generator, dtype=torch.float64)
    parts = [running(batch, [len(batch)]) for batch in values.split([*sizes, 1])]
    left = parts[0]
    for part in parts[1:]:
        left = left.merge(part)
    right = parts[-1]
    for part in reversed(parts[:-1]):
        right = part.merge(right)
    for merged in (left, right, running(values, [*sizes, 1])):
        assert_matches(merged, values, 1e-10)


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(InputError, match="at least 2 samples, got 1"):
        _ = running(torch.ones(1, 2), [1]).covariance


def test_packing_loses_nothing() -> None:
    found = running(correlated(50, 6, 1, 1), [20, 30])
    packed = found.packed()
    assert packed.shape == (21,)
    assert torch.equal(ChannelCovariance.unpacked(found.count, found.mean, packed).m2, found.m2)


def test_memory_is_known_before_the_pass() -> None:
    sums = RunningCovariance()
    sums.add_(torch.randn(9, 12))
    assert sums.mean is not None
    assert sums.m2 is not None
    assert covariance_bytes([12, 12]) == 2 * (sums.mean.nbytes + sums.m2.nbytes)


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin", "timm-convnext-conv", "hf-vit"])
def test_covariance_of_what_each_consumer_reads(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.build().double(), family.example(5)
    sites = find_sites(model, images[:1], attention="convnext" not in name)
    statistics = collect_statistics(model, sites, images.split([3, 2]), covariance=True)
    assert list(statistics.covariances) == list(statistics.moments)
    for site in sites:
        if site.consumer:
            rows = hidden_values(model, site.consumer, images).flatten(0, 1)
            assert_matches(statistics.covariances[site.name], rows, 1e-9)


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin", "hf-vit"])
def test_keys_are_taken_about_the_mean_of_their_image_or_window(name: str) -> None:
    family = FAMILIES[name]
    model, images = randomise_(family.build()).double(), family.example(5)
    sites = find_sites(model, images[:1], attention=True)
    whole = collect_statistics(model, sites, [images], covariance=True)
    parts = [collect_statistics(model, sites, part.split(2), covariance=True) for part in images.split([3, 2])]
    for site in sites:
        if site.kind != "query_key":
            continue
        (query, first), (key, second) = site.rows
        seen = [made_values(model, layer, images)[..., row : row + site.hidden] for layer, row in site.rows]
        assert (query == key) is ("timm" in name)
        assert (first, second) == ((0, site.hidden) if "timm" in name else (0, 0))
        for statistics in (whole, parts[0].merge(parts[1])):
            assert_matches(statistics.covariances[f"{site.name}#query"], seen[0].flatten(0, -2), 1e-9)
            keys = seen[1] - seen[1].mean(1, keepdim=True)
            assert_matches(statistics.covariances[f"{site.name}#key"], keys.flatten(0, -2), 1e-9)
            torch.testing.assert_close(statistics.means[f"{site.name}#key"], seen[1].flatten(0, -2).mean(0))


def test_a_share_of_the_tokens_is_the_same_for_any_batch_size_and_number_of_processes() -> None:
    family = FAMILIES["timm-vit"]
    model, images = family.build().double(), family.example(6)
    sites = find_sites(model, images[:1])
    tokens = TokenSample(0.3, seed=5)
    whole = collect_statistics(model, sites, [images], covariance=True, tokens=tokens)
    small = collect_statistics(model, sites, images.split([1, 2, 3]), covariance=True, tokens=tokens)
    ranks = [
        collect_statistics(
            model,
            sites,
            images[rank::2].split(2),
            covariance=True,
            tokens=TokenSample(0.3, seed=5, first=rank, step=2),
        )
        for rank in range(2)
    ]
    chosen = [token + 17 * image for image in range(6) for token in tokens.tokens(image, 17)]
    assert len(chosen) == 6 * 6
    for site in sites:
        rows = hidden_values(model, site.consumer, images).flatten(0, 1)
        for statistics in (whole, small, ranks[0].merge(ranks[1])):
            assert_matches(statistics.covariances[site.name], rows[chosen], 1e-12)
            torch.testing.assert_close(statistics.means[site.name], rows.mean(0), rtol=1e-10, atol=1e-12)


def test_sampled_tokens_differ_between_images_and_seeds() -> None:
    draws = [tuple(TokenSample(0.2, seed=seed).tokens(image, 100)) for seed in range(3) for image in range(3)]
    assert len(set(draws)) == 9
    assert {len(draw) for draw in draws} == {20}
    assert len(TokenSample(0.07).tokens(0, 100)) == 7
    assert TokenSample(0.01).tokens(0, 1) == [0]
    shares = torch.bincount(torch.tensor([token for i in range(400) for token in TokenSample(0.2).tokens(i, 10)]))
    assert shares.min() > 40  # every token has its chance: 80 expected of each


def test_values_that_mix_the_images_are_sampled_as_one() -> None:
    sampler = TokenSampler(TokenSample(0.5))
    sampler.begin(4)
    rows = torch.arange(10.0)[:, None]
    assert sampler.draw(rows).flatten().tolist() == TokenSample(0.5).tokens(0, 10)


@pytest.mark.parametrize("arguments", [{"fraction": 0.0}, {"fraction": 1.1}, {"seed": -1}, {"step": 0}])
def test_samples_out_of_range(arguments: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"must be (in|at least)"):
        TokenSample(**arguments)  # type: ignore[arg-type]


def test_files_keep_covariances(vit: nn.Module, tmp_path: Path) -> None:
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    sites = find_sites(vit, images[:1])
    statistics = collect_statistics(vit, sites, [images], covariance=True, tokens=TokenSample(0.5))
    statistics.save(tmp_path / "s")
    loaded = Statistics.load(tmp_path / "s")
    assert loaded.token_fraction == 0.5
    loaded.check_holds(sites, tmp_path / "s", covariance=True)
    for name, found in statistics.covariances.items():
        again = loaded.covariances[name]
        assert (again.count, again.mean.tolist()) == (found.count, found.mean.tolist())
        assert torch.equal(again.m2, found.m2)
    without = collect_statistics(vit, sites, [images])
    without.save(tmp_path / "w")
    plain = Statistics.load(tmp_path / "w")
    assert plain.covariances == {}
    plain.check_holds(sites, tmp_path / "w")
    with pytest.raises(InputError, match=r"must hold the covariance of blocks\.0\.mlp\.fc1 for the refit"):
        plain.check_holds(sites, tmp_path / "w", covariance=True)
    with pytest.raises(InputError, match="must all have covariances of the same share"):
        plain.merge(loaded)


def test_overflow_in_the_products_alone_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    images = torch.eye(2) * 1e30
    with pytest.raises(InputError, match="must be finite, got NaN or infinity in"):
        collect_statistics(model, find_sites(model, images), [images], covariance=True)


def test_a_regression_on_few_samples_is_regularised_as_they_ask_for() -> None:
    """Channels over samples, between the least penalty and the channels' own variance."""
    moments = lambda count: ChannelCovariance(count, torch.zeros(40), torch.eye(40))  # noqa: E731
    assert moments(10**6).ridge(0.01) == 0.01
    assert moments(1000).ridge(0.01) == 0.04
    assert moments(1000).ridge(0.01, groups=2) == 0.02
    assert moments(20).ridge(0.01) == 1.0


def test_few_samples_predict_new_ones_best_with_that_penalty() -> None:
    """Within a fifth of the best of many penalties, for a signal as strong as the noise, over many draws."""
    generator = torch.Generator().manual_seed(0)
    hidden, count, penalties = 40, 80, [0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
    errors = dict.fromkeys([*penalties, "rule"], 0.0)
    for _ in range(20):
        truth = torch.randn(hidden, generator=generator, dtype=torch.float64) / hidden**0.5
        read = torch.randn(count, hidden, generator=generator, dtype=torch.float64)
        wanted = read @ truth + torch.randn(count, generator=generator, dtype=torch.float64)
        gram, mean = read.T @ read / count, read.T @ wanted / count
        rule = ChannelCovariance(count, torch.zeros(hidden), gram).ridge(0.01)
        for name in errors:
            penalty = rule if name == "rule" else float(name)
            found = torch.linalg.solve(gram + penalty * torch.eye(hidden, dtype=torch.float64), mean)
            errors[name] += float((found - truth).square().sum())
    assert errors["rule"] <= 1.02 * min(errors.values())
    assert errors["rule"] < 0.7 * errors[0.01]
