"""Sensitivities against autograd image by image; merged, saved, in other precisions."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import FAMILIES, randomise_
from torch import Tensor, nn

from vbp import InputError, Statistics, collect_statistics, find_sites
from vbp.method.sampling import RandomProbes, TokenSample
from vbp.runtime.forward import logits_of
from vbp.sites.site import Site


def collect(model: nn.Module, batches: list[Tensor], probes: RandomProbes = RandomProbes()) -> Statistics:  # noqa: B008
    """Collect all there is."""
    sites = find_sites(model, batches[0][:1])
    return collect_statistics(model, sites, batches, covariance=True, sensitivity=probes)


def weight_gradients(model: nn.Module, sites: tuple[Site, ...], image: Tensor, noise: Tensor) -> list[Tensor]:
    """Return "out hidden+1" gradients by each consumer's weight and bias, by autograd.

    Of the logits in the direction J'e, with J the derivative of 2 sqrt(p) of the answer: J'J is Fisher's.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    logits = logits_of(model(image))
    (2 * logits.softmax(-1).sqrt() * noise).sum().backward()
    layers = [model.get_submodule(site.consumer) for site in sites]
    return [torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1) for layer in layers]


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin", "timm-convnext-conv", "hf-convnext"])
def test_sums_are_those_of_sketched_weight_gradients(name: str) -> None:
    family = FAMILIES[name]
    model, images = randomise_(family.build()).double().eval(), family.example(3)
    every = find_sites(model, images[:1], attention="convnext" not in name)
    sites = tuple(site for site in every if site.consumer)
    found = collect_statistics(
        model, every, [images[:2], images[2:]], covariance=True, sensitivity=RandomProbes()
    ).sensitivities
    classes = logits_of(model(images)).shape[1]
    for place, site in enumerate(sites):
        one = found[site.name].recentred(torch.zeros(site.hidden, dtype=torch.float64))
        out = len(one.outputs)
        inputs, outputs = torch.zeros_like(one.inputs), torch.zeros_like(one.outputs)
        widest = [max(len(found[s.name].outputs) for s in sites), max(s.hidden for s in sites)]
        for image in range(3):
            noise, left, right = RandomProbes().of(image, 1, classes, *widest)
            gradient = weight_gradients(model, sites, images[image : image + 1], noise)[place]
            sketch = left[0, :out].double().T @ gradient
            inputs += sketch.T @ sketch / left.shape[2]
            centred = gradient[:, :-1] - torch.outer(gradient[:, -1], found[site.name].pivot)
            sketch = centred @ right[0, : site.hidden].double()
            outputs += sketch @ sketch.T / right.shape[2]
        assert one.images == 3
        torch.testing.assert_close(one.inputs, inputs, rtol=1e-8, atol=1e-8 * float(inputs.abs().max()))
        torch.testing.assert_close(one.outputs, outputs, rtol=1e-8, atol=1e-8 * float(outputs.abs().max()))


def test_the_sketch_has_the_gradients_product_as_its_mean() -> None:
    family = FAMILIES["timm-vit"]
    model, images = randomise_(family.build()).double().eval(), family.example(1)
    sites = find_sites(model, images)
    found = collect(model, [images], RandomProbes(input_columns=20_000)).sensitivities[sites[0].name]
    classes = logits_of(model(images)).shape[1]
    gradient = weight_gradients(model, sites, images, RandomProbes().of(0, 1, classes, 1, 1)[0])[0]
    exact = gradient.T @ gradient
    about = found.recentred(torch.zeros(sites[0].hidden, dtype=torch.float64)).inputs
    assert float((about - exact).norm() / exact.norm()) < 0.05


