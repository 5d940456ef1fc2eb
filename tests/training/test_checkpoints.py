"""A checkpoint gives back what was saved or is refused by name; there is always a whole one to go back to."""

from __future__ import annotations

import logging
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from vbp import InputError, OutputError
from vbp.runtime.sealed import write_sealed
from vbp.training import checkpoints
from vbp.training.checkpoints import (
    FORMAT,
    checked_content,
    checkpoint_fault,
    clear_checkpoints,
    has_checkpoints,
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)


def training_state(seed: int = 0) -> dict[str, Any]:
    """Return what a training step leaves behind, of each kind."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": [torch.get_rng_state()],
        "half": torch.randn(4).bfloat16(),
        "best": {"epoch": 1, "top1": 71.25, "top5": None},
        "rows": [{"epoch": 0, "note": "größe"}, (1, True)],
        "ordered": OrderedDict(a=1),
    }


def same(a: Any, b: Any) -> bool:
    """Compare bit for bit, types included."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


@pytest.mark.parametrize("state", [{}, {"settings": 3}, {"settings": {"a": torch.ones(2)}}])
def test_a_checkpoint_of_something_else_is_one_error(state: dict[str, Any], tmp_path: Path) -> None:
    """A file with a valid digest may hold anything: whoever wrote it need not have been a run."""
    path = saved(tmp_path, 1, **state)
    with (
        pytest.raises(InputError, match=r"epoch0001.* is no checkpoint that can be continued: its content is not"),
        checked_content(path),
    ):
        float(read_checkpoint(path)["settings"]["a"])


def saved(run: Path, epoch: int, batch: int = 0, **state: Any) -> Path:
    """Save a checkpoint of a run."""
    return save_checkpoint(run, state, epoch=epoch, batch=batch)


def newest(run: Path) -> dict[str, Any]:
    """Read the newest checkpoint of a run."""
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return read_checkpoint(path)


def names(run: Path) -> list[str]:
    """List the files among a run's checkpoints, without their common ending."""
    return sorted(path.name.removesuffix("-batch000000.pt") for path in (run / "checkpoints").iterdir())


