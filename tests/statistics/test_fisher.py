"""Sensitivities against autograd image by image; merged, saved, in other precisions."""

from __future__ import annotations

import copy
from dataclasses import replace
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


def logit_gradients(model: nn.Module, site: Site, image: Tensor, noise: Tensor) -> Tensor:
    """Return by autograd what a change E of the queries, q + E q in each head, does: "heads size size"."""
    name, first = site.rows[0]
    change = torch.zeros(site.heads, *2 * (site.hidden // site.heads,), dtype=torch.float64, requires_grad=True)

    def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        queries = output[..., first : first + site.hidden]
        by_head = queries.reshape(*queries.shape[:-1], site.heads, -1)
        changed = queries + torch.einsum("hkq,...hq->...hk", change, by_head).reshape(queries.shape)
        return torch.cat([output[..., :first], changed, output[..., first + site.hidden :]], -1)

    handle = model.get_submodule(name).register_forward_hook(add)
    (2 * logits_of(model(image)).softmax(-1).sqrt() * noise).sum().backward()
    handle.remove()
    assert change.grad is not None
    return change.grad


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin", "hf-vit"])
def test_sums_of_queries_and_keys_are_those_of_the_logits_gradients(name: str) -> None:
    family = FAMILIES[name]
    model, images = randomise_(family.build()).double().eval(), family.example(3)
    sites = tuple(site for site in find_sites(model, images[:1], attention=True) if site.kind == "query_key")
    parts = [
        collect_statistics(model, sites, [part], covariance=True, sensitivity=RandomProbes(first=first))
        for first, part in ((0, images[:2]), (2, images[2:]))
    ]
    found = parts[0].merge(parts[1]).logit_sensitivities
    for site in sites:
        assert found[site.name].images == 3
        query, key = torch.zeros_like(found[site.name].query), torch.zeros_like(found[site.name].key)
        for image in range(3):
            noise = RandomProbes().of(image, 1, 7, 1, 1)[0]
            gradient = logit_gradients(model, site, images[image : image + 1], noise)
            query, key = query + gradient.mT @ gradient, key + gradient @ gradient.mT
        torch.testing.assert_close(found[site.name].query, query, rtol=1e-8, atol=1e-8 * float(query.max()))
        torch.testing.assert_close(found[site.name].key, key, rtol=1e-8, atol=1e-8 * float(key.max()))


def test_half_of_the_moments_of_queries_and_keys_is_the_plain_one() -> None:
    family = FAMILIES["timm-vit"]
    model, images = randomise_(family.build()).double().eval(), family.example(3)
    sites = find_sites(model, images[:1], attention=True)
    statistics = collect_statistics(model, sites, [images], covariance=True, sensitivity=RandomProbes())
    name = next(site.name for site in sites if site.kind == "query_key")
    pair = statistics.logit_sensitivities[name]
    query, key = (statistics.covariances[name + kind] for kind in ("#query", "#key"))
    moment = query.covariance + torch.outer(query.mean, query.mean)
    plain = pair.blended(query, key, share=0.0)
    half = pair.blended(query, key)
    for place, (wanted, sums) in enumerate(((moment, pair.query), (key.covariance, pair.key))):
        blocks = [wanted[:16, :16], wanted[16:, 16:]]
        torch.testing.assert_close(plain[place].covariance, torch.block_diag(*blocks))
        mixed = [(block + one * block.trace() / one.trace()) / 2 for block, one in zip(blocks, sums, strict=True)]
        torch.testing.assert_close(half[place].covariance, torch.block_diag(*mixed))
    assert not half[0].mean.any()
    silent = replace(pair, query=torch.zeros_like(pair.query), key=torch.zeros_like(pair.key))
    torch.testing.assert_close(silent.blended(query, key)[1].covariance, plain[1].covariance)


def test_sensitivities_of_attention_survive_a_file(tmp_path: Path) -> None:
    family = FAMILIES["timm-vit"]
    model, images = randomise_(family.build()).double().eval(), family.example(3)
    sites = find_sites(model, images[:1], attention=True)
    statistics = collect_statistics(model, sites, [images], covariance=True, sensitivity=RandomProbes())
    statistics.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    again.check_holds(sites, tmp_path, covariance=True, sensitivity=True)
    assert again.logit_sensitivities.keys() == statistics.logit_sensitivities.keys()
    for name, pair in statistics.logit_sensitivities.items():
        assert torch.equal(again.logit_sensitivities[name].query, pair.query)
        assert torch.equal(again.logit_sensitivities[name].key, pair.key)
        assert again.logit_sensitivities[name].images == 3
    with pytest.raises(InputError, match=r"must hold the sensitivity of .*qkv"):
        replace(again, logit_sensitivities={}).check_holds(sites, tmp_path, sensitivity=True)
    with pytest.raises(InputError, match="sensitivities of the same sites, or none"):
        again.merge(replace(again, logit_sensitivities={}))


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


def test_bad_weights_are_errors() -> None:
    family = FAMILIES["timm-vit"]
    broken = family.build().eval()
    with torch.no_grad():
        broken.head.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="gradients at site"):
        collect(broken, [family.example(2, torch.float32)])
