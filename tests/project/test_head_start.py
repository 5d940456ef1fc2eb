"""The benchmark of starting points: rows that are written as they come, taken up again, and tables with errors."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

_FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(_FOLDER)
    spec = importlib.util.spec_from_file_location("head_start", _FOLDER / "head_start.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "head_start", module)
    spec.loader.exec_module(module)
    return module


def row(bench: ModuleType, start: str, top1: float, seed: int = 0, epochs: int = 8) -> Any:
    return bench.Row("tune", "deit", start, 0.5, epochs, seed, top1, 80.0, 400, 1.0)


def test_the_tables_have_standard_errors_and_a_conclusion(bench: ModuleType) -> None:
    rows = [row(bench, start, top1, seed) for start, found in (("paper", (60, 62)), ("auto, refits", (70, 73)))
            for seed, top1 in enumerate(found)]  # fmt: skip
    text = bench.results(rows, ("paper", "auto, refits"))
    assert "| 0.5 | paper | 61.00 ± 1.00 |" in text
    assert "| 0.5 | auto, refits | 71.50 ± 1.50 (+10.50 ± 0.50) |" in text
    assert "- After 8 epochs `auto, refits` against `paper`: keep 0.5: above (+10.50 ± 0.50)." in text
    level = bench.results([row(bench, "paper", 60.0), row(bench, "auto, refits", 61.0)], ("paper", "auto, refits"))
    # Of one seed both have the error of their images.
    assert "60.00 ± 2.45" in level
    assert "no difference beyond two standard errors (+1.00 ± 3.46)" in level


def test_all_points_are_runs_that_can_be_checked(bench: ModuleType, tmp_path: Path) -> None:
    from vbp.recipes.checks import check_config

    options = bench.Options(tmp_path, tmp_path, tmp_path, tmp_path / "weights")
    points = list(bench.points(options))
    assert len(points) == len(set(points)) == 3 * (2 + 5) * 3 * 4 * 4
    for point in points:
        if point.part != "small":
            check_config(bench.run_config(options, point))
    with pytest.raises(bench.vbp.InputError, match="part finetune needs images, got no --imagenette"):
        bench.run_config(replace(options, imagenette=None), replace(points[0], part="finetune"))


def test_rows_are_written_as_they_come_and_the_rest_is_measured_later(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    images = bench.Images(torch.randn(20, 3, 4, 4), torch.arange(20) % 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 3))
    monkeypatch.setattr(bench.digits, "write_digits", lambda folder: None)
    monkeypatch.setattr(bench, "load", lambda *_: images)
    monkeypatch.setattr(bench, "trained", lambda *_: model)
    options = bench.Options(
        tmp_path,
        parts=("small",),
        models=("vit",),
        ratios=(0.5,),
        epochs=(0, 1),
        seeds=(0,),
        starts=("paper", "random"),
    )
    bench.main(options)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [(one["start"], one["epochs"]) for one in map(json.loads, rows)] == [
        ("paper", 0), ("paper", 1), ("random", 0), ("random", 1),
    ]  # fmt: skip
    written = (tmp_path / "results.md").read_text()
    assert "| keep ratio | start | 0 epochs | 1 epochs |" in written
    # A kill in the middle of the last line.
    (tmp_path / "rows.jsonl").write_text("\n".join(rows)[:-20])
    capsys.readouterr()
    bench.main(options)
    assert capsys.readouterr().out.count("top-1") == 1
    assert (tmp_path / "rows.jsonl").read_text().splitlines()[:3] == rows[:3]
    assert len(bench.read_rows(tmp_path / "rows.jsonl")) == 4
