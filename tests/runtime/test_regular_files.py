"""Pipes and devices are never opened: each reader says so at once, and names too long are no traceback."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from vbp import PruningPlan, Statistics, load_classifier, read_artifact
from vbp.data.data_path import list_images
from vbp.deploy.artifact_files import read_folder
from vbp.errors import InputError
from vbp.models.weights import read_weights
from vbp.report.finished_run import read_run
from vbp.report.run_report import RunReport
from vbp.runtime.files import is_regular, open_regular, read_regular
from vbp.training.checkpoints import read_checkpoint


@pytest.fixture(autouse=True)
def end_what_waits() -> Iterator[None]:
    """End a test that waits for a pipe."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(60)
    yield
    signal.alarm(0)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


ODD = pytest.mark.parametrize("make", [make_pipe, link_to_zeros])
READERS: dict[str, Callable[[Path], object]] = {
    "model.pth": read_artifact,
    "weights.safetensors": read_weights,
    "weights.pth": read_weights,
    "statistics.safetensors": Statistics.load,
    "plan.json": PruningPlan.load,
    "epoch_0001_batch_0000002.pth": read_checkpoint,
    "vbp.json": lambda path: read_artifact(path.parent),
    "summary.json": lambda path: RunReport.read(path.parent),
    "config.json": lambda path: load_classifier(str(path.parent)),
}


@ODD
@pytest.mark.parametrize("name", READERS)
def test_a_reader_refuses_what_is_no_regular_file(tmp_path: Path, make: Callable[[Path], None], name: str) -> None:
    make(tmp_path / name)
    with pytest.raises(InputError, match=r"(must|no|cannot) .*"):
        READERS[name](tmp_path / name)


@ODD
def test_a_folder_of_a_model_may_hold_no_pipe(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "config.json").write_text("{}")
    make(tmp_path / "preprocessor_config.json")
    with pytest.raises(InputError, match=r"files and folders alone, got .*preprocessor_config.json; remove it"):
        load_classifier(str(tmp_path))
    weights = {"bytes": 1, "sha256": "0" * 64, "shared": {}}
    (tmp_path / "vbp.json").write_text(json.dumps({"format": "vbp-artifact/2", "weights": weights}))
    make(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors cannot be read \(it is a "):
        read_folder(tmp_path)


@ODD
def test_pipes_among_the_data_are_never_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "val/ant").mkdir(parents=True)
    shutil.copy(tmp_path / "a.png", tmp_path / "val/ant")
    make(tmp_path / "val_index.jsonl")  # a kept list
    assert len(list_images(tmp_path, "val", 1)) == 1
    make(tmp_path / "odd.png")
    (tmp_path / "val_samples.pkl").write_bytes(pickle.dumps([("a.png", 0), ("odd.png", 0)]))
    with pytest.raises(InputError, match=r"must exist, 1 of 2 do not, the first is odd.png"):
        list_images(tmp_path, "val", 1)
    (tmp_path / "wds").mkdir()
    make(tmp_path / "wds/val-0.tar")
    with pytest.raises(InputError, match=r"shards of val must exist, 1 of 1 do not"):
        list_images(f"wds/{tmp_path}/wds", "val", 1)


def test_a_regular_file_is_one_behind_a_link_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert is_regular(tmp_path / "link")
    assert read_regular(tmp_path / "link") == b"abc"
    for name in ("missing", "x" * 300, "zero\0byte", "\ud800"):
        assert not is_regular(tmp_path / name)
    with pytest.raises(OSError, match="it is a folder, and only regular files are read"):
        open_regular(tmp_path)
    torch.save({}, tmp_path / "run.pth")
    with pytest.raises(InputError, match=r"must be a folder with summary.json"):
        read_run(tmp_path)
