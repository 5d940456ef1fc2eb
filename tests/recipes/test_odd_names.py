"""Names with line breaks, control characters and bytes that are no UTF-8: refused before the work, or escaped."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from vbp import InputError, RunConfig, list_images, load_pruned, model_card, read_artifact, save_pruned
from vbp.cli.main import guarded, main
from vbp.data.loader import make_loader
from vbp.data.preprocessing import Preprocessing, evaluation_transform
from vbp.deploy.artifact_files import MANIFEST
from vbp.errors import printable
from vbp.recipes.checks import check_config
from vbp.runtime.log_file import LineFormatter

FORGED = "\n2026-01-01 00:00:00 INFO    forged"
ODD = ["b\udcff.png", f"c{FORGED}.png", "e\x1b[2Jf.png", "g\u202eh\u2028i.png", "\udcfe" * 200 + ".png"]
UNREADABLE = f"z\udcff{FORGED}.png"
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO   |WARNING|ERROR  ) \S?.*")


@pytest.fixture(autouse=True)
def _encodable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pytest keep its records of the log as lines that it can send from one process to another."""
    for handler in logging.getLogger().handlers:
        monkeypatch.setattr(handler, "formatter", LineFormatter())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a line break in its name: a tiny model, and images with odd names."""
    folder = tmp_path / f"odd{FORGED}\x1b[31m"
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16,
        patch_size=8, num_labels=2,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder / "model")
    pixels = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (folder / "data" / split / name).mkdir(parents=True)
            for image in ("a.png", *ODD):
                Image.fromarray(pixels.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(
                    folder / "data" / split / name / image
                )
        (folder / "data" / split / "ant" / UNREADABLE).write_bytes(b"x")
    return folder


@pytest.fixture
def type_(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that types `vbp run` on the folder, or other words."""
    monkeypatch.setattr("vbp.cost.timing.TURN_S", 0.005)
    monkeypatch.setattr("vbp.cost.timing.CPU_BATCH_MACS", 1)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def run(*words: str, command: str = "run") -> int:
        flags = f"--img_size 16 --crop_pct 1 --interpolation bilinear --mean {'0.5 ' * 3} --std {'0.5 ' * 3}"
        flags += " --allow_bad_dense --num_workers 0 --device cpu --epochs_ft 1 --train_batch_size 4"
        where = ["--data_path", f"{folder}/data", "--model_name", f"{folder}/model"]
        own = [*where, *flags.split()] if command == "run" else []
        monkeypatch.setattr(sys, "argv", ["vbp", command, *own, *words])
        return main()

    return run