def test_two_processes_and_other_batches_give_the_same() -> None:
    family = FAMILIES["timm-vit"]
    model, images = randomise_(family.build()).double().eval(), family.example(6)
    whole = collect(model, [images])
    split = collect(model, [images[::2][:1], images[::2][1:]], RandomProbes(first=0, step=2)).merge(
        collect(model, [images[1::2]], RandomProbes(first=1, step=2))
    )
    for name, one in whole.sensitivities.items():
        other = split.sensitivities[name].recentred(one.pivot)
        assert (one.images, other.images) == (6, 6)
        torch.testing.assert_close(other.inputs, one.inputs, rtol=1e-8, atol=1e-8 * float(one.inputs.abs().max()))
        metric, again = (
            found.sensitivities[name].blended_covariance(found.covariances[name]) for found in (whole, split)
        )
        torch.testing.assert_close(again.covariance, metric.covariance, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(again.mean, metric.mean, rtol=1e-6, atol=1e-9)


def test_dealt_out_batches_around_one_point_give_all_the_same() -> None:
    family = FAMILIES["timm-vit"]
    model, images = randomise_(family.build()).double().eval(), family.example(7)
    sites = find_sites(model, images[:1])
    pivots = collect_statistics(model, sites, [images[:3]]).means

    def part(batches: list[Tensor], first: int, step: int, block: int) -> Statistics:
        numbers = {"first": first, "step": step, "block": block}
        return collect_statistics(
            model, sites, batches, covariance=True, tokens=TokenSample(0.5, **numbers),
            sensitivity=RandomProbes(**numbers), pivots=pivots,
        )  # fmt: skip

    whole = part([images], 0, 1, 1)
    # Batches of two: the first process has numbers 0, 1, 4, 5, whatever pieces they come in, the second 2, 3, 6.
    split = part([images[:2], images[4:5], images[5:6]], 0, 4, 2).merge(part([images[2:4], images[6:]], 2, 4, 2))
    for name, one in whole.sensitivities.items():
        other = split.sensitivities[name]
        assert torch.equal(other.pivot, one.pivot)
        for found, wanted in (
            (other.inputs, one.inputs),
            (other.outputs, one.outputs),
            (split.covariances[name].m2, whole.covariances[name].m2),
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize(("step", "block"), [(1, 2), (1, 0)])
def test_numbers_that_two_images_would_share_are_refused(step: int, block: int) -> None:
    for numbers in (RandomProbes, TokenSample):
        with pytest.raises(InputError, match="the step no smaller than it"):
            numbers(step=step, block=block)


def test_a_file_keeps_them_and_old_ones_are_refused(tmp_path: Path) -> None:
    family = FAMILIES["timm-vit"]
    model, images = randomise_(family.build()).eval(), family.example(2, torch.float32)
    found = collect(model, [images])
    found.save(tmp_path / "statistics")
    again = Statistics.load(tmp_path / "statistics")
    assert list(again.sensitivities) == list(found.sensitivities)
    for name, one in found.sensitivities.items():
        other = again.sensitivities[name]
        assert one.images == other.images
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.outputs, other.outputs)
        assert torch.equal(one.pivot, other.pivot)
    sites = find_sites(model, images[:1])
    again.check_holds(sites, tmp_path, sensitivity=True)
    bare = collect_statistics(model, sites, [images])
    with pytest.raises(InputError, match="must hold the sensitivity"):
        bare.check_holds(sites, tmp_path, sensitivity=True)
    with pytest.raises(InputError, match="must all have sensitivities"):
        collect_statistics(model, sites, [images], covariance=True).merge(found)


def test_the_model_is_left_alone_and_may_be_frozen() -> None:
    family = FAMILIES["timm-vit"]
    model, images = randomise_(family.build()).double().train(), family.example(2)
    first = collect(model, [images])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert not images.requires_grad
    with torch.no_grad():
        second = collect(model.requires_grad_(False), [images])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, one in first.sensitivities.items():
        assert torch.equal(one.inputs, second.sensitivities[name].inputs)
    # The rest is what a pass without gradients gives.
    plain = collect_statistics(model, find_sites(model, images[:1]), [images], covariance=True)
    for name, found in plain.covariances.items():
        assert torch.equal(found.m2, first.covariances[name].m2)


def test_gradient_checkpointing_changes_nothing() -> None:
    family = FAMILIES["timm-vit"]
    model, images = randomise_(family.build()).double().eval(), family.example(2)
    plain = collect(model, [images])
    model.set_grad_checkpointing(True)
    again = collect(model, [images])
    for name, one in plain.sensitivities.items():
        torch.testing.assert_close(again.sensitivities[name].inputs, one.inputs)
        assert again.moments[name].count == plain.moments[name].count


def test_autocast_sums_in_float32() -> None:
    family = FAMILIES["timm-vit"]
    model, images = randomise_(family.build()).eval(), family.example(4, torch.float32)
    exact = collect(model, [images])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = collect(model, [images])
    for name, one in exact.sensitivities.items():
        other = half.sensitivities[name]
        assert other.inputs.dtype == torch.float64
        about = other.recentred(one.pivot).inputs
        assert float((about - one.inputs).norm() / one.inputs.norm()) < 0.1


def test_massive_means_cost_no_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    deviations = torch.randn(40, 6, generator=generator, dtype=torch.float64)

    def metric(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4), nn.Flatten()).to(torch.float64)
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(6) * 0.01)
            model[0].bias.fill_(100.0)
            model[2].bias -= 100 * model[2].weight.sum(1)
        images = deviations.reshape(10, 4, 6)
        found = collect(model.to(dtype), [images[:5].to(dtype), images[5:].to(dtype)])
        name = next(iter(found.sensitivities))
        return found.sensitivities[name].blended_covariance(found.covariances[name]).covariance

    exact, single = metric(torch.float64), metric(torch.float32)
    assert float((single - exact).norm() / exact.norm()) < 1e-2


def test_kernels_and_bad_weights_are_errors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randn(2, 3, 8, 8)
    sites = find_sites(model, images[:1], convolutions=True)
    with pytest.raises(InputError, match="read single positions"):
        collect_statistics(model, sites, [images], sensitivity=RandomProbes())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    family = FAMILIES["timm-vit"]
    broken = family.build().eval()
    with torch.no_grad():
        broken.head.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="gradients at site"):
        collect(broken, [family.example(2, torch.float32)])
