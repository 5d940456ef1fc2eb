"""Runs side by side: what differs is shown, and every number is that of its run."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import pytest
from runs import timing, write_run

from vbp import InputError
from vbp.report import comparison
from vbp.runtime.decode import to_json

compare = partial(comparison.compare, incidental={"save_dir"})

CONFIG = {"model_name": "m", "compensation": "mean", "keep_ratio": 0.5, "mean": [0.5, 0.5], "save_dir": "a"}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    write_run(tmp_path / "a/run", config=CONFIG)
    write_run(
        tmp_path / "b/run",
        config=CONFIG | {"compensation": "refit", "save_dir": "b", "mean": [0, 0]},
        seconds={"x": 1.0},
    )
    return [tmp_path / "a/run", tmp_path / "b/run"]


def cells(table: str) -> dict[str, list[str]]:
    """Return the rows of a table by their label."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows[1:] if row}


def test_settings_that_differ_are_shown_and_no_others(folders: list[Path]) -> None:
    found = compare(folders)
    assert found.settings == {"compensation": ("mean", "refit"), "mean": ([0.5, 0.5], [0, 0])}
    assert cells(found.table())["mean"] == ["0.5 0.5", "0 0"]


def test_the_table_has_the_numbers_of_each_run(folders: list[Path]) -> None:
    table = compare(folders).table()
    assert table.splitlines()[0].split() == ["a/run", "b/run"]
    rows = cells(table)
    assert rows["top-1 dense"] == ["72.02 %"] * 2
    assert rows["top-1 best"] == ["70.86 %"] * 2
    assert rows["MACs"] == ["1.26 G -> 1.01 G (-19.7%)"] * 2
    assert rows["latency"] == ["12.00 -> 10.00 ms"] * 2
    assert rows["measured with"] == ["batch 32 on cpu in float32"] * 2
    assert rows["speed-up (quartiles)"] == ["1.25x (1.21 to 1.31)"] * 2
    assert rows["seconds"] == ["79.1", "1.0"]


def test_the_json_has_every_number_whole(folders: list[Path]) -> None:
    found = compare(folders).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    summary = json.loads((folders[0] / "summary.json").read_text())
    run = found["runs"]["a/run"]
    names = ("base", "uncompensated", "pruned", "best", "final")
    assert {name: summary[name]["top1"] for name in names} == run["top1"]
    assert run["macs"] == {name: summary[name]["macs"] for name in ("base", "pruned")}
    assert run["latency"] == summary["latency"] == to_json(timing())
    assert run["top1_error"] == dict.fromkeys(names)
    assert found["settings"]["compensation"] == {"a/run": "mean", "b/run": "refit"}


def test_each_accuracy_has_its_standard_error(folders: list[Path]) -> None:
    base = {"top1": 80.0, "top5": 90.0, "macs": 9, "params": 9, "images": 400}
    write_run(folders[0], config=CONFIG, base=base)
    found = compare(folders)
    assert cells(found.table())["top-1 dense"] == ["80.00 ± 2.00 %", "72.02 %"]
    run = found.to_dict()["runs"]["a/run"]
    assert (run["top1_error"]["base"], run["top5_error"]["base"]) == (2.0, 1.5)


def test_many_runs_stand_below_each_other(folders: list[Path]) -> None:
    table = compare(folders).table(width=60)
    blocks = table.split("\n\n")
    assert [block.splitlines()[0].strip() for block in blocks] == ["a/run", "b/run"]
    assert max(map(len, table.splitlines())) <= 60
    # A line too short for any run still shows one in each table.
    assert len(compare(folders).table(width=1).split("\n\n")) == 2


def test_what_no_run_measured_has_no_row(folders: list[Path]) -> None:
    for folder in folders:
        base = {"top1": 1.0, "top5": 1.0, "macs": 9, "params": 9}
        write_run(folder, base=base, uncompensated=None, latency=None)
    rows = cells(compare(folders).table())
    assert not {"latency", "measured with", "speed-up (quartiles)", "top-1 pruned, no compensation"} & rows.keys()


def test_a_long_value_keeps_its_end(folders: list[Path]) -> None:
    write_run(folders[0], config=CONFIG | {"checkpoint": "/" + "x" * 80 + "/end.pth"})
    assert cells(compare(folders).table())["checkpoint"][0].endswith("x/end.pth")


def test_the_pruned_model_of_a_run_stands_for_its_run(folders: list[Path]) -> None:
    artefacts = [folder / "artifact" for folder in folders]
    for artefact in artefacts:
        artefact.mkdir()
        (artefact / "vbp.json").write_text("{}")
    assert compare([artefacts[0], folders[1]]).to_dict() == compare(folders).to_dict()
    with pytest.raises(InputError, match="more than once"):
        compare([artefacts[0], folders[0]])


def test_what_cannot_be_compared_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two runs, got 1"):
        compare(folders[:1])
    with pytest.raises(InputError, match="more than once"):
        compare([folders[0], folders[0] / ".." / "run"])
    with pytest.raises(InputError, match="must be a folder with"):
        compare([folders[0], tmp_path])


def test_other_forms_have_a_row_for_each_run(tmp_path: Path) -> None:
    for name, ratio in (("a", 0.5), ("b", 0.4)):
        write_run(tmp_path / name, config={"keep_ratio": ratio, "compensation": "mean"})
    folders = [tmp_path / "a", tmp_path / "b"]
    heading, *rows = csv.reader(compare(folders, incidental=(), form="csv").table().splitlines())
    assert (heading[:2], rows[0][:2], rows[1][:2]) == (["run", "keep_ratio"], ["a", "0.5"], ["b", "0.4"])
    assert len(heading) == len(rows[0]) == len(rows[1])
    lines = compare(folders, incidental=(), form="markdown").table().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| run", "| ---", "| a", "| b"]