def flip(path: Path, place: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << (place % 8)
    path.write_bytes(content)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = training_state()
    path = saved(tmp_path / "new", 3, 120, **state)
    assert path == tmp_path / "new" / "checkpoints" / "epoch0003-batch000120.pt"
    assert same(read_checkpoint(path), state)
    # The file is plain for others too: PyTorch and any zip tool read it.
    assert same(torch.load(path, weights_only=True)["state"], state)
    assert zipfile.ZipFile(path).testzip() is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of a whole checkpoint."""
    state = {"weight": torch.arange(40.0), "rows": [1, "two"]}
    return saved(tmp_path_factory.mktemp("whole"), 1, **state).read_bytes()


def test_flipped_bits_are_found_wherever_they_are(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "epoch0001-batch000000.pt"
    unnoticed = []
    for place in [*range(0, len(whole), 17), *range(len(whole) - 130, len(whole), 3)]:
        path.write_bytes(whole)
        flip(path, place)
        if checkpoint_fault(path) is None:
            unnoticed.append(place)
    assert unnoticed == []
    path.write_bytes(whole)
    assert checkpoint_fault(path) is None


def test_a_flipped_weight_is_an_error_though_pytorch_reads_it(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "flipped.pt"
    path.write_bytes(whole)
    flip(path, whole.index(torch.arange(40.0).numpy().tobytes()) + 12)
    assert not torch.equal(torch.load(path, weights_only=True)["state"]["weight"], torch.arange(40.0))
    with pytest.raises(InputError, match=r"flipped\.pt .* damaged .* digest"):
        read_checkpoint(path)


@pytest.mark.parametrize("left", [0, 1, 60, 0.5, -1])
def test_a_torn_file_is_named(whole: bytes, tmp_path: Path, left: float) -> None:
    path = tmp_path / "torn.pt"
    path.write_bytes(whole[: int(left * len(whole)) if 0 < left < 1 else int(left)])
    with pytest.raises(InputError, match=r"torn\.pt is no checkpoint .* cut off"):
        read_checkpoint(path)


def test_a_file_that_goes_on_after_its_end_is_refused(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "long.pt").write_bytes(whole + b"x")
    with pytest.raises(InputError, match="cut off, or is another kind of file"):
        read_checkpoint(tmp_path / "long.pt")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with pytest.raises(InputError, match=r"model\.pth .* no such file"):
        read_checkpoint(path)
    torch.save({"state": training_state()}, path)
    with pytest.raises(InputError, match="another kind of file"):
        read_checkpoint(path)
    path.write_text("notes")
    with pytest.raises(InputError, match="another kind of file"):
        read_checkpoint(path)
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path)


def test_another_format_is_said(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FORMAT", "vbp-checkpoint/2")
    (tmp_path / "old.pt").write_bytes(whole)
    with pytest.raises(InputError, match="has format vbp-checkpoint/1, allowed is vbp-checkpoint/2; use the vbp"):
        read_checkpoint(tmp_path / "old.pt")


def test_a_sealed_file_of_other_content_is_an_input_error(tmp_path: Path) -> None:
    for content in ([1], {"format": "x"}):
        path = tmp_path / "sealed.pt"
        with path.open("wb+") as file:
            write_sealed(file, content, FORMAT)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="cannot be read"):
            read_checkpoint(path)


def test_a_state_that_could_not_be_read_back_is_refused_when_it_is_written(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(TypeError, match="must hold tensors, numbers, text"):
        saved(tmp_path, 2, path=tmp_path)
    assert names(tmp_path) == ["epoch0001"]


def test_two_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    # By their numbers: as text 10000 comes before 9999.
    for epoch in (9998, 9999, 10000, 10001):
        saved(tmp_path, epoch, told=epoch)
    assert names(tmp_path) == ["epoch10000", "epoch10001"]
    assert newest(tmp_path) == {"told": 10001}
    saved(tmp_path, 10001, 7, told=10001.7)
    assert names(tmp_path) == ["epoch10001", "epoch10001-batch000007.pt"]
    assert newest(tmp_path) == {"told": 10001.7}
    saved(tmp_path, 10001, 7, told="again")
    assert names(tmp_path) == ["epoch10001", "epoch10001-batch000007.pt"]
    assert newest(tmp_path) == {"told": "again"}


def test_an_older_one_stays_until_two_newer_ones_are_whole(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    flip(saved(tmp_path, 2), 300)
    saved(tmp_path, 3)
    assert names(tmp_path) == ["epoch0001", "epoch0002", "epoch0003"]
    saved(tmp_path, 4)
    assert names(tmp_path) == ["epoch0003", "epoch0004"]


def test_a_failed_write_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for epoch in (1, 2):
        saved(tmp_path, epoch, told=epoch)

    def full(content: object, file: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OutputError, match=r"epoch0003-batch000000\.pt could not be written"):
            saved(tmp_path, 3)
    assert names(tmp_path) == ["epoch0001", "epoch0002"]
    assert newest(tmp_path) == {"told": 2}


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(OutputError, match="checkpoints could not be written"):
        saved(tmp_path, 1)


def test_no_files_are_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "missing") is None
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / ".epoch0001-batch000000.pt.x1.part").touch()
    assert latest_checkpoint(tmp_path) is None
    assert not has_checkpoints(tmp_path)


@pytest.mark.parametrize("fault", ["torn", "flipped", "foreign"])
def test_an_unreadable_one_is_named_and_the_one_before_it_used(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 1, told=1)
    path = saved(tmp_path, 2, told=2)
    if fault == "torn":
        path.write_bytes(path.read_bytes()[:-200])
    elif fault == "flipped":
        flip(path, 200)
    else:
        torch.save({"epoch": 2}, path)
    assert newest(tmp_path) == {"told": 1}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "epoch0002-batch000000.pt" in record.getMessage()


def test_files_of_which_none_can_be_read_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "epoch0001-batch000000.pt").write_bytes(b"")
    (tmp_path / "other.pt").write_bytes(b"x" * 500)
    with pytest.raises(InputError, match=r"got 2 files that are none \(other\.pt, epoch0001-batch000000\.pt\)"):
        latest_checkpoint(tmp_path)


def test_training_taken_up_earlier_drops_what_came_after(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for epoch in (4, 5):
        saved(tmp_path, epoch)
    saved(tmp_path, 4, 1)
    assert names(tmp_path) == ["epoch0004", "epoch0004-batch000001.pt"]
    assert "epoch0005-batch000000.pt is removed" in caplog.text
    clear_checkpoints(tmp_path, after=tmp_path / "checkpoints" / "epoch0004-batch000000.pt")
    assert names(tmp_path) == ["epoch0004"]


def test_clearing_takes_checkpoints_and_halves_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1).parent
    for name in (".epoch0002-batch000000.pt.x1.part", "notes.txt"):
        (folder / name).touch()
    assert has_checkpoints(folder)
    clear_checkpoints(tmp_path)
    assert names(tmp_path) == ["notes.txt"]
    clear_checkpoints(tmp_path / "missing")


def test_what_cannot_be_removed_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)

    def refused(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError("Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OutputError, match=r"epoch0001-batch000000\.pt could not be removed"):
        clear_checkpoints(tmp_path)


def test_what_a_killed_run_left_half_written_is_passed_over_and_cleared(tmp_path: Path) -> None:
    saved(tmp_path, 2, told="whole")
    half = tmp_path / "checkpoints" / ".epoch0003-batch000000.pt.x1.part"
    half.write_bytes(b"half")
    assert newest(tmp_path) == {"told": "whole"}
    assert half.exists()
    saved(tmp_path, 3)
    assert names(tmp_path) == ["epoch0002", "epoch0003"]
