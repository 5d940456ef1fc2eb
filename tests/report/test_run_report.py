"""A finished run is read whole; anything else is one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import plan_and_statistics, sites, timing, write_run

from vbp import InputError
from vbp.report.finished_run import read_run
from vbp.report.run_report import RunReport


def test_the_steps_are_those_of_the_summary(tmp_path: Path) -> None:
    summary = write_run(tmp_path)
    run = RunReport.read(tmp_path)
    assert [(label, run.models[name].top1) for name, label in run.steps.items()] == [
        ("dense", summary["base"]["top1"]),
        ("pruned, no compensation", summary["uncompensated"]["top1"]),
        ("pruned, mean shift", summary["pruned"]["top1"]),
        ("fine-tuned, best (epoch 2)", summary["best"]["top1"]),
        ("fine-tuned, final (epoch 3)", summary["final"]["top1"]),
    ]
    assert run.latency == timing()


@pytest.mark.parametrize(
    ("changed", "labels"),
    [
        ({"config": {"compensation": "none"}}, ["dense", "pruned, no compensation"]),
        ({"config": {"compensation": "refit"}}, ["dense", "pruned, no compensation", "pruned, refit"]),
        ({"uncompensated": None}, ["dense", "pruned, mean shift"]),
    ],
)
def test_steps_are_named_after_the_compensation(tmp_path: Path, changed: dict[str, Any], labels: list[str]) -> None:
    pruned = {"top1": 61.12, "top5": 84.5, "macs": 9, "params": 9, "epoch": 0}
    write_run(tmp_path, **changed, best=pruned, final=pruned)
    assert list(RunReport.read(tmp_path).steps.values()) == labels


def test_a_run_without_files_but_the_summary_is_read(tmp_path: Path) -> None:
    write_run(tmp_path)
    for name in ("plan.json", "statistics.safetensors", "metrics.jsonl"):
        (tmp_path / name).unlink()
    run = read_run(tmp_path)
    assert (run.plan, run.statistics, run.epochs) == (None, None, ())


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"config": {}}', '{"config": null}', "\x00"],
)
def test_what_is_no_summary_is_one_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(InputError, match=r"summary\.json is no readable summary of a run"):
        RunReport.read(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"base": {"top1": "72", "top5": 1, "macs": 1, "params": 1}},
        {"base": {"top1": float("nan"), "top5": 1, "macs": 1, "params": 1}},
        {"base": {"top1": 1.0, "top5": 1, "macs": -1, "params": 1}},
        {"base": {"top1": 1.0, "top5": 1, "macs": True, "params": 1}},
        {"keep_ratio": None},
        {"sites": {"a": [1]}},
        {"sites": [1, 2]},
        {"convergence": {"stages": 5}},
        {"reconstruction": {"a": {"mean_shift": 1.0}}},
        {"images": [1]},
        {"sites": {"a": [3, 2]}},
        {"sites": {"a": [0, 0]}},
        {"convergence": {"stages": [], "converged": "x"}},
        {"candidates": [{"name": "priced", "divergence": "0.1", "widths": {}}]},
        {"budget": {"sentence": 3}},
        {"head": {}},
        {"config": {"compensation": None}},
        {"surprise": 1},
        {"latency": {"dense_ms": 12.0}},
        {"latency": 1.25},
    ],
    ids=str,
)
def test_a_damaged_summary_is_one_error(tmp_path: Path, changed: dict[str, Any]) -> None:
    write_run(tmp_path, **changed)
    with pytest.raises(InputError, match=r"summary\.json is no readable summary of a run"):
        RunReport.read(tmp_path)


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    summary = write_run(
        tmp_path,
        reconstruction={"blocks.0.mlp.fc1": {"mean_shift": 3.0, "refit": 1.0, "energy": 4.0}},
        candidates=[{"name": "priced", "divergence": 0.125, "widths": {"blocks.0.mlp.fc1": 20}}],
        head={"layer": "head", "strength": None, "sentence": "left as it was"},
    )
    run = RunReport.read(tmp_path)
    assert RunReport.from_dict(json.loads(json.dumps(run.to_dict()))) == RunReport.from_dict(run.to_dict()) == run
    assert summary.items() <= run.to_dict().items()
    assert run.refits == ("left as it was",)


def test_a_folder_without_a_summary_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a run must be a folder with summary\.json, got .*nowhere"):
        RunReport.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plan.json", b"{}"),
        ("statistics.safetensors", b"12345678"),
        ("metrics.jsonl", b'{"epoch": 1'),
        ("metrics.jsonl", b'{"top1": 1.0}'),
        ("metrics.jsonl", b'{"epoch": 1, "top1": null}'),
    ],
)
def test_another_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    write_run(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read_run(tmp_path)


def test_files_of_different_runs_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    plan_and_statistics(sites(3), keep_ratio=0.7)[0].save(tmp_path / "plan.json")
    with pytest.raises(InputError, match="must come from one run"):
        read_run(tmp_path)
    write_run(tmp_path)
    plan_and_statistics(sites(2))[1].save(tmp_path / "statistics.safetensors")
    with pytest.raises(InputError, match=r"blocks\.2\.mlp\.fc1"):
        read_run(tmp_path)


def test_a_loss_that_became_nan_is_read(tmp_path: Path) -> None:
    write_run(tmp_path)
    row = {"epoch": 1, "top1": 0.1, "top5": 0.5, "train_loss": float("nan")}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n\n")
    (epoch,) = read_run(tmp_path).epochs
    assert epoch["train_loss"] != epoch["train_loss"]
    assert epoch["top1"] == 0.1
