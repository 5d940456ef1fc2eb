"""The summary has the keys that others read, and the table says what the figures say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from runs import timing

from vbp import RunConfig, RunReport
from vbp.report.run_report import Measured

MODEL_KEYS = {"top1", "top5", "macs", "params"}
SUMMARY_KEYS = {
    "base",
    "pruned",
    "best",
    "final",
    "keep_ratio",
    "sites",
    "seconds",
    "images",
    "versions",
    "config",
}
STAGES = ("calibration", "planning", "surgery", "finetune", "evaluation")


def config(**changed: object) -> dict[str, object]:
    """Return a configuration as a run writes it."""
    return {"data_path": "data", "compensation": "mean", "keep_ratio": 0.65} | changed


REPORT = RunReport(
    base=Measured(72.016, 91.1, 1_258_000_000, 5_717_416),
    pruned=Measured(61.12, 84.5, 1_010_000_000, 4_480_000, epoch=0),
    best=Measured(70.86, 90.2, 1_010_000_000, 4_480_000, epoch=7),
    final=Measured(70.5, 90.1, 1_010_000_000, 4_480_000, epoch=10),
    uncompensated=None,
    keep_ratio=0.55,
    sites={"blocks.0.mlp.fc1": (30, 40), "blocks.1.mlp.fc1": (25, 60)},
    seconds=dict.fromkeys(STAGES, 1.5),
    images={"calibration": 1000, "val": 1300},
    convergence={"stages": [{"images": 1000, "changed": None}], "converged": None},
    latency=timing(),
    device="cpu",
    processes=1,
    versions={"torch": "2"},
    config=config(),
    files={"summary.json": "out/summary.json"},
)
WITHOUT = Measured(55.64, 80.1, 1_010_000_000, 4_480_000)


def test_the_summary_has_the_keys_that_the_readme_promises() -> None:
    summary = REPORT.to_dict()
    assert summary.keys() >= SUMMARY_KEYS
    for name in ("base", "pruned", "best", "final"):
        assert summary[name].keys() >= MODEL_KEYS
        assert {key: summary[name][key] for key in MODEL_KEYS} == {
            key: getattr(getattr(REPORT, name), key) for key in MODEL_KEYS
        }
    assert summary["seconds"].keys() >= set(STAGES)
    assert summary["images"].keys() >= {"calibration", "val"}
    assert summary["sites"] == {"blocks.0.mlp.fc1": [30, 40], "blocks.1.mlp.fc1": [25, 60]}
    assert summary["config"]["data_path"] == "data"


def test_the_summary_is_plain_json_data() -> None:
    report = dataclasses.replace(REPORT, uncompensated=WITHOUT)
    summary = report.to_dict()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["uncompensated"]["top1"] == 55.64


def test_what_was_not_measured_is_left_out() -> None:
    summary = REPORT.to_dict()
    assert "uncompensated" not in summary
    assert "epoch" not in summary["base"]
    assert dataclasses.replace(REPORT, latency=None).to_dict()["latency"] is None
    # Epoch 0 and 0 % are results.
    assert summary["pruned"]["epoch"] == 0
    nothing = dataclasses.replace(REPORT, final=Measured(0.0, 0.0, 1, 1, epoch=0)).to_dict()["final"]
    assert nothing == {"top1": 0.0, "top5": 0.0, "macs": 1, "params": 1, "epoch": 0}


def test_the_keep_ratio_is_the_one_achieved() -> None:
    assert REPORT.keep_ratio == REPORT.to_dict()["keep_ratio"] == 55 / 100
    assert REPORT.to_dict()["config"]["keep_ratio"] == 0.65


def test_changing_the_summary_leaves_the_report() -> None:
    summary = REPORT.to_dict()
    summary["sites"].clear()
    summary["config"].clear()
    summary["seconds"].clear()
    assert REPORT.to_dict()["config"] == config()
    assert len(REPORT.sites) == 2
    assert set(REPORT.seconds) == set(STAGES)


def labels(report: RunReport) -> list[str]:
    """Return the first column of the table, without heading and the lines below."""
    return [line.split("  ")[0] for line in report.table().splitlines()[1 : 1 + len(report.steps)]]


def test_the_table_has_a_row_for_each_step() -> None:
    report = dataclasses.replace(REPORT, uncompensated=WITHOUT)
    heading, *rows, kept, speed, files = report.table().splitlines()
    assert heading.split() == ["top-1", "%", "top-5", "%", "MACs", "params", "latency"]
    cells = [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows]
    assert cells == [
        ["dense", "72.02", "91.10", "1.26 G", "5.72 M", "12.00 ms"],
        ["pruned, no compensation", "55.64", "80.10", "1.01 G", "4.48 M"],
        ["pruned, mean shift", "61.12", "84.50", "1.01 G", "4.48 M", "10.00 ms"],
        ["fine-tuned, best (epoch 7)", "70.86", "90.20", "1.01 G", "4.48 M"],
        ["fine-tuned, final (epoch 10)", "70.50", "90.10", "1.01 G", "4.48 M"],
    ]
    assert {len(row) for row in rows} == {len(heading)}
    assert kept == "kept 55.0% of the hidden channels; 1300 validation images"
    # Not the quotient of the two medians, 1.20.
    assert speed == (
        "speed-up 1.25x (1.21 to 1.31), median and quartiles, at batch 32 on cpu in float32; 1.25x by MACs"
    )
    assert files == (
        "artifact/ and vbp_best.pth hold the row 'fine-tuned, best (epoch 7)', "
        "vbp_final.pth 'fine-tuned, final (epoch 10)'"
    )


def test_without_fine_tuning_and_latency_the_table_says_nothing_of_them() -> None:
    report = dataclasses.replace(
        REPORT,
        latency=None,
        best=REPORT.pruned,
        final=REPORT.pruned,
    )
    assert labels(report) == ["dense", "pruned, mean shift"]
    assert "speed-up" not in report.table()
    assert report.table().endswith("artifact/, vbp_best.pth and vbp_final.pth hold the row 'pruned, mean shift'")


def test_the_row_of_the_pruned_model_names_the_refit() -> None:
    report = dataclasses.replace(REPORT, config=config(compensation="refit"))
    assert labels(report)[1] == "pruned, refit"


def test_the_table_tells_of_a_budget_other_than_the_keep_ratio_and_of_one_that_is_missed() -> None:
    told = {"sentence": "budget told", "met": True, "budget": {"quantity": "macs", "amount": 0.8}}
    assert dataclasses.replace(REPORT, budget=told).table().splitlines()[-2] == "budget told"
    plain = told | {"budget": {"quantity": "keep_ratio", "amount": 0.5}}
    assert "budget told" not in dataclasses.replace(REPORT, budget=plain).table()
    assert "budget told" in dataclasses.replace(REPORT, budget=plain | {"met": False}).table()


def test_without_compensation_no_row_speaks_of_a_mean_shift() -> None:
    report = dataclasses.replace(REPORT, config=config(compensation="none"))
    assert labels(report)[1] == "pruned, no compensation"
    assert "mean" not in report.table()


def test_no_two_rows_of_a_table_bear_one_name() -> None:
    report = dataclasses.replace(REPORT, config=config(compensation="none"), uncompensated=WITHOUT)
    assert len(set(labels(report))) == len(labels(report))


def test_a_best_model_that_was_not_tuned_is_not_called_tuned() -> None:
    # Tuning made it worse: the best is the pruned model, epoch 0.
    report = dataclasses.replace(REPORT, best=REPORT.pruned)
    assert "fine-tuned, best (epoch 0)" not in labels(report)
    assert "fine-tuned, final (epoch 10)" in labels(report)


def test_the_configuration_of_a_run_fits_the_table() -> None:
    report = dataclasses.replace(REPORT, config=RunConfig(Path("data")).to_dict())
    assert labels(report)[1] == "pruned, refit"
    assert json.loads(json.dumps(report.to_dict()))["config"]["compensation"] == "refit"


def test_each_accuracy_stands_beside_its_standard_error() -> None:
    """Kin to comparisons of single runs by differences that the number of images cannot show."""
    counted = dataclasses.replace(REPORT, base=dataclasses.replace(REPORT.base, top1=80.0, top5=100.0, images=400))
    assert "80.00 ± 2.00" in counted.table().splitlines()[1]
    assert [line.count("±") for line in counted.table().splitlines()] == [0, 1, 0, 0, 0, 0, 0, 0]
    assert counted.base.top5_text == "100.00"


def test_the_table_says_which_row_each_file_is_where_no_epoch_was_better() -> None:
    report = dataclasses.replace(REPORT, best=REPORT.pruned)
    assert report.table().splitlines()[-1] == (
        "no epoch was better than none: artifact/ and vbp_best.pth hold the row 'pruned, mean shift', "
        "vbp_final.pth 'fine-tuned, final (epoch 10)'"
    )
    assert not REPORT.file_text.startswith("no epoch")


def test_the_summary_says_which_row_each_file_is() -> None:
    def rows(report: RunReport) -> dict[str, str]:
        found: dict[str, str] = report.to_dict()["file_rows"]
        assert {*found.values()} <= report.to_dict().keys()
        assert RunReport.from_dict(json.loads(json.dumps(report.to_dict()))).file_rows == found
        return found

    assert rows(REPORT) == {"artifact": "best", "vbp_best.pth": "best", "vbp_final.pth": "final"}
    untuned = dataclasses.replace(REPORT, best=REPORT.pruned)
    assert rows(untuned) == {"artifact": "pruned", "vbp_best.pth": "pruned", "vbp_final.pth": "final"}
    assert set(rows(dataclasses.replace(untuned, final=REPORT.pruned)).values()) == {"pruned"}
