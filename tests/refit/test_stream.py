"""The refit of the residual stream: where streams run, the least squares, other images as judge, every family."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from families import FAMILIES, randomise_
from pairs import Pair
from pairs_of_models import pruned_pair
from torch import Tensor, nn

from vbp import InputError, find_sites
from vbp.method.sampling import RandomProbes
from vbp.pruning.divergence import DenseReference
from vbp.refit import stream as module
from vbp.refit.stream import DenseStream, refit_stream_, refit_to_stream_
from vbp.runtime.session import Session
from vbp.sites.layers import channel_dim
from vbp.sites.residual import ResidualAdd, find_residual_adds


def streams(model: nn.Module, joins: tuple[ResidualAdd, ...], images: Tensor) -> dict[str, Tensor]:
    """Return what the modules at the joins give, by site."""
    found: dict[str, Tensor] = {}
    handles = []
    for join in joins:

        def hook(module: nn.Module, args: Any, output: Any, name: str = join.site.name) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        handles.append(model.get_submodule(join.module).register_forward_hook(hook))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_stream_that_moves_with_its_consumers(name: str) -> None:
    family = FAMILIES[name]
    model, images = randomise_(family.build()).double().eval(), family.example(2)
    sites = find_sites(model, images[:1])
    joins = find_residual_adds(model, images, sites)
    assert {join.site for join in joins} == {site for site in sites if site.kind == "mlp"}
    before = streams(model, joins, images)
    for join in joins:
        changed = copy.deepcopy(model)
        bias = changed.get_submodule(join.site.consumer).bias
        assert isinstance(bias, nn.Parameter)
        step = torch.randn(len(bias), generator=torch.Generator().manual_seed(1), dtype=bias.dtype)
        with torch.no_grad():
            bias.add_(step)
        moved = streams(changed, (join,), images)[join.site.name] - before[join.site.name]
        expected = (step * join.gain).reshape(-1, *[1] * (-join.dim - 1)).expand_as(moved)
        torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-6 * float(before[join.site.name].abs().max()))
    assert not any(module._forward_hooks for module in model.modules())


class PostNorm(nn.Module):
    """A block that normalises its branch, as Swin v2 does, or the sum, as BERT does."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.up, self.down, self.norm, self.inside = nn.Linear(6, 12), nn.Linear(12, 6), nn.LayerNorm(6), inside

    def forward(self, x: Tensor) -> Tensor:
        branch = self.down(torch.nn.functional.gelu(self.up(x)))
        return x + self.norm(branch) if self.inside else self.norm(x + branch)


