"""The refit of producers: activations by value, the Gauss-Newton step, samples by weight, every family."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from pairs import Pair
from pairs_of_models import pruned_pair
from torch import Tensor, nn

from vbp import InputError, find_sites
from vbp.method import gauss_newton as module
from vbp.method.activations import ACTIVATIONS, find_activation, slope
from vbp.method.gauss_newton import HiddenLayers, MLPSample, fit_hidden
from vbp.method.sampling import RandomProbes, priority_sample
from vbp.refit.producers import refit_producers_
from vbp.runtime.session import Session
from vbp.sites.mlp import find_mlps
from vbp.statistics.mlp_samples import MLPSamples


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("place", range(len(ACTIVATIONS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_activation_is_known_by_its_values(place: int, dtype: torch.dtype) -> None:
    before = (3 * normal(2, 50, 20)).to(dtype)
    found = find_activation(before, ACTIVATIONS[place](before))
    assert found is ACTIVATIONS[place]
    at = before.double()
    numeric = (found(at + 1e-6) - found(at - 1e-6)) / 2e-6
    torch.testing.assert_close(slope(found, at), numeric, rtol=1e-4, atol=1e-4)


def test_what_mixes_channels_is_no_activation() -> None:
    before = normal(2, 50, 20)
    assert find_activation(before, F.gelu(F.layer_norm(before, (20,)))) is None
    assert find_activation(before, F.gelu(before) * normal(2, 50, 20, seed=1)) is None
    assert find_activation(before, F.gelu(before)[:, :25]) is None


def problem(positions: int = 400) -> tuple[HiddenLayers, MLPSample]:
    """Return an MLP of 6 hidden channels where the sample is of one of 9, and a sample with weights and a metric."""
    inputs, weights = normal(positions, 5), normal(positions, seed=1).abs() + 0.1
    up, down = normal(9, 6, seed=2), normal(4, 10, seed=3)
    outputs = F.gelu(F.pad(inputs, (0, 1), value=1.0) @ up.T) @ down[:, :-1].T + down[:, -1]
    metric = normal(4, 4, seed=4)
    layers = HiddenLayers(up[:6], torch.cat([down[:, :6], down[:, -1:]], 1))
    return layers, MLPSample(inputs, outputs, weights, metric @ metric.T, positions)


def squared(layers: HiddenLayers, sample: MLPSample) -> Tensor:
    """Return the error by its definition."""
    assert layers.hidden is not None
    hidden = F.gelu(F.pad(sample.inputs, (0, 1), value=1.0) @ layers.hidden.T)
    lacking = sample.outputs - hidden @ layers.consumer[:, :-1].T - layers.consumer[:, -1]
    metric = 0.5 * 4 / sample.metric.trace() * sample.metric + 0.5 * torch.eye(4, dtype=torch.float64)
    return (sample.weights * ((lacking @ metric) * lacking).sum(1)).sum() / sample.weights.sum()


def test_the_step_is_the_least_of_the_linearised_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEPS", 200)
    layers, sample = problem()
    assert layers.hidden is not None
    found = module._Problem(F.gelu, sample, 1e-9, 1e-9).change(layers.hidden, layers.consumer)

    def read(hidden: Tensor) -> Tensor:
        return F.gelu(F.pad(sample.inputs, (0, 1), value=1.0) @ hidden.reshape(6, 6).T)

    # With both layers free, by dense least squares on all their coefficients at once.
    flat = layers.hidden.flatten()
    bend = torch.autograd.functional.jacobian(lambda h: read(h) @ layers.consumer[:, :-1].T, flat)
    values = F.pad(read(flat), (0, 1), value=1.0)
    unit = torch.eye(4, dtype=torch.float64)
    other = torch.einsum("ph,oq->poqh", values, unit).flatten(2)
    mixed = 0.5 * 4 / sample.metric.trace() * sample.metric + 0.5 * unit
    root = torch.linalg.cholesky(mixed).T
    scale = sample.weights.sqrt()[:, None, None]
    design = (scale * torch.einsum("qo,pok->pqk", root, torch.cat([bend, other], 2))).flatten(0, 1)
    lacking = sample.outputs - values @ layers.consumer.T
    target = (scale[..., 0] * (lacking @ root.T)).flatten()
    best = torch.linalg.lstsq(design, target[:, None]).solution[: flat.numel(), 0]
    torch.testing.assert_close(found.flatten(), best, rtol=1e-3, atol=1e-3 * float(best.abs().max()))


def test_both_layers_together_do_more_than_the_consumer_alone() -> None:
    layers, sample = problem()
    fit = fit_hidden(layers, F.gelu, sample, ridge=0.01, damping=0.1)
    fitted, judging = sample.split()
    assert (fitted.images, judging.images) == (350, 50)
    assert float(squared(fit.layers, judging) / squared(layers, judging)) == pytest.approx(fit.after / fit.before)
    assert layers.hidden is not None
    read = F.gelu(F.pad(sample.inputs, (0, 1), value=1.0) @ layers.hidden.T)
    bare = MLPSample(read, sample.outputs, sample.weights, sample.metric, sample.images)
    alone = fit_hidden(HiddenLayers(None, layers.consumer), F.gelu, bare, ridge=0.01, damping=0.1)
    assert alone.layers.hidden is None
    assert fit.after < 0.8 * alone.after < 0.8 * alone.before == pytest.approx(0.8 * fit.before)


def test_what_does_not_help_on_other_images_is_not_done() -> None:
    layers, sample = problem(80)
    outputs = sample.outputs.clone()
    assert layers.hidden is not None
    hidden = F.gelu(F.pad(sample.inputs, (0, 1), value=1.0) @ layers.hidden.T)
    given = hidden @ layers.consumer[:, :-1].T + layers.consumer[:, -1]
    outputs[:70] += 5 * normal(70, 4, seed=9)  # noise to be learnt
    outputs[70:] = given[70:] + 0.01 * normal(10, 4, seed=8)  # where the layers are right already
    noisy = MLPSample(sample.inputs, outputs, sample.weights, sample.metric, 80)
    fit = fit_hidden(layers, F.gelu, noisy, ridge=0.01, damping=0.1)
    assert fit.layers is layers
    assert fit.after == fit.before


def test_sums_over_drawn_tokens_are_unbiased() -> None:
    sizes = (normal(1, 40).exp() ** 2).expand(20000, 40)
    values = normal(40, seed=1)
    uniform = 1 - torch.rand(sizes.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places, weights = priority_sample(sizes, uniform, 8)
    assert places.shape == weights.shape == (20000, 8)
    assert all(len(set(row.tolist())) == 8 for row in places[:50])
    sums = (weights * values[places]).sum(1)
    error = sums.std() / len(sums) ** 0.5
    assert abs(float(sums.mean() - (sizes[0] * values).sum())) < 4 * float(error)
    everything, own = priority_sample(sizes[:2, :5], uniform[:2, :5], 8)
    assert everything.tolist() == [list(range(5))] * 2
    assert torch.equal(own, sizes[:2, :5])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_mlps_come_nearer_to_the_dense_ones(name: str) -> None:
    model, pruned, sites, images = pruned_pair(FAMILIES[name])
    mlps = find_mlps(model, images[:1], sites)
    assert {mlp.site for mlp in mlps} == {site for site in sites if site.kind == "mlp"}
    untouched, dense = copy.deepcopy(pruned), copy.deepcopy(model.state_dict())
    samples = MLPSamples(model, sites, images[:1], [images[:20], images[20:]])
    done = refit_producers_(pruned, samples)
    assert done.images == samples.images == 32
    assert all(after <= before for before, after in done.errors.values())
    better = {name for name, (before, after) in done.errors.items() if after < before}
    assert better
    layers = {layer for site in sites if site.name in better for layer in (*site.producers, site.consumer)}
    changed = {
        key for key, value in pruned.state_dict().items() if not torch.equal(value, untouched.state_dict()[key])
    }
    assert changed <= {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    assert {key.rpartition(".")[0] for key in changed} >= {site.consumer for site in sites if site.name in better}
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for one in (model, pruned) for parameter in one.parameters())
    assert not images.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert f"{len(better)} of {len(done.errors)} sites" in done.sentence()


def test_samples_hold_what_mlps_read_and_give() -> None:
    model, _, sites, images = pruned_pair(FAMILIES["timm-vit"])
    samples = MLPSamples(model, sites, images[:1], [images])
    assert model.blocks[0].mlp.act is not None  # type: ignore[union-attr, index]
    for mlp in samples.mlps:
        sample = samples.samples[mlp.site.name]
        up, down = model.get_submodule(mlp.site.producers[0]), model.get_submodule(mlp.site.consumer)
        torch.testing.assert_close(sample.outputs, down(F.gelu(up(sample.inputs))).detach())
        assert len(sample.weights) == 32 * (len(sample.weights) // 32)
        assert bool((sample.weights > 0).all())
        torch.testing.assert_close(sample.metric, sample.metric.T)
    # In the last block nothing but the class token leads to the answer.
    last = samples.samples[samples.mlps[-1].site.name].weights.view(32, -1)
    assert bool((last.max(1).values > 0.7 * last.sum(1)).all())


def test_two_processes_fit_what_one_does() -> None:
    model, pruned, sites, images = pruned_pair(FAMILIES["timm-vit"])
    alone = copy.deepcopy(pruned)
    done = refit_producers_(alone, MLPSamples(model, sites, images[:1], [images]))
    barrier, slots = Barrier(2), [None, None]

    def work(rank: int, share: list[Tensor], first: int) -> tuple[Any, nn.Module]:
        mine, dense, processes = copy.deepcopy(pruned), copy.deepcopy(model), Pair(rank, barrier, slots)
        probes = RandomProbes(first=first)
        return refit_producers_(
            mine, MLPSamples(dense, sites, images[:1], share, probes=probes, session=Session(processes))
        ), mine

    for shares, firsts in (([[images[:15]], [images[15:]]], (0, 15)), ([[], [images]], (0, 0))):
        with ThreadPoolExecutor(2) as pool:
            (first, one), (second, other) = pool.map(work, range(2), shares, firsts)
        assert first == second
        assert first.images == done.images
        for name, errors in done.errors.items():
            assert first.errors[name] == pytest.approx(errors, rel=1e-7)
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(one.state_dict()[key], value)
            assert torch.equal(one.state_dict()[key], other.state_dict()[key])


class Gated(nn.Module):
    """An MLP whose hidden channels are products."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return found


