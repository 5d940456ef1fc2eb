"""What a sweep reports: plain data, means over seeds, table, CSV, figures, page."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from runs import timing

from vbp.report.published import PublishedPoint
from vbp.report.run_report import Measured
from vbp.report.style import render
from vbp.sweeps.checks import settings_of
from vbp.sweeps.figures import FIGURES, draw, draw_pareto, draw_sweep
from vbp.sweeps.page import page
from vbp.sweeps.report import SweepReport
from vbp.sweeps.rows import SweepRow, point_from_dict


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


def _seeded() -> SweepReport:
    """Return a report of three seeds, fine-tuned, of which one point is missing, and of two methods that coincide."""
    rows = []
    for method in ("l1/none", "l2/none"):
        for ratio, top1s in ((0.75, (60.0, 62.0, 64.0)), (0.5, (20.0, 22.0, 27.0))):
            for seed, top1 in enumerate(top1s):
                small = Measured(top1, 95.0, int(1000 * ratio), int(500 * ratio), images=100)
                tuned = Measured(top1 + 10, 97.0, small.macs, small.params, epoch=2, images=100)
                setting = settings_of([method], [], [ratio])[0]
                rows.append(SweepRow(setting, int(200 * ratio), 200, small, None, seed, tuned))
    last = rows.pop()
    return SweepReport(Measured(80.0, 96.0, 1000, 500, images=100), tuple(rows), {"model_name": "x"}, (last.point,))


def test_seeds_have_mean_and_deviation_beside_the_error_over_images() -> None:
    report = _seeded()
    value = json.loads(json.dumps(report.to_dict()))
    assert tuple(map(SweepRow.from_dict, value["rows"])) == report.rows
    assert [point_from_dict(point) for point in value["missing"]] == [*report.missing]
    first = value["over_seeds"][0]
    assert first["pruned_top1"] == pytest.approx(
        {"mean": 62.0, "error": (62 * 38 / 100) ** 0.5, "deviation": 2.0, "seeds": 3}
    )
    assert first["tuned_top1"]["mean"] == pytest.approx(72.0)
    table = report.table()
    heading, dense, row, *_ = table.splitlines()
    assert heading.split() == [
        "method", "keep", "seeds", "top-1", "%", "std", "of", "dense", "top-5", "%", "tuned", "top-1", "%", "std",
        "of", "dense", "MACs", "params",
    ]  # fmt: skip
    assert dense.split()[:4] == ["dense", "80.00", "±", "4.00"]
    assert row.split()[:11] == [
        "l1/none", "0.750", "3", "62.00", "±", "4.85", "2.00", "0.775", "95.00", "±", "2.18"
    ]  # fmt: skip
    assert row.split()[11:16] == ["72.00", "±", "4.49", "2.00", "0.900"]
    assert table.splitlines()[5].split()[2] == "2"  # seeds of the last setting
    assert "means over up to 3 seeds" in table
    assert "missing: 1 of 12 points (l2-none-global-0.5-seed2)" in table
    lines = list(csv.DictReader(io.StringIO(report.csv())))
    assert [(line["seed"], line["tuned_top1"], line["tuned_epoch"]) for line in lines[1:4]] == [
        ("0", "70.0", "2"), ("1", "72.0", "2"), ("2", "74.0", "2")
    ]  # fmt: skip
    assert float(lines[1]["tuned_top1_share"]) == pytest.approx(70 / 80)


def test_the_front_holds_what_nothing_beats() -> None:
    report = _report()
    # l2/none costs as much as the second l1/none, and predicts better.
    assert [(group.setting.method, group.setting.keep_ratio) for group in report.front("macs")] == [
        ("l2/none", 0.5), ("l1/none", 0.75)
    ]  # fmt: skip
    assert [group.setting.method for group in report.front("latency")] == ["l2/none", "l1/none"]
    worse = replace(report, dense=replace(report.dense, macs=500))
    # The dense model costs as little as the smaller ones, and predicts better than all.
    assert worse.front("macs") == ()


def test_the_pareto_figure_shows_the_front_the_dense_model_and_the_errors() -> None:
    macs, latency = draw_pareto(_report()).axes
    assert (macs.get_xlabel(), latency.get_xlabel()) == ("MACs of one image (k)", "latency left (%)")
    lines = {line.get_label(): line for line in macs.get_lines()}
    assert lines["dense"].get_xydata().tolist() == [[1, 80]]
    assert lines["Pareto front"].get_xydata().tolist() == [[0.5, 40], [0.75, 60], [1, 80]]
    assert latency.get_lines()[0].get_xydata().tolist() == [[62.5, 40], [80, 60], [100, 80]]
    assert lines["Pareto front"].get_drawstyle() == "steps-post"
    spans = [collection.get_segments()[0] for collection in macs.collections]
    error = _report().rows[0].measured.top1_error
    assert any(np.allclose(span, [[0.75, 60 - error], [0.75, 60 + error]]) for span in spans)
    assert any(np.allclose(span, [[1, 76], [1, 84]]) for span in spans)


def test_curves_that_coincide_can_be_told_apart() -> None:
    figure = draw_sweep(replace(_seeded(), missing=()))
    for axes in figure.axes:
        first, second = (line for line in axes.get_lines() if line.get_label() in ("l1/none", "l2/none"))
        assert first.get_xydata()[-1].tolist() == second.get_xydata()[-1].tolist()
        assert (first.get_label(), second.get_label()) == ("l1/none", "l2/none")
        # The later one lies on the earlier one and leaves its edges and its marker to be seen.
        assert first.get_zorder() < second.get_zorder()
        assert first.get_linewidth() > 2 * second.get_linewidth()
        assert first.get_markersize() > second.get_markersize() + 2
        assert second.is_dashed()
        assert len({line.get_color() for line in (first, second)}) == 2
        assert len({line.get_marker() for line in (first, second)}) == 2


def test_the_figure_has_a_title_the_dense_point_and_a_row_after_fine_tuning() -> None:
    figure = draw_sweep(_seeded())
    assert figure.get_suptitle() == "x: top-1 left against cost left"
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "right after pruning", "right after pruning", "after fine-tuning", "after fine-tuning"
    ]  # fmt: skip
    above, below = figure.axes[0], figure.axes[2]
    for axes, top1 in ((above, 62.0), (below, 72.0)):
        dense = next(line for line in axes.get_lines() if line.get_label() == "dense")
        assert dense.get_xydata().tolist() == [[100, 100]]
        spans = [collection.get_segments()[0] for collection in axes.collections]
        assert any(np.allclose(span, [[100, 95], [100, 105]]) for span in spans)
        # The standard deviation over seeds is 2 points.
        assert any(np.allclose(span, [[75, (top1 - 2) / 0.8], [75, (top1 + 2) / 0.8]]) for span in spans)


def test_the_page_is_whole_and_loads_nothing() -> None:
    report = replace(_seeded(), about={"model_name": "<b>vit", "calibration_images": 40, "versions": {"torch": "2"}})
    drawings = draw(report)
    assert {*drawings} == {*FIGURES}
    text = page(report, {"model": "abc", "keep": ["<i>"]}, drawings)
    assert "<b>vit" not in text
    assert "&lt;b&gt;vit" in text
    assert "<i>" not in text
    assert text.count("<svg ") == 2
    assert not re.search(r"(src|href)=\"(?!#)", text)
    assert "11 of 12" in text
    assert "missing: 1 of 12 points" in text
    for row in report.table_rows():
        assert all(html.escape(cell) in text for cell in row)


def test_the_figure_has_a_panel_for_each_cost_and_published_points_beside() -> None:
    points = [
        PublishedPoint("paper", 20, 75.0, 90.0, 99.0, "a journal"),
        PublishedPoint("paper", 15, 80.0, 95.0, 99.0, "a journal"),
    ]
    report = _report()
    figure = draw_sweep(report, points)
    macs, params, latency = figure.axes
    assert {line.get_label(): line.get_xydata().tolist() for line in macs.get_lines()} == {
        "paper": [[75, 90], [80, 95]], "l1/none": [[50, 25], [75, 75]], "l2/none": [[50, 50]],
        "dense": [[100, 100]],
    }  # fmt: skip
    assert [line.get_label() for line in params.get_lines()] == ["l1/none", "l2/none", "dense"]
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


def test_a_figure_without_latency_has_no_panel_for_it() -> None:
    report = _report()
    untimed = replace(report, rows=tuple(replace(row, latency=None) for row in report.rows))
    assert (len(draw_sweep(report).axes), len(draw_sweep(untimed).axes)) == (3, 2)
    assert (len(draw_pareto(report).axes), len(draw_pareto(untimed).axes)) == (2, 1)
