"""The refit of the last layer: the convex optimum, folding, cross-validation, and every family's classifier."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, randomise_
from pairs import Pair
from torch import Tensor, nn

from vbp import InputError, collect_statistics, find_sites, make_plan, prune_, variance_scores
from vbp.method.head_fit import HeadProblem
from vbp.pruning.divergence import DenseReference
from vbp.refit.head import refit_head_
from vbp.runtime.forward import logits_of
from vbp.runtime.session import Session


def divergence_of(dense: Tensor, pruned: Tensor) -> float:
    """Return the mean KL by its definition."""
    p = dense.softmax(-1)
    return float((p * (p.log() - pruned.softmax(-1).log())).sum(-1).mean())


def problem(images: int = 200, *, noise: float = 0.3) -> tuple[HeadProblem, nn.Linear, Tensor]:
    """Return features that are a distorted copy of others, and the answers of those."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(images, 6, generator=generator, dtype=torch.float64)
    mixing = torch.eye(6).double() + 0.3 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    features = true @ mixing + 0.5 + noise * torch.randn(images, 6, generator=generator, dtype=torch.float64)
    layer = nn.Linear(6, 5).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5, 6, generator=generator))
        layer.bias.copy_(torch.randn(5, generator=generator))
        target = layer(true).log_softmax(-1)
    return HeadProblem.of(layer, features, target), layer, features


def test_the_fit_is_the_least_of_a_convex_function() -> None:
    given, layer, _ = problem()
    change = given.fit(3.0).requires_grad_()
    # Written out again, from the formula.
    x = (given.features - given.features.mean(0)) / given.features.std(0, correction=0)
    p = given.target.exp()
    hessian = sum(layer.weight.T @ (q.diag() - torch.outer(q, q)) @ layer.weight for q in p) / len(p)
    shifted = given.features + x @ change[:-1] + change[-1]
    answers = (shifted @ layer.weight.T + layer.bias).log_softmax(-1)
    squares = change[:-1].square().sum() + change[-1].square().sum() / 100
    loss = (p * (given.target - answers)).sum(1).mean() + 3.0 * hessian.trace() / 6 / 2 * squares
    (gradient,) = torch.autograd.grad(loss, change)
    assert float(gradient.abs().max()) < 1e-3
    assert given.divergence(change.detach()) < 0.5 * given.divergence(None)


def test_views_of_an_image_are_left_out_together() -> None:
    given, layer, features = problem(40)
    doubled = HeadProblem.of(layer, features.repeat_interleave(2, 0), given.target.repeat_interleave(2, 0))
    # The same images twice tell nothing more.
    assert doubled.cross_validated(0.1, views=2) == pytest.approx(given.cross_validated(0.1), rel=1e-4)
    assert doubled.cross_validated(0.1) < 0.99 * given.cross_validated(0.1)


def test_one_fold_is_enough_to_see_that_nothing_can_be_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    given, layer, features = problem(40)
    # The images of the first fold have what they need; what fits the others harms them.
    others = (torch.arange(len(features)) % 4 != 0).to(features)[:, None]
    wanted = layer(features).detach() + 3 * others * torch.eye(len(layer.weight))[0].to(features)
    hopeless = HeadProblem.of(layer, features, wanted.log_softmax(-1))
    fits: list[float] = []
    fit = HeadProblem.fit
    monkeypatch.setattr(HeadProblem, "fit", lambda self, strength: fits.append(strength) or fit(self, strength))
    assert hopeless.cross_validated(1e-4) == math.inf
    assert fits == [1e-4]
    assert math.isfinite(given.cross_validated(0.1))
    assert fits[1:] == [0.1] * 4


def test_folding_gives_the_answers_of_the_change() -> None:
    given, _, features = problem()
    change = given.fit(1.0)
    weight, bias = given.fold_into_weight(change)
    folded = features @ weight.T + bias
    assert divergence_of(given.target, folded) == pytest.approx(given.divergence(change), rel=1e-9)


def test_a_feature_that_never_changes_says_nothing() -> None:
    _, layer, features = problem()
    features[:, 2] = 4.0
    given = HeadProblem.of(layer, features, (features @ layer.weight.T).log_softmax(-1).detach())
    weight, bias = given.fold_into_weight(given.fit(1.0))
    assert bool(weight.isfinite().all() and bias.isfinite().all())
    torch.testing.assert_close(weight[:, 2], layer.weight[:, 2].detach())


