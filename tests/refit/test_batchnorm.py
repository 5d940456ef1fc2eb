"""Running statistics of BatchNorms after surgery: both estimates against torch, and the choice between them."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from pairs import Pair
from torch import Tensor, nn

from vbp import DenseReference, InputError, PruningPlan, collect_statistics, find_sites, make_plan, prune_
from vbp.pruning.criteria import variance_scores
from vbp.refit.batchnorm import BatchNormRefit, refit_batchnorm_
from vbp.refit.refits import Refits
from vbp.runtime.session import Session
from vbp.statistics.images import GivenImages
from vbp.torch_pruning.compensate import reestimate_batchnorm_

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()


def networks(keep_ratio: float = 0.5) -> tuple[nn.Module, nn.Module, PruningPlan]:
    """Return a convolutional network whose running statistics suit it, the same one pruned, and the plan."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 5),
    ).eval()  # fmt: skip
    reestimate_batchnorm_(model, [IMAGES])
    with torch.no_grad():
        model[11].weight.mul_(4)
    sites = find_sites(model, IMAGES[:1])
    statistics = collect_statistics(model, sites, [IMAGES])
    plan = make_plan(sites[:1], variance_scores(statistics), keep_ratio=keep_ratio)
    assert plan.sites[0].site.inner == ("1", "3", "4")
    pruned = copy.deepcopy(model)
    prune_(pruned, plan, statistics.means)
    return model, pruned, plan


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name}


def test_recalibration_is_what_training_mode_averages() -> None:
    model, pruned, plan = networks()
    expected = copy.deepcopy(pruned)
    reestimate_batchnorm_(expected, IMAGES.split(16))
    judge = DenseReference(model, [IMAGES])
    report = refit_batchnorm_(pruned, plan, IMAGES.split(16), judge, "recalibrate")
    assert report == BatchNormRefit("recalibrate", 32, 0, {})
    for name, value in buffers(expected).items():
        # Training mode divides by one less than the 1,024 positions.
        torch.testing.assert_close(buffers(pruned)[name], value, rtol=2e-3, atol=1e-5)
    assert not pruned.training
    assert not any(module._forward_pre_hooks for one in (model, pruned) for module in one.modules())


def test_matching_moves_by_the_difference_of_both_models() -> None:
    model, pruned, plan = networks()
    with torch.no_grad():
        for norm in (model[7], pruned[7]):  # what training has seen elsewhere
            norm.running_mean += 1.0
            norm.running_var *= 3.0
    read = {}
    for name, one in (("dense", model), ("pruned", pruned)):
        with torch.no_grad():
            read[name] = one[:7](IMAGES).double()
    before = buffers(pruned)
    refit_batchnorm_(pruned, plan, [IMAGES], DenseReference(model, [IMAGES]), "match")
    # The norms inside the site read what the dense model's kept channels are: they stay.
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        torch.testing.assert_close(buffers(pruned)[name], before[name], rtol=1e-4, atol=1e-5)
    means = {name: values.mean((0, 2, 3)) for name, values in read.items()}
    spread = {name: values.var((0, 2, 3), correction=0) + 1e-5 for name, values in read.items()}
    mean = before["7.running_mean"].double() + means["pruned"] - means["dense"]
    variance = (before["7.running_var"].double() + 1e-5) * spread["pruned"] / spread["dense"] - 1e-5
    torch.testing.assert_close(pruned[7].running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pruned[7].running_var.double(), variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_auto_takes_what_brings_the_predictions_closest(shift: float) -> None:
    model, pruned, plan = networks(1.0 if shift == 0 else 0.5)
    with torch.no_grad():
        pruned[6].weight += shift * 0.2
    before, judge = buffers(pruned), DenseReference(model, [IMAGES[16:]])
    report = refit_batchnorm_(pruned, plan, [IMAGES[:16]], judge)
    assert set(report.divergences) == {"keep", "match", "recalibrate"}
    assert (report.images, report.judged) == (16, 16)
    assert judge.divergence(pruned) == pytest.approx(min(report.divergences.values()), rel=1e-6)
    assert report.chosen == min(report.divergences, key=lambda name: report.divergences[name])
    if shift == 0:
        assert report.chosen == "keep"
        assert all(torch.equal(value, before[name]) for name, value in buffers(pruned).items())
        assert report.sentence().startswith("the BatchNorms keep their running statistics: mean KL")
    else:
        assert report.chosen != "keep"


@pytest.mark.parametrize("choice", ["match", "recalibrate"])
def test_two_processes_estimate_what_one_does(choice: Any) -> None:
    model, alone, plan = networks()
    copies = [copy.deepcopy(alone) for _ in range(2)]
    batches = list(IMAGES.split(8))
    refit_batchnorm_(alone, plan, batches, DenseReference(model, [IMAGES]), choice)
    barrier, slots = Barrier(2), [None, None]

    def work(rank: int) -> None:
        own = copy.deepcopy(model)
        judge = DenseReference(own, [IMAGES[rank::2]], session=Session(processes=Pair(rank, barrier, slots)))
        refit_batchnorm_(copies[rank], plan, batches[rank::2], judge, choice)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    for name, value in buffers(alone).items():
        torch.testing.assert_close(buffers(copies[0])[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(buffers(copies[1])[name], buffers(copies[0])[name])


def test_without_images_or_norms_nothing_changes() -> None:
    model, pruned, plan = networks()
    before, judge = buffers(pruned), DenseReference(model, [IMAGES])
    with pytest.raises(InputError, match="batchnorm needs at least one image"):
        refit_batchnorm_(pruned, plan, [], judge)
    with pytest.raises(RuntimeError):
        refit_batchnorm_(pruned, plan, [IMAGES, IMAGES[:, :2]], judge, "recalibrate")
    assert all(torch.equal(value, before[name]) for name, value in buffers(pruned).items())
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="needs BatchNorm layers with running statistics, got Sequential"):
        Refits(plain, find_sites(plain, IMAGES[:1]), IMAGES[:1], GivenImages([IMAGES]), batchnorm="match")


def test_it_comes_first_among_the_refits(caplog: pytest.LogCaptureFixture) -> None:
    model, pruned, plan = networks()
    sites = [entry.site for entry in plan.sites]
    refits = Refits(model, sites, IMAGES[:1], GivenImages([IMAGES]), stream="off", batchnorm="auto")
    with caplog.at_level("INFO", "vbp"):
        report = refits.refit_(pruned, plan=plan)
    assert report.batchnorm is not None
    assert report.head is not None
    assert report.batchnorm.judged == 8  # a quarter
    assert report.to_dict()["batchnorm"]["sentence"] == report.batchnorm.sentence()
    places = [caplog.text.index(one.sentence()) for one in (report.batchnorm, report.head)]
    assert places == sorted(places)