def test_a_run_on_odd_names_is_whole_and_its_log_is_not_forged(
    folder: Path, type_: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_("--save_dir", f"{folder}/out") == 0
    terminal = capsys.readouterr().err
    out = folder / "out"
    log = (out / "vbp_imagenet.log").read_bytes().decode()
    for text in (log, terminal):
        assert not any(line.startswith("2026-01-01") for line in text.splitlines())
        assert "\x1b[31m" not in text.replace("\x1b[A", "")
        assert f"cannot read the image {printable(f'{folder}/data/val/ant/{UNREADABLE}')} (Unid" in text
    assert all(LINE.fullmatch(line) for line in log.rstrip("\n").split("\n"))
    for name in ("summary.json", "config.json", "plan.json", "artifact/vbp.json"):
        json.loads((out / name).read_bytes().decode())
    page = (out / "report.html").read_bytes().decode()
    assert printable(str(folder / "data")) in page
    assert "\x1b" not in page
    assert FORGED not in (out / "report.md").read_bytes().decode()
    assert load_pruned(out / "artifact").config.num_labels == 2
    assert read_artifact(out / "artifact").class_names == ("ant", "bee")
    index = (folder / "data/val_index.jsonl").read_bytes().decode("ascii")
    assert len(index.splitlines()) == 1 + 2 * (1 + len(ODD)) + 1
    assert type_(f"{out}/artifact", command="inspect") == 0
    assert capsys.readouterr().out.startswith("ViTForImageClassification: ")


@pytest.mark.parametrize("name", [b"ant\xff", b"ant\n2026-01-01 00:00:00 INFO", b"ant\x1b[2J"])
def test_class_folders_that_cannot_stand_in_results_are_refused_before_the_work(
    folder: Path, type_: Callable[..., int], capsys: pytest.CaptureFixture[str], name: bytes
) -> None:
    for split in ("train", "val"):
        (folder / "data" / split / "ant").rename(folder / "data" / split / os.fsdecode(name))
    assert type_("--save_dir", f"{folder}/out") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the names of class folders must be UTF-8 without control characters, for they")
    assert f"got {printable(os.fsdecode(name))} in {printable(str(folder))}/data/train; rename them" in last
    assert not (folder / "out").exists()


PATHS = {
    "run": ["--data_path", "data", "--save_dir"],
    "sweep": ["--data_path", "data", "--stats_path"],
    "export": ["artifact", "--output"],
    "latency": [],
    "demo": ["--folder"],
    "inspect": [],
    "compare": ["other"],
}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x" * 256, "a path of at most 4000 bytes, with at most 255 between two slashes, got 256 and 256 (xxx"),
        ("x/" * 2100, "and 1 (x/x"),
        ("a\udcff\nb", "a path in UTF-8, got a\\udcff\\nb; rename the folder"),
    ],
)
@pytest.mark.parametrize("command", PATHS)
def test_paths_that_cannot_be_are_one_line_before_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    path: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["vbp", command, *PATHS[command], path])
    assert main() == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_the_library_says_the_same(tmp_path: Path) -> None:
    for name in ("save_dir", "log_dir", "stats_path", "checkpoint", "convnext_checkpoint"):
        with pytest.raises(InputError, match=f"{name} must be a path of at most"):
            check_config(RunConfig("data", **{name: Path("x" * 256)}))
    for name in ("resume", "model_name"):
        with pytest.raises(InputError, match=f"{name} must be a path in UTF-8"):
            check_config(RunConfig("data", **{name: "\udcff"}))
    with pytest.raises(InputError, match="data_path must be a path of at most"):
        list_images("x" * 256, "val", 2)
    with pytest.raises(InputError, match="a pruned model must be a path of at most"):
        read_artifact("x" * 256)


def test_results_hold_odd_class_names_of_a_model(tmp_path: Path) -> None:
    """Those of a configuration may be anything that JSON can say: nothing is lost, and the card is UTF-8."""
    names = ["\udcff", f"b{FORGED}"]
    model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    for place in (tmp_path / "folder", tmp_path / "model.pth"):
        save_pruned(model, place, plans=[], class_names=names, settings={"model_name": names[0] + names[1]})
        assert read_artifact(place).class_names == tuple(names)
    assert json.loads((tmp_path / "folder" / MANIFEST).read_bytes().decode())["class_names"] == names
    card = model_card(read_artifact(tmp_path / "folder"), "me/tiny")
    card.encode()
    assert "| `model_name` | \\\\udcffb 2026-01-01" in card


def test_a_long_name_of_an_output_can_be_written(tmp_path: Path) -> None:
    model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    save_pruned(model, tmp_path / ("x" * 251 + ".pth"), plans=[])
    assert [len(entry.name) for entry in tmp_path.iterdir()] == [255]


def test_errors_are_one_line_whatever_is_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise InputError("got a\udcff\nb\x1b[2J")

    assert guarded(fail) == 1
    assert capsys.readouterr().err == "error: got a\\udcff\\nb\\x1b[2J\n"
    assert printable("caf\u00e9 \u732b a\\nb") == "caf\u00e9 \u732b a\\nb"
    assert printable("\t\x7f\x85\u2028\u202e\ud800") == "\\t\\x7f\\x85\\u2028\\u202e\\ud800"


def test_an_unreadable_image_with_an_odd_name_is_counted(folder: Path) -> None:
    transform = evaluation_transform(Preprocessing((16, 16), 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3))
    loader = make_loader(list_images(folder / "data", "val", 2), transform, batch_size=4, num_workers=0)
    assert sum(len(labels) for _, labels in loader) == 2 * (1 + len(ODD))
    assert list(loader.unreadable) == [f"{folder}/data/val/ant/{UNREADABLE}"]
