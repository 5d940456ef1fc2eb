"""The refit of layers with larger kernels: patches tell what channels alone do not."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairs import Pair
from torch import nn

from vbp import DenseReference, InputError, PruningPlan, collect_statistics, find_sites, make_plan, prune_
from vbp.method.sampling import RandomProbes
from vbp.pruning.criteria import variance_scores
from vbp.refit.kernels import check_kernels, refit_kernels_
from vbp.refit.refits import Refits
from vbp.runtime.session import Session
from vbp.statistics.images import GivenImages

_NOISE = torch.randn(160, 3, 12, 12, generator=torch.Generator().manual_seed(1))
IMAGES = F.avg_pool2d(_NOISE, 3, 1, 1) * 2  # neighbours resemble each other, as in photos
FITTED, OTHERS = IMAGES[:128], IMAGES[128:]


def networks(
    *, groups: int = 1, stride: int = 1, padding: Any = 1
) -> tuple[nn.Sequential, nn.Sequential, PruningPlan]:
    """Return a network with 3x3 kernels, the same one pruned with the refit of channels, and the plan."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 8, 3, stride=stride, padding=padding, groups=groups), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[6].weight.mul_(10)
    sites = find_sites(model, IMAGES[:1], convolutions=True)
    statistics = collect_statistics(model, sites, [FITTED], covariance=True)
    plan = make_plan(sites[:1], variance_scores(statistics), keep_ratio=0.5)
    assert plan.sites[0].site.consumer == "2"
    pruned = copy.deepcopy(model)
    prune_(pruned, plan, statistics.means, statistics.covariances)
    return model, pruned, plan


def off(model: nn.Sequential, pruned: nn.Sequential) -> float:
    """Return the squared error of the layer on other images, as a share of its variance."""
    with torch.no_grad():
        wanted, found = (one[:3](OTHERS) for one in (model, pruned))
    return float((wanted - found).square().sum() / (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum())


@pytest.mark.parametrize(
    "shape", [{}, {"groups": 2}, {"stride": 2}, {"padding": 0}, {"padding": "same"}], ids=lambda shape: str(shape)
)
def test_the_output_comes_closer_on_other_images(shape: dict[str, Any]) -> None:
    model, pruned, plan = networks(**shape)
    before, dense = off(model, pruned), copy.deepcopy(model.state_dict())
    report = refit_kernels_(pruned, plan, FITTED.split(32), DenseReference(model, [OTHERS]))
    assert report.layers == ("2",)
    assert (report.images, report.judged) == (128, 32)
    assert report.after < report.before
    # An eighth of the images, held out, tells what others do.
    assert report.errors["2"] == (pytest.approx(before, rel=0.25), pytest.approx(off(model, pruned), rel=0.25))
    assert off(model, pruned) < 0.9 * before
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_loses_outputs_too_is_fitted_to_those_that_are_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5),
    ).eval()  # fmt: skip
    sites = find_sites(model, IMAGES[:1], convolutions=True)
    statistics = collect_statistics(model, sites, [FITTED], covariance=True)
    plan = make_plan(sites[:2], variance_scores(statistics), keep_ratio=0.5, scope="per_layer")
    pruned = copy.deepcopy(model)
    prune_(pruned, plan, statistics.means, statistics.covariances)
    report = refit_kernels_(pruned, plan, FITTED.split(32), DenseReference(model, [OTHERS]))
    assert report.layers == ("2", "4")
    assert pruned[2].weight.shape == (6, 8, 3, 3)
    assert all(after < before for before, after in report.errors.values())
    # The first of the two reads what the dense model's kept channels are.
    keep = list(plan.sites[1].keep)
    with torch.no_grad():
        wanted, found = model[:3](OTHERS)[:, keep], pruned[:3](OTHERS)
    share = (wanted - found).square().sum() / (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()
    assert float(share) == pytest.approx(report.errors["2"][1], rel=0.25)


def test_the_weights_are_those_of_least_squares_over_unfolded_patches() -> None:
    model, pruned, plan = networks()
    before = copy.deepcopy(pruned)
    refit_kernels_(pruned, plan, FITTED.split(32), DenseReference(model, [OTHERS]), probes=RandomProbes())
    keep = list(plan.sites[0].keep)
    with torch.no_grad():
        hidden = model[:2](FITTED)
        wanted = model[2](hidden).double().flatten(2).movedim(1, -1).flatten(0, 1)
    patches = F.unfold(hidden[:, keep].double(), 3, padding=1).movedim(1, -1).flatten(0, 1)
    patches = torch.cat([patches, torch.ones(len(patches), 1)], 1)

    def error(network: nn.Sequential) -> float:
        weight = torch.cat([network[2].weight.flatten(1), network[2].bias[:, None]], 1).detach().double()
        return float((wanted - patches @ weight.T).square().mean())

    best = torch.linalg.lstsq(patches, wanted).solution
    least = float((wanted - patches @ best).square().mean())
    # From 64 of 144 positions of seven eighths of the images, with a penalty of 72 coefficients over 7,168 patches.
    assert error(pruned) - least < 0.05 * (error(before) - least)


def test_a_refit_that_harms_the_predictions_is_undone() -> None:
    model, pruned, plan = networks()
    before = copy.deepcopy(pruned.state_dict())
    judge = DenseReference(copy.deepcopy(pruned), [OTHERS])  # the pruned model's own predictions are the best
    judge.model = model
    report = refit_kernels_(pruned, plan, [FITTED], judge)
    assert report.layers == ()
    assert report.errors["2"][1] < report.errors["2"][0]
    assert report.sentence() == "the layers with larger kernels stay as they are: no refit to 128 images helped"
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())


