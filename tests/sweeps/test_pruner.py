"""Copies of a small model that a sweep prunes are what pruning by hand gives; and what is asked for."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from families import FAMILIES, randomise_
from torch import Tensor, nn

from vbp import (
    InputError,
    Site,
    collect_statistics,
    find_sites,
    make_plan,
    output_variance_scores,
    prune_,
)
from vbp.pruning.baselines import random_scores
from vbp.pruning.criteria import criterion_scores
from vbp.pruning.make_plan import PlanRules
from vbp.pruning.plan import PlanChoice
from vbp.statistics.evidence import Evidence
from vbp.sweeps.checks import Share, settings_of, sweep_needs
from vbp.sweeps.pruner import Pruner
from vbp.sweeps.rows import Point, Setting

IMAGES = FAMILIES["timm-vit"].example(8)


@pytest.fixture
def model() -> nn.Module:
    """Return a small ViT."""
    return randomise_(FAMILIES["timm-vit"].build()).double().eval()


def _evidence(model: nn.Module) -> tuple[tuple[Site, ...], Evidence]:
    sites = find_sites(model, IMAGES[:1])
    return sites, Evidence(collect_statistics(model, sites, [IMAGES], covariance=True))


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IMAGES)
    return logits


def test_each_copy_is_the_dense_model_pruned_by_hand(model: nn.Module) -> None:
    sites, evidence = _evidence(model)
    assert evidence.statistics is not None
    before = copy.deepcopy(model.state_dict())
    settings = settings_of(["output_variance"], ["none", "mean", "refit"], [0.7, 0.4], ["per_layer", "global"])
    pruner = Pruner(model, sites, evidence, PlanRules(round_to=4))
    scores = output_variance_scores(model, sites, evidence.statistics)
    arguments = {
        "none": (),
        "mean": (evidence.statistics.means,),
        "refit": (evidence.statistics.means, evidence.statistics.covariances),
    }
    for setting in settings:
        pruned, kept = pruner.prune(setting)
        plan = make_plan(sites, scores, keep_ratio=setting.keep_ratio, scope=setting.scope, round_to=4)
        by_hand = copy.deepcopy(model)
        prune_(by_hand, plan, *arguments[setting.compensation])
        assert torch.equal(_logits(by_hand), _logits(pruned))
        assert kept == plan
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scores_are_computed_once_for_a_criterion(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    sites, _ = _evidence(model)
    scored: list[str] = []

    def scores(criterion: str, *known: Any) -> Any:
        scored.append(criterion)
        return criterion_scores(criterion, *known)

    monkeypatch.setattr("vbp.sweeps.pruner.criterion_scores", scores)
    pruner = Pruner(model, sites, Evidence())
    for setting in settings_of(["l2", "l1"], ["none"], [0.5, 0.4]):
        pruner.prune(setting)
    assert scored == ["l2", "l1"]


def test_a_criterion_may_bring_its_own_plans(model: nn.Module) -> None:
    sites, evidence = _evidence(model)
    assert evidence.statistics is not None
    plan = make_plan(sites, random_scores(sites, seed=5), keep_ratio=0.5)
    means = {name: mean + 1 for name, mean in evidence.statistics.means.items()}
    pruner = Pruner(model, sites, Evidence(), planners={"mine": lambda _: PlanChoice(plan, means, None)})
    pruned, _ = pruner.prune(Setting("mine", "mean", "global", 0.5))
    prune_(model, plan, means)
    assert torch.equal(_logits(model), _logits(pruned))


def test_settings_are_every_combination_once() -> None:
    found = settings_of(["l2/none", "variance", "variance/mean"], ["mean", "refit"], [0.5, 0.3])
    assert [(setting.method, setting.keep_ratio) for setting in found] == [
        ("l2/none", 0.5), ("l2/none", 0.3), ("variance/mean", 0.5), ("variance/mean", 0.3), ("variance/refit", 0.5),
        ("variance/refit", 0.3),
    ]  # fmt: skip
    assert settings_of(["l1"], ["none"], [0.5], ["per_layer"])[0].method == "l1/none, per_layer"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], ["mean"], [0.5]), "criteria must hold at least one value"),
        ((["l1"], [], [0.5]), "compensations must hold at least one value for criterion l1"),
        ((["l1"], ["mean"], []), "keep_ratios must hold at least one value"),
        ((["l1"], ["mean"], [0.5], []), "scopes must hold at least one value"),
        ((["l3"], ["mean"], [0.5]), "criterion must be one of"),
        ((["l1/"], ["mean"], [0.5]), "compensation must be one of none, mean, refit, got ''"),
        ((["l1"], ["shift"], [0.5]), "compensation must be one of none, mean, refit, got 'shift'"),
        ((["l1"], ["mean"], [1.5]), "keep_ratio must be in"),
        ((["l1"], ["mean"], [0.5], ["local"]), "scope must be one of global, per_layer, equal, got 'local'"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: tuple[list[str], ...], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        settings_of(*arguments)  # type: ignore[arg-type]


def test_auto_is_with_refit_and_finds_widths_itself() -> None:
    found = settings_of(["auto", "l1", "auto/refit"], ["mean", "refit"], [0.5, 0.3], ["per_layer"])
    assert [(setting.method, setting.keep_ratio) for setting in found if setting.criterion == "auto"] == [
        ("auto/refit", 0.5), ("auto/refit", 0.3)
    ]  # fmt: skip
    assert {setting.method for setting in found} == {"auto/refit", "l1/mean, per_layer", "l1/refit, per_layer"}
    assert settings_of(["auto"], [], [0.5])
    assert sweep_needs(settings_of(["auto"], [], [0.5])) == {"statistics", "covariance", "sensitivity"}
    for other in ("auto/mean", "auto/none", "auto/"):
        with pytest.raises(InputError, match=f"criterion auto goes with compensation refit alone, got {other};"):
            settings_of([other], [], [0.5])


def test_needs_are_those_of_criteria_and_compensations() -> None:
    def needs(*criteria: str) -> frozenset[str]:
        return sweep_needs(settings_of(criteria, [], [0.5]))

    assert needs("l1/none", "random/none") == frozenset()
    assert needs("l1/mean") == {"statistics"}
    assert needs("snip/refit") == {"gradients", "statistics", "covariance"}


@pytest.mark.parametrize(
    ("criterion", "compensation", "collected", "message"),
    [
        ("l1", "mean", False, "compensation mean needs statistics, got none"),
        ("auto", "refit", False, "criterion auto makes plans, not scores"),
        ("l1", "refit", True, "collect its statistics with covariance=True"),
    ],
)
def test_missing_evidence_is_refused(
    model: nn.Module, criterion: str, compensation: Any, collected: bool, message: str
) -> None:
    sites = find_sites(model, IMAGES[:1])
    evidence = Evidence(collect_statistics(model, sites, [IMAGES])) if collected else Evidence()
    with pytest.raises(InputError, match=message):
        Pruner(model, sites, evidence).prune(Setting(criterion, compensation, "global", 0.5))


def test_a_share_takes_every_nth_point_and_all_shares_take_all() -> None:
    points = [Point(setting, seed) for seed in (0, 1) for setting in settings_of(["l1"], ["none"], [0.7, 0.5, 0.3])]
    assert Share.parse("6/6").take(points) == (points[5],)
    assert Share.parse("0/6").take(points) == ()
    taken = [Share(number, 4).take(points) for number in (1, 2, 3, 4)]
    assert sorted(map(len, taken)) == [1, 1, 2, 2]
    assert {point for share in taken for point in share} == {*points}
    with pytest.raises(InputError, match="at most as many shares as there are points, got 1/7 for 6 points"):
        Share.parse("1/7").take(points)


@pytest.mark.parametrize("text", ["3", "4/3", "-1/3", "a/b", "1/3/4", "", "1 /3", "\u0661/3"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"point must be K/N with K from 0 to N, got .*; write --point 3/24"):
        Share.parse(text)