class Loose(nn.Module):
    """Blocks that are only names: no module around a consumer is ever called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(6, 12), "down": nn.Linear(12, 6)})])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block["down"](torch.nn.functional.gelu(block["up"](x)))
        found: Tensor = self.head(x)
        return found


def test_a_stream_that_is_no_modules_output_is_not_found() -> None:
    model, images = Loose(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    sites = find_sites(model, images[:1])
    assert [site.consumer for site in sites if site.kind == "mlp"] == ["blocks.0.down"]
    assert find_residual_adds(model, images, sites) == ()


@pytest.mark.parametrize("inside", [True, False])
def test_a_norm_behind_the_consumer_is_no_join(inside: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), PostNorm(inside), nn.Linear(6, 3))
    images = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    sites = find_sites(model, images[:1])
    assert [site.consumer for site in sites if site.kind == "mlp"] == ["1.down"]
    assert find_residual_adds(model, images, sites) == ()
    judge = DenseReference(model, [images])
    with pytest.raises(InputError, match="needs an MLP whose output is added to a stream"):
        refit_stream_(copy.deepcopy(model), sites, [images], judge)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, values: Tensor) -> Tensor:
        return values + self.down(self.up(values).relu())


def test_a_layer_with_a_larger_kernel_writes_into_a_stream_and_is_not_refitted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Branch(), Branch(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = torch.randn(2, 3, 8, 8)
    sites = find_sites(model, images[:1], convolutions=True)
    assert [add.site.consumer for add in find_residual_adds(model, images, sites)] == ["1.down", "2.down"]
    with pytest.raises(InputError, match="needs an MLP whose output is added to a stream, got Sequential"):
        module.residual_adds(model, images, sites)


def test_the_streams_come_nearer_and_more_images_bring_them_nearest() -> None:
    model, pruned, sites, images = pruned_pair(FAMILIES["timm-vit"])
    joins = find_residual_adds(model, images[:1], sites)
    judge = DenseReference(model, [images])
    before = streams(pruned, joins, images)
    # The same images many times over count as many: the penalty goes to nothing.
    errors = []
    for times in (1, 300):
        fitted = copy.deepcopy(pruned)
        done = refit_stream_(fitted, sites, [images] * times, judge)
        assert done.sites == tuple(join.site.name for join in joins)
        assert done.images == 32 * times
        assert done.after < done.before
        dense, after = streams(model, joins, images), streams(fitted, joins, images)
        errors.append([float((dense[join.site.name] - after[join.site.name]).square().sum()) for join in joins])
    unfitted = [float((streams(model, joins, images)[name] - one).square().sum()) for name, one in before.items()]
    assert errors[1][0] < errors[0][0] < unfitted[0]
    assert errors[1][1] < unfitted[1]


class Pleased(DenseReference):
    """Finds every model nearer than the one before."""

    def __init__(self, model: nn.Module, batches: list[Tensor]) -> None:
        super().__init__(model, batches)
        self.found = 1.0

    def divergence(self, pruned: nn.Module) -> float:
        """Return half of the last one."""
        self.found /= 2
        return self.found


@pytest.mark.parametrize("name", ["timm-vit", "timm-convnext-conv"])
def test_the_consumers_fit_is_the_minimum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PENALTY_TIMES_IMAGES", 1e-9)
    monkeypatch.setattr(module, "DEPTHS", (0.0,))
    monkeypatch.setattr(module, "find_mlps", lambda *_: ())  # the consumer alone
    monkeypatch.setattr("vbp.statistics.mlp_samples.POSITIONS", 10**6)
    monkeypatch.setattr("vbp.method.gauss_newton.HELD_OUT_SHARE", 1 / 16)
    model, pruned, sites, images = pruned_pair(FAMILIES[name], keep_ratio=0.25)
    join = find_residual_adds(model, images[:1], sites)[0]
    done = refit_stream_(pruned, sites, [images[:20], images[20:]], Pleased(model, [images]))
    assert done.sites == (join.site.name,)
    layer = pruned.get_submodule(join.site.consumer)
    assert channel_dim(layer) == join.dim
    wanted = streams(model, (join,), images)[join.site.name]
    with torch.enable_grad():
        found: list[Tensor] = []
        pruned.get_submodule(join.module).register_forward_hook(lambda module, args, output: found.append(output))
        pruned(images)
    # The objective again, by its definition; the last two images judge.
    lacking = (wanted - found[0]).movedim(join.dim, -1)[:30]
    loss = lacking.square().sum()
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    for slope in torch.autograd.grad(loss, (layer.weight, layer.bias)):
        assert float(slope.abs().max()) < 1e-6 * float(loss.detach())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_closer_to_the_dense_model(name: str) -> None:
    model, pruned, sites, images = pruned_pair(FAMILIES[name])
    untouched = copy.deepcopy(pruned)
    judge = DenseReference(model, [images])
    done = refit_stream_(pruned, sites, [images] * 20, judge)
    assert done.after < done.before == judge.divergence(untouched)
    assert judge.divergence(pruned) == done.after
    layers = {layer for site in sites if site.name in done.sites for layer in (*site.producers, site.consumer)}
    changed = {
        key for key, value in pruned.state_dict().items() if not torch.equal(value, untouched.state_dict()[key])
    }
    assert changed
    assert changed <= {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    assert not any(module._forward_hooks for one in (model, pruned) for module in one.modules())


def test_a_consumer_without_bias_gains_one_and_loses_it_if_nothing_helps() -> None:
    model, pruned, sites, images = pruned_pair(FAMILIES["timm-vit"])
    pruned.blocks[0].mlp.fc2.bias = None  # type: ignore[union-attr, index]
    bare = copy.deepcopy(pruned)
    assert refit_stream_(pruned, sites, [images], DenseReference(model, [images])).sites
    assert isinstance(pruned.blocks[0].mlp.fc2.bias, nn.Parameter)  # type: ignore[union-attr, index]

    class Deaf(DenseReference):
        def divergence(self, pruned: nn.Module) -> float:
            return 1.0

    done = refit_stream_(bare, sites, [images], Deaf(model, [images]))
    assert (done.sites, done.before, done.after) == ((), 1.0, 1.0)
    assert bare.blocks[0].mlp.fc2.bias is None  # type: ignore[union-attr, index]
    assert "stays as it is" in done.sentence()


class Judge(DenseReference):
    """Gives one divergence after the other."""

    def __init__(self, model: nn.Module, images: Tensor, *divergences: float) -> None:
        super().__init__(model, [images])
        self.divergences = list(divergences)

    def divergence(self, pruned: nn.Module) -> float:
        return self.divergences.pop(0)


def test_half_of_the_step_is_taken_where_the_whole_does_not_help() -> None:
    model, pruned, sites, images = pruned_pair(FAMILIES["timm-vit"])
    pruned.blocks[0].mlp.fc2.bias = None  # type: ignore[union-attr, index]
    whole, half = copy.deepcopy(pruned), copy.deepcopy(pruned)
    done = refit_stream_(whole, sites, [images], Judge(model, images, 1.0, 0.8))
    assert (done.after, done.share) == (0.8, 1.0)
    halved = refit_stream_(half, sites, [images], Judge(model, images, 1.0, 1.2, 0.9))
    assert (halved.sites, halved.after, halved.share) == (done.sites, 0.9, 0.5)
    assert "50% of the step: mean KL" in halved.sentence()
    first, last = pruned.state_dict(), whole.state_dict()
    for name, value in half.state_dict().items():
        torch.testing.assert_close(value, (first.get(name, torch.zeros_like(value)) + last[name]) / 2)


def test_the_dense_model_runs_over_a_batch_once_for_all_depths_and_models() -> None:
    model, pruned, sites, images = pruned_pair(FAMILIES["timm-vit"])
    judge, batches = DenseReference(model, [images]), [images[:20], images[20:]]
    fresh, other = copy.deepcopy(pruned), copy.deepcopy(pruned)
    with torch.no_grad():
        other.blocks[0].mlp.fc2.weight.mul_(0.9)  # type: ignore[index, union-attr]
    expected = [refit_stream_(copy.deepcopy(one), sites, batches, judge) for one in (pruned, other)]
    stream, runs = DenseStream(model, sites, images[:1], batches), 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    model.patch_embed.register_forward_hook(count)  # type: ignore[union-attr, operator]
    assert [refit_to_stream_(one, stream, judge) for one in (fresh, other)] == expected
    assert len(expected[0].sites) > 1
    assert runs == len(batches)


def test_where_nothing_is_lacking_the_model_stays_as_it_is() -> None:
    model, _, sites, images = pruned_pair(FAMILIES["timm-vit"])
    same = copy.deepcopy(model)
    done = refit_stream_(same, sites, [images], DenseReference(model, [images]))
    assert done.sites == ()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in same.state_dict().items())


def test_two_processes_fit_what_one_does() -> None:
    model, pruned, sites, images = pruned_pair(FAMILIES["timm-vit"])
    alone = copy.deepcopy(pruned)
    done = refit_stream_(alone, sites, [images], DenseReference(model, [images[:6]]))
    barrier, slots = Barrier(2), [None, None]

    def work(rank: int, share: list[Tensor], first: int) -> tuple[Any, nn.Module]:
        mine, dense, processes = copy.deepcopy(pruned), copy.deepcopy(model), Pair(rank, barrier, slots)
        judge = DenseReference(dense, [images[:6]] if rank == 0 else [], session=Session(processes))
        return refit_stream_(mine, sites, share, judge, probes=RandomProbes(first=first)), mine

    for shares, firsts in (([[images[:15]], [images[15:]]], (0, 15)), ([[], [images]], (0, 0))):
        with ThreadPoolExecutor(2) as pool:
            (first, one), (second, other) = pool.map(work, range(2), shares, firsts)
        assert first == second
        assert first.images == done.images
        assert first.after == pytest.approx(done.after, rel=1e-7)
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(one.state_dict()[key], value)
            assert torch.equal(one.state_dict()[key], other.state_dict()[key])


def test_bad_input_is_refused_and_nothing_stays_changed() -> None:
    model, pruned, sites, images = pruned_pair(FAMILIES["timm-vit"])
    judge = DenseReference(model, [images])
    with pytest.raises(InputError, match="at least one image, got none"):
        refit_stream_(pruned, sites, [], judge)
    # The first depth is fitted before the second one's layer gives what cannot be.
    with torch.no_grad():
        pruned.blocks[1].mlp.fc1.weight[0, 0] = torch.nan  # type: ignore[index, union-attr]
    before = copy.deepcopy(pruned.state_dict())
    with pytest.raises(InputError, match="must be finite"):
        refit_stream_(pruned, sites, [images], judge)
    for key, value in pruned.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
    assert all(parameter.requires_grad for parameter in pruned.parameters())