def pruned_pair(family: Family, keep_ratio: float = 0.5, images: int = 24) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a dense model, the same pruned with mean shift, and images."""
    model, pixels = randomise_(family.build()).double().eval(), family.example(images)
    sites = find_sites(model, pixels[:1])
    statistics = collect_statistics(model, sites, [pixels])
    pruned = copy.deepcopy(model)
    prune_(pruned, make_plan(sites, variance_scores(statistics), keep_ratio=keep_ratio), statistics.means)
    return model, pruned, pixels


@pytest.mark.parametrize("name", ["timm-vit", "timm-convnext-conv", "hf-swin", "torchvision-convnext"])
def test_every_family_comes_closer_to_the_dense_model(name: str) -> None:
    model, pruned, images = pruned_pair(FAMILIES[name])
    untouched = copy.deepcopy(pruned)
    done = refit_head_(pruned, DenseReference(model, images.split(10)))
    with torch.no_grad():
        dense, before, after = (logits_of(one(images)) for one in (model, untouched, pruned))
    assert done.images == len(images)
    assert done.before == pytest.approx(divergence_of(dense, before), rel=1e-6)
    assert done.after < done.before
    assert divergence_of(dense, after) < divergence_of(dense, before)
    # Nothing but the last layer has changed.
    changed = {
        key for key, value in pruned.state_dict().items() if not torch.equal(value, untouched.state_dict()[key])
    }
    assert changed == {f"{done.layer}.weight", f"{done.layer}.bias"}
    assert not any(module._forward_hooks for one in (model, pruned) for module in one.modules())


def test_a_head_without_bias_gains_one() -> None:
    model, pruned, images = pruned_pair(FAMILIES["timm-vit"])
    for one in (model, pruned):
        one.head.bias = None  # type: ignore[union-attr, assignment]
    done = refit_head_(pruned, DenseReference(model, [images]))
    with torch.no_grad():
        assert divergence_of(model(images), pruned(images)) < done.before
    assert isinstance(pruned.head, nn.Linear)
    assert isinstance(pruned.head.bias, nn.Parameter)


def test_where_nothing_helps_the_head_stays_as_it_is() -> None:
    model, _, images = pruned_pair(FAMILIES["timm-vit"])
    same = copy.deepcopy(model)
    done = refit_head_(same, DenseReference(model, [images]))
    assert done.strength == float("inf")
    assert done.before == done.after == pytest.approx(0, abs=1e-9)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in same.state_dict().items())


def test_two_processes_fit_what_one_does() -> None:
    model, pruned, images = pruned_pair(FAMILIES["timm-vit"])
    alone = copy.deepcopy(pruned)
    done = refit_head_(alone, DenseReference(model, [images]))
    barrier, slots = Barrier(2), [None, None]

    def work(rank: int, share: list[Tensor]) -> tuple[Any, nn.Module]:
        mine, dense = copy.deepcopy(pruned), copy.deepcopy(model)
        answers = DenseReference(dense, share, session=Session(Pair(rank, barrier, slots)))
        return refit_head_(mine, answers), mine

    dealt = [[images[:6], images[12:18]], [images[6:12], images[18:]]]
    for shares in (dealt, [[images[:15]], [images[15:]]], [[images], []]):
        with ThreadPoolExecutor(2) as pool:
            (first, one), (second, other) = pool.map(work, range(2), shares)
        assert first == second
        assert first.before == pytest.approx(done.before, rel=1e-9)
        # Images in the order of one process: the same ones are left out together.
        assert first.after == pytest.approx(done.after, rel=1e-6)
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(one.state_dict()[key], value)
            assert torch.equal(one.state_dict()[key], other.state_dict()[key])


def test_models_without_one_last_layer_are_refused() -> None:
    # Two classifiers, whose mean is the answer.
    model, images = randomise_(FAMILIES["timm-deit"].build()).double().eval(), FAMILIES["timm-deit"].example(4)
    with pytest.raises(InputError, match="one last Linear layer"):
        refit_head_(model, DenseReference(model, [images]))
    model, pruned, images = pruned_pair(FAMILIES["timm-vit"])
    with pytest.raises(InputError, match="at least 4 images, got 3"):
        refit_head_(pruned, DenseReference(model, [images[:3]]))
    with pytest.raises(InputError, match="at least 4 images, got 2"):
        refit_head_(pruned, DenseReference(model, [images[:11]], views=4))
    with pytest.raises(InputError, match="views must be at least 1, got 0"):
        DenseReference(model, [images], views=0)
    answers = DenseReference(model, [images])
    with torch.no_grad():
        pruned.head.weight[0, 0] = torch.nan  # type: ignore[index, union-attr]
    with pytest.raises(InputError, match="must be finite"):
        refit_head_(pruned, answers)