def test_two_processes_fit_what_one_does() -> None:
    model, alone, plan = networks()
    copies = [copy.deepcopy(alone) for _ in range(2)]
    batches = list(FITTED.split(16))
    refit_kernels_(alone, plan, batches, DenseReference(model, [OTHERS]), probes=RandomProbes(block=16, step=16))
    barrier, slots = Barrier(2), [None, None]

    def work(rank: int) -> None:
        own = copy.deepcopy(model)
        judge = DenseReference(own, [OTHERS[rank::2]], session=Session(processes=Pair(rank, barrier, slots)))
        probes = RandomProbes(first=16 * rank, step=32, block=16)
        refit_kernels_(copies[rank], plan, batches[rank::2], judge, probes=probes)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(copies[0].state_dict()[name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(copies[1].state_dict()[name], copies[0].state_dict()[name])


def test_it_is_part_of_the_refits_of_a_run(caplog: pytest.LogCaptureFixture) -> None:
    model, pruned, plan = networks()
    sites = [entry.site for entry in plan.sites]
    known = model, sites, IMAGES[:1], GivenImages([OTHERS, FITTED])
    caplog.set_level("INFO", "vbp")
    report = Refits(*known).refit_(copy.deepcopy(pruned), plan=plan)
    assert report.kernels is not None
    assert report.kernels.layers == ("2",)
    assert report.to_dict()["kernels"]["sentence"] in caplog.text
    assert "larger kernels: moments of the patches of 1 layers, 0 MB" in caplog.text
    assert Refits(*known, kernels="off").refit_(copy.deepcopy(pruned), plan=plan).kernels is None
    # Without the plan it is not known which channels are gone.
    assert Refits(*known).refit_(copy.deepcopy(pruned)).kernels is None
    assert "the larger kernels stay as they are: their refit needs the plan" in caplog.text
    before = copy.deepcopy(pruned.state_dict())
    with pytest.raises(InputError, match="the refit of larger kernels needs the plan, got none"):
        Refits(*known, kernels="on").refit_(pruned)
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())


def test_models_without_such_a_layer_and_runs_without_images() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    sites = find_sites(plain, IMAGES[:1])
    with pytest.raises(InputError, match="needs a convolution with one that reads pruned channels, got Sequential"):
        check_kernels(plain, sites)
    with pytest.raises(InputError, match="needs a convolution with one that reads pruned channels"):
        Refits(plain, sites, IMAGES[:1], GivenImages([IMAGES]), kernels="on")
    assert "kernels" not in Refits(plain, sites, IMAGES[:1], GivenImages([IMAGES])).wanted
    model, pruned, plan = networks()
    with pytest.raises(InputError, match="larger kernels needs at least one image"):
        refit_kernels_(pruned, plan, [], DenseReference(model, [OTHERS]))
