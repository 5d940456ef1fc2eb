"""What figures draw is what was measured: checked on the numbers behind them and on the drawn shapes."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from runs import sites, write_run

from vbp import PruningPlan, Site, Statistics
from vbp.method.moments import channel_moments
from vbp.pruning.plan import SitePlan
from vbp.report.figures import (
    accuracy_against_macs,
    accuracy_steps,
    kept_channels,
    latency_bars,
    plan_convergence,
    reconstruction_errors,
    training_curves,
)
from vbp.report.finished_run import read_run
from vbp.report.published import PAPER_POINTS
from vbp.report.run_report import RunReport
from vbp.report.spectrum import Spectrum, outlines, short_names, site_errors, spectra, variance_spectra


def run_of(folder: Path, values: torch.Tensor, keep: tuple[int, ...], compensation: str) -> Any:
    """Return a run of one site whose hidden values are known."""
    site = Site(("fc1",), "fc2", values.shape[1])
    write_run(folder, found=[site], config={"compensation": compensation}, sites={"fc1": [len(keep), site.hidden]})
    PruningPlan((SitePlan(site, keep),), 0.5, "global").save(folder / "plan.json")
    Statistics({"fc1": channel_moments(values)}, 10, "m").save(folder / "statistics.safetensors")
    return read_run(folder)


@pytest.mark.parametrize("compensation", ["mean", "none"])
def test_the_error_of_a_site_is_that_of_its_channels(tmp_path: Path, compensation: str) -> None:
    values = torch.randn(500, 6, dtype=torch.float64) * torch.arange(1, 7) + 0.7
    stand_in = values.mean(0) if compensation == "mean" else torch.zeros(6, dtype=torch.float64)
    pruned = values.clone()
    pruned[:, [0, 2]] = stand_in[[0, 2]]
    oracle = (values - pruned).square().sum() / (values - values.mean(0)).square().sum()
    found = site_errors(run_of(tmp_path, values, (1, 3, 4, 5), compensation))
    assert found is not None
    assert found.at == "hidden"
    assert found.errors[0].before == pytest.approx(float(oracle), rel=1e-12)


def test_measured_errors_are_shares_of_the_energy(tmp_path: Path) -> None:
    write_run(tmp_path, reconstruction={
        "blocks.0.mlp.fc1": {"mean_shift": 3.0, "refit": 1.0, "energy": 4.0},
        "blocks.1.mlp.fc1": {"mean_shift": 0.0, "refit": 0.0, "energy": 0.0},
    })  # fmt: skip
    found = site_errors(read_run(tmp_path))
    assert found is not None
    assert [(error.before, error.refit) for error in found.errors] == [(0.75, 0.25), (0.0, 0.0)]
    drawing = reconstruction_errors(read_run(tmp_path))
    assert drawing is not None
    assert drawing.rows == (("blocks.0.mlp.fc1", "75.00", "25.00"), ("blocks.1.mlp.fc1", "0.00", "0.00"))


def test_a_spectrum_is_sorted_and_keeps_track_of_what_stays(tmp_path: Path) -> None:
    values = torch.tensor([[0.0, 1.0, -3.0, 2.0], [0.0, -1.0, 3.0, -2.0]], dtype=torch.float64)
    (spectrum,) = spectra(run_of(tmp_path, values, (0, 2), "mean"))
    assert spectrum.scores.tolist() == [18.0, 8.0, 2.0, 0.0]
    assert spectrum.kept.tolist() == [True, False, False, True]


@pytest.mark.parametrize(("channels", "kept"), [(1, 1), (7, 3), (40, 40), (3072, 1), (3072, 1001), (4096, 4095)])
def test_the_drawn_cut_is_where_the_plan_cuts(channels: int, kept: int) -> None:
    spectrum = Spectrum("s", np.logspace(2, -3, channels), np.arange(channels) < kept)
    pieces = outlines(spectrum, 24, -3, 2)
    assert [stays for stays, _ in pieces] == [True, False][: 1 + (kept < channels)]
    assert pieces[0][1][:, 0].max() == pytest.approx(kept / channels, abs=1e-12)
    assert pieces[-1][1][:, 0].max() == 1
    # The area below a line from 1 to 0 is a half, at any coarseness.
    if channels > 1000:
        area = sum(np.trapezoid(outline[:, 1], outline[:, 0]) for _, outline in pieces)
        assert area == pytest.approx(0.5, abs=1e-3)


def test_attention_sites_have_spectra_and_no_hidden_error_of_queries(tmp_path: Path) -> None:
    found = [
        Site(("a.qkv", "a.qkv"), "", 8, "query_key", offsets=(0, 8), heads=2),
        Site(("a.qkv",), "a.proj", 8, "value", offsets=(16,), heads=2),
        *sites(1),
    ]
    write_run(tmp_path, found=found)
    run = read_run(tmp_path)
    assert [spectrum.site for spectrum in spectra(run)] == ["a.qkv", "a.proj", "blocks.0.mlp.fc1"]
    errors = site_errors(run)
    assert errors is not None
    assert [error.site for error in errors.errors] == ["a.proj", "blocks.0.mlp.fc1"]
    drawing = variance_spectra(run)
    assert drawing is not None
    assert "Query/key" in drawing.caption
    assert run.plan is not None
    entries = (replace(entry, basis="principal") for entry in run.plan.sites[:2])
    turned = replace(run, plan=replace(run.plan, sites=(*entries, run.plan.sites[2])))
    assert [spectrum.site for spectrum in spectra(turned)] == ["blocks.0.mlp.fc1"]
    drawing = variance_spectra(turned)
    assert drawing is not None
    assert "Query/key" not in drawing.caption
    assert "Attention is not shown: it is cut in its principal basis" in drawing.caption


def test_dead_channels_and_constant_sites_can_be_drawn(tmp_path: Path) -> None:
    run = run_of(tmp_path, torch.zeros(5, 3, dtype=torch.float64), (0,), "mean")
    errors = site_errors(run)
    assert errors is not None
    assert errors.errors[0].before == 0
    assert variance_spectra(run) is not None
    assert reconstruction_errors(run) is not None


@pytest.mark.parametrize(
    ("names", "pattern", "short"),
    [
        (["blocks.0.fc1", "blocks.11.fc1"], "blocks.*.fc1", ("0", "11")),
        (["l.0.b.1.fc", "l.1.b.1.fc"], "l.*.b.1.fc", ("0", "1")),
        (["a.0.qkv", "a.0.fc1", "a.1.fc1"], "a.*.*", ("0.qkv", "0.fc1", "1.fc1")),
        (["a.b", "a.b.c"], "", ("a.b", "a.b.c")),
        (["fc1", "fc2"], "", ("fc1", "fc2")),
        (["only.one"], "", ("only.one",)),
        ([], "", ()),
    ],
)
def test_short_names_tell_sites_apart(names: list[str], pattern: str, short: tuple[str, ...]) -> None:
    assert short_names(names) == (pattern, short)
    assert len(set(short)) == len(names)


def test_published_points_agree_with_what_is_published_about_them() -> None:
    found = {(point.model, point.removed): point for point in PAPER_POINTS}
    assert len(found) == len(PAPER_POINTS)
    # The paper gives these shares beside the numbers from which the points are computed.
    assert found["DeiT-B", 55].macs == pytest.approx(100 - 34.9, abs=0.05)
    assert found["DeiT-T", 0] == type(found["DeiT-T", 0])("DeiT-T", 0, 100.0, 100.0, 100.0)
    assert found["DeiT-T", 50].tuned == pytest.approx(100 * 69.70 / 72.02)
    assert all(point.pruned is None or point.pruned <= point.tuned for point in PAPER_POINTS)


def test_the_ideal_latency_follows_macs(tmp_path: Path) -> None:
    summary = write_run(tmp_path)
    drawing = latency_bars(RunReport.read(tmp_path))
    assert drawing is not None
    ideal = 12.0 * summary["pruned"]["macs"] / summary["base"]["macs"]
    assert drawing.rows == (
        ("dense", "12.00", "1.00x"),
        ("pruned", "10.00", "1.25x (1.21 to 1.31)"),
        ("if time followed MACs", f"{ideal:.2f}", f"{12 / ideal:.2f}x"),
    )


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    base = {"top1": 0.0, "top5": 0.0, "macs": 5, "params": 5}
    write_run(
        tmp_path,
        base=base,
        latency=None,
        sites={},
        convergence={"stages": [{"images": 9, "changed": None}], "converged": None},
    )
    for name in ("plan.json", "metrics.jsonl"):
        (tmp_path / name).unlink()
    run = read_run(tmp_path)
    assert accuracy_against_macs(run.report) is None
    assert latency_bars(run.report) is None
    assert plan_convergence(run.report) is None
    assert kept_channels(run.report) is None
    assert training_curves(run.report, run.epochs) is None
    assert reconstruction_errors(run) is None
    assert variance_spectra(run) is None


def test_no_chart_has_a_single_dot(tmp_path: Path) -> None:
    stages = [{"images": 450, "changed": None}, {"images": 901, "changed": 0.003}]
    write_run(tmp_path, convergence={"stages": stages, "converged": 901})
    run = read_run(tmp_path)
    assert plan_convergence(run.report) is None
    assert training_curves(run.report, run.epochs[:2]) is None
    assert training_curves(run.report, run.epochs[:3]) is not None


def test_published_points_stand_beside_runs_on_imagenet_alone(tmp_path: Path) -> None:
    write_run(tmp_path)
    drawing = accuracy_against_macs(RunReport.read(tmp_path))
    assert drawing is not None
    assert len(drawing.rows) == 1 + sum(point.removed > 0 for point in PAPER_POINTS)
    write_run(tmp_path, imagenet=False)
    assert accuracy_against_macs(RunReport.read(tmp_path)) is None


def test_a_cut_is_drawn_only_where_the_ranking_is_by_variance(tmp_path: Path) -> None:
    values = torch.tensor([[0.0, 1.0, -3.0, 2.0], [0.0, -1.0, 3.0, -2.0]], dtype=torch.float64)
    by_variance, other = (run_of(tmp_path / str(keep), values, keep, "mean") for keep in ((2, 3), (0, 2)))
    assert [spectrum.cut for run in (by_variance, other) for spectrum in spectra(run)] == [True, False]
    for run, drawn in ((by_variance, True), (other, False)):
        drawing = variance_spectra(run)
        assert drawing is not None
        assert (b">cut<" in drawing.svg) is drawn
        assert ("The line is the cut" in drawing.caption) is drawn
    # Of equal variances those that are kept come first.
    (spectrum,) = spectra(run_of(tmp_path / "equal", torch.zeros(5, 3, dtype=torch.float64), (1,), "mean"))
    assert spectrum.cut


def test_the_spectrum_is_as_wide_as_the_page_and_names_its_axes(tmp_path: Path) -> None:
    write_run(tmp_path, 12)
    drawing = variance_spectra(read_run(tmp_path))
    assert drawing is not None
    assert drawing.wide
    box = drawing.inline_svg.split('viewBox="')[1].split('"')[0].split()
    assert float(box[2]) > 650
    for name in (b"channels of a site, the largest variance first", b">variance<"):
        assert name in drawing.svg


def test_a_loss_that_became_nan_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path)
    rows = [{"epoch": epoch, "top1": 1.0, "top5": 5.0, "train_loss": math.nan} for epoch in range(3)]
    drawing = training_curves(RunReport.read(tmp_path), rows)
    assert drawing is not None
    assert drawing.rows[1] == ("1", "1.00", "5.00", "", "nan", "")


def test_drawing_is_deterministic_and_leaves_matplotlib_alone(tmp_path: Path) -> None:
    write_run(tmp_path)
    settings, had_pyplot = dict(mpl.rcParams), "matplotlib.pyplot" in sys.modules
    first, second = (kept_channels(RunReport.read(tmp_path)) for _ in range(2))
    assert first == second
    assert dict(mpl.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_accuracies_are_drawn_with_their_standard_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[Any]] = {}

    def kept(figure: Figure, name: str) -> tuple[bytes, bytes]:
        drawn[name] = [
            segment.tolist()
            for axes in figure.axes
            for collection in axes.collections
            if isinstance(collection, LineCollection)
            for segment in collection.get_segments()
        ]
        return b"", b""

    monkeypatch.setattr("vbp.report.figures.render", kept)
    small = {"macs": 5, "params": 5, "images": 400}
    pruned, best = {"top1": 50.0, "top5": 90.0, "epoch": 0} | small, {"top1": 60.0, "top5": 100.0, "epoch": 1} | small
    base = {"top1": 80.0, "top5": 100.0, "macs": 10, "params": 10, "images": 400}
    write_run(tmp_path, base=base, pruned=pruned, best=best, final=best, uncompensated=None)
    run = RunReport.read(tmp_path)
    steps = accuracy_steps(run)
    assert drawn["accuracy"] == [
        [[78.0, 0.0], [82.0, 0.0]],
        [[47.5, 1.0], [52.5, 1.0]],
        *([[60 - 6**0.5, place], [60 + 6**0.5, place]] for place in (2.0, 3.0)),
    ]
    assert [row[1:3] for row in steps.rows] == [
        ("80.00 ± 2.00", "100.00"), ("50.00 ± 2.50", "90.00 ± 1.50"), *[("60.00 ± 2.45", "100.00")] * 2
    ]  # fmt: skip
    assert "dense 80.00 ± 2.00 %" in steps.alt
    accuracy_against_macs(run)
    assert drawn["accuracy_macs"][0] == [[50.0, 62.5 - 3.125], [50.0, 62.5 + 3.125]]
    epochs = [{"epoch": epoch, "top1": top1, "top5": 90.0} for epoch, top1 in enumerate((50.0, 0.0, 0.0))]
    curves = training_curves(run, epochs)
    # At 0 % a count does not tell the error.
    assert drawn["training"] == [[[0.0, 47.5], [0.0, 52.5]]]
    assert curves is not None
    assert [row[1] for row in curves.rows] == ["50.00 ± 2.50", "0.00", "0.00"]
    assert "one standard error" in curves.caption
    latency_bars(run)
    assert drawn["latency"] == [[[11.96, 0.0], [12.06, 0.0]], [[9.96, 1.0], [10.06, 1.0]]]