def test_bad_input_is_refused() -> None:
    model, _, sites, images = pruned_pair(FAMILIES["timm-vit"])
    with pytest.raises(InputError, match="producers needs at least one image, got none"):
        MLPSamples(model, sites, images[:1], [])
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(InputError, match=r"site blocks\.\d\.mlp\.fc1 reads and returns.* must be finite"):
        MLPSamples(model, find_sites(model, images[:1]), images[:1] * 0, [images])
    gated, some = nn.Sequential(nn.Linear(4, 6), Gated(), nn.Linear(6, 3)), torch.randn(5, 4)
    with pytest.raises(InputError, match=r"needs an MLP of two layers .*, got Sequential, where there is none"):
        MLPSamples(gated, find_sites(gated, some[:1]), some[:1], [some])


def test_a_model_that_lost_nothing_stays_as_it_is() -> None:
    model, _, sites, images = pruned_pair(FAMILIES["timm-vit"])
    same = copy.deepcopy(model)
    done = refit_producers_(same, MLPSamples(model, sites, images[:1], [images]))
    assert done.errors == {}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in same.state_dict().items())


def test_a_convolution_of_one_position_may_be_read_by_a_linear_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 12, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()  # fmt: skip
    images = torch.randn(16, 3, 8, 8)
    (site,) = find_sites(model, images[:1])
    sample = MLPSamples(model, [site], images[:1], [images]).samples[site.name]
    with torch.no_grad():
        torch.testing.assert_close(sample.inputs, model[:3](images).flatten(1))
        torch.testing.assert_close(sample.outputs, model(images))
