"""Sweeps over a small model: each row is what pruning by hand gives, and what is known is not measured again."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from families import FAMILIES, randomise_
from runs import timing
from torch import Tensor, nn

from vbp import (
    InputError,
    Site,
    collect_statistics,
    count_macs,
    count_parameters,
    find_sites,
    make_plan,
    output_variance_scores,
    prune_,
)
from vbp.pruning.baselines import random_scores
from vbp.pruning.make_plan import PlanRules
from vbp.pruning.plan import PlanChoice
from vbp.report.published import PublishedPoint
from vbp.report.run_report import Measured
from vbp.report.style import render
from vbp.statistics.evidence import Evidence
from vbp.sweeps.checks import settings_of, sweep_needs
from vbp.sweeps.figure import draw_sweep
from vbp.sweeps.report import Setting, SweepReport, SweepRow
from vbp.sweeps.sweep import sweep

IMAGES = FAMILIES["timm-vit"].example(8)


@pytest.fixture
def model() -> nn.Module:
    """Return a small ViT."""
    return randomise_(FAMILIES["timm-vit"].build()).double().eval()


def _evidence(model: nn.Module) -> tuple[tuple[Site, ...], Evidence]:
    sites = find_sites(model, IMAGES[:1])
    return sites, Evidence(collect_statistics(model, sites, [IMAGES], covariance=True))


def _measuring(seen: list[Tensor]) -> Callable[[nn.Module], Measured]:
    """Return a measure that keeps the logits of each model and calls their mean an accuracy."""

    def measure(model: nn.Module) -> Measured:
        with torch.no_grad():
            seen.append(model(IMAGES))
        return Measured(
            50 + float(seen[-1].mean()), 90.0, count_macs(model, IMAGES[:1]), count_parameters(model), images=8
        )

    return measure


def test_each_row_is_the_dense_model_pruned_by_hand(model: nn.Module) -> None:
    sites, evidence = _evidence(model)
    assert evidence.statistics is not None
    before = copy.deepcopy(model.state_dict())
    settings = settings_of(["output_variance"], ["none", "mean", "refit"], [0.7, 0.4], ["per_layer", "global"])
    seen: list[Tensor] = []
    report = sweep(model, sites, evidence, settings, _measuring(seen), rules=PlanRules(round_to=4))
    assert [row.setting for row in report.rows] == list(settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    scores = output_variance_scores(model, sites, evidence.statistics)
    arguments = {
        "none": (),
        "mean": (evidence.statistics.means,),
        "refit": (evidence.statistics.means, evidence.statistics.covariances),
    }
    for row, logits in zip(report.rows, seen[1:], strict=True):
        setting = row.setting
        plan = make_plan(sites, scores, keep_ratio=setting.keep_ratio, scope=setting.scope, round_to=4)
        by_hand = copy.deepcopy(model)
        prune_(by_hand, plan, *arguments[setting.compensation])
        with torch.no_grad():
            assert torch.equal(by_hand(IMAGES), logits)
        assert (row.kept, row.total) == (plan.kept, plan.total)
        assert row.measured.params == count_parameters(by_hand)


def test_known_rows_are_not_measured_again_and_stay(model: nn.Module) -> None:
    sites, evidence = _evidence(model)
    first = sweep(model, sites, evidence, settings_of(["l2", "l1"], ["none"], [0.5]), _measuring([]))
    seen: list[Tensor] = []
    stages: list[SweepReport] = []
    # The second sweep has no statistics: nothing that it must measure needs any.
    second = sweep(
        model, sites, Evidence(), settings_of(["l1"], ["none"], [0.6, 0.5]), _measuring(seen), dense=first.dense,
        known=first.rows, on_row=stages.append,
    )  # fmt: skip
    assert len(seen) == 1
    assert [(row.setting.criterion, row.setting.keep_ratio) for row in second.rows] == [
        ("l1", 0.6), ("l1", 0.5), ("l2", 0.5)
    ]  # fmt: skip
    assert second.rows[1:] == first.rows[::-1]
    assert [len(stage.rows) for stage in stages] == [2, 3]


def test_a_criterion_may_bring_its_own_plans(model: nn.Module) -> None:
    sites, evidence = _evidence(model)
    assert evidence.statistics is not None
    setting = Setting("mine", "mean", "global", 0.5)
    plan = make_plan(sites, random_scores(sites, seed=5), keep_ratio=0.5)
    means = {name: mean + 1 for name, mean in evidence.statistics.means.items()}
    seen: list[Tensor] = []
    found = sweep(
        model, sites, Evidence(), [setting], _measuring(seen),
        planners={"mine": lambda _: PlanChoice(plan, means, None)},
    )  # fmt: skip
    prune_(model, plan, means)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), seen[1])
    assert found.rows[0].setting == setting


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


def test_missing_evidence_is_refused(model: nn.Module) -> None:
    sites, _ = _evidence(model)
    with pytest.raises(InputError, match="compensation mean needs statistics, got none"):
        sweep(model, sites, Evidence(), settings_of(["l1"], ["mean"], [0.5]), _measuring([]))
    with pytest.raises(InputError, match="criterion auto makes plans, not scores"):
        sweep(model, sites, Evidence(), settings_of(["auto"], [], [0.5]), _measuring([]))
    means = Evidence(collect_statistics(model, sites, [IMAGES]))
    with pytest.raises(InputError, match="collect its statistics with covariance=True"):
        sweep(model, sites, means, settings_of(["l1"], ["refit"], [0.5]), _measuring([]))


def _report() -> SweepReport:
    def row(method: str, ratio: float, top1: float, speedup: float) -> SweepRow:
        measured = Measured(top1, 95.0, int(1000 * ratio), int(500 * ratio), images=100)
        return SweepRow(settings_of([method], [], [ratio])[0], int(200 * ratio), 200, measured, timing(speedup))

    rows = (row("l1/none", 0.75, 60.0, 1.25), row("l1/none", 0.5, 20.0, 1.6), row("l2/none", 0.5, 40.0, 1.6))
    return SweepReport(Measured(80.0, 96.0, 1000, 500, images=100), rows, {"model_name": "x"})


def test_a_report_is_plain_data_and_rows_come_back_from_it() -> None:
    report = _report()
    value = json.loads(json.dumps(report.to_dict()))
    assert value["about"] == {"model_name": "x"}
    assert tuple(map(SweepRow.from_dict, value["rows"])) == report.rows
    assert value["rows"][0]["latency"]["speedup"]["median"] == 1.25
    assert value["rows"][0]["top1_error"] == pytest.approx(4.899, abs=1e-3)
    assert report.share(report.rows[0]) == {"top1": 0.75, "macs": 0.75, "params": 0.75, "latency": 0.8}


def test_csv_and_table_hold_every_row() -> None:
    report = _report()
    rows = list(csv.DictReader(io.StringIO(report.csv())))
    assert [(row["criterion"], row["keep_ratio"], row["top1"], row["top1_share"]) for row in rows] == [
        ("dense", "1.0", "80.0", "1.0"), ("l1", "0.75", "60.0", "0.75"), ("l1", "0.5", "20.0", "0.25"),
        ("l2", "0.5", "40.0", "0.5"),
    ]  # fmt: skip
    assert rows[0]["latency_share"] == ""
    assert rows[1]["latency_share"] == "0.8"
    assert (rows[0]["top1_error"], rows[0]["speedup"]) == ("4.0", "")
    assert {name: rows[1][name] for name in ("speedup", "latency_ms", "batch", "device", "precision", "clock")} == {
        "speedup": "1.25", "latency_ms": "10.0", "batch": "32", "device": "cpu", "precision": "float32",
        "clock": "wall",
    }  # fmt: skip
    assert (float(rows[1]["speedup_low"]), float(rows[1]["speedup_high"])) == pytest.approx((1.21, 1.31))
    table = report.table()
    assert re.search(r"l1/none +0.750 +60.00 ± 4.90 +0.750 +95.00 ± 2.18 +750 +375 +1.25x \(1.21 to 1.31\)\n", table)
    assert "speed-up: median and quartiles over the dense model, at batch 32 on cpu in float32\n" in table
    assert re.search(r"method +0.75 +0.5\nl1/none +0.750 +0.250\nl2/none +0.500\n", table)
    assert "standard error of 4.00 points" in table


def test_the_figure_has_a_panel_for_each_cost_and_published_points_beside() -> None:
    points = [
        PublishedPoint("paper", 20, 75.0, 90.0, 99.0, "a journal"),
        PublishedPoint("paper", 15, 80.0, 95.0, 99.0, "a journal"),
    ]
    report = _report()
    figure = draw_sweep(report, points)
    macs, params, latency = figure.axes
    assert {line.get_label(): line.get_xydata().tolist() for line in macs.get_lines()} == {
        "paper": [[75, 90], [80, 95]], "l1/none": [[50, 25], [75, 75]], "l2/none": [[50, 50]]
    }  # fmt: skip
    assert [line.get_label() for line in params.get_lines()] == ["l1/none", "l2/none"]
    assert latency.get_lines()[0].get_xydata().tolist() == [[62.5, 25], [80, 75]]
    # One standard error of the top-1 to both sides, and the quartiles of the latency.
    spans = [collection.get_segments()[0] for collection in latency.collections]
    error = 100 * report.rows[1].measured.top1_error / 80
    assert any(np.allclose(span, [[62.5, 25 - error], [62.5, 25 + error]]) for span in spans)
    assert any(np.allclose(span, [[100 / 1.66, 25], [100 / 1.56, 25]]) for span in spans)
    svg, png = render(figure, "sweep")
    assert b"a journal" in svg
    assert png.startswith(b"\x89PNG")
    assert render(draw_sweep(_report(), points), "sweep") == (svg, png)


def test_a_figure_without_latency_has_no_panel_for_it(model: nn.Module) -> None:
    sites = find_sites(model, IMAGES[:1])
    report = sweep(model, sites, Evidence(), settings_of(["l1/none"], [], [0.5]), _measuring([]))
    assert report.rows[0].setting == Setting("l1", "none", "global", 0.5)
    assert len(draw_sweep(report).axes) == 2
    timed = sweep(
        model,
        sites,
        Evidence(),
        settings_of(["l1/none"], [], [0.5]),
        _measuring([]),
        latency=lambda pruned: timing(1.5),
    )
    assert timed.rows[0].latency == timing(1.5)
    assert len(draw_sweep(timed).axes) == 3
