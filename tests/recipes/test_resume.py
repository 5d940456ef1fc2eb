"""A run is continued where it was, with the settings that it had, or refused: it never starts over silently."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vbp import InputError
from vbp.errors import Interrupted, PeerError
from vbp.recipes.config import RunConfig
from vbp.recipes.folder import ASKED, BEGUN, asked, begin_anew, own_folder
from vbp.recipes.resume import check_same_settings, find_checkpoint, way_on
from vbp.runtime.processes import Processes
from vbp.training.checkpoints import save_checkpoint

SETTINGS = {"lr_ft": 1e-5, "seed": 0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run that was killed after its second checkpoint."""
    folder = begun(tmp_path / "run")
    for epoch in (1, 2):
        save_checkpoint(folder, {"epoch": epoch}, epoch=epoch, batch=0)
    return folder


def begun(folder: Path, settings: dict[str, Any] = SETTINGS) -> Path:
    """Make the folder of a run that ended before its first checkpoint."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "vbp_imagenet.log").write_text("begun\n")
    return folder


def epoch_of(*arguments: Any, **options: Any) -> int | None:
    """Return the epoch of the checkpoint that is found."""
    found = find_checkpoint(*arguments, SETTINGS, **options)
    return None if found is None else int(found.name[5:9])


def test_without_resume_the_folder_must_be_new_and_the_way_on_is_named(run: Path, tmp_path: Path) -> None:
    assert epoch_of(None, tmp_path / "new") is None
    assert (tmp_path / "new").is_dir()
    with pytest.raises(InputError, match=r"must be empty or new, .* --overwrite .* --resume auto"):
        epoch_of(None, run)
    assert epoch_of(None, run, overwrite=True) is None
    with pytest.raises(InputError, match="must be empty or new") as caught:
        epoch_of(None, begun(tmp_path / "other"))
    assert "--resume" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"restarted": True}])
def test_auto_continues_at_the_newest(run: Path, options: dict[str, bool]) -> None:
    assert epoch_of("auto", run, **options) == 2


def test_a_restarted_job_continues_whatever_it_was_told(run: Path, tmp_path: Path) -> None:
    assert epoch_of(None, run, restarted=True) == 2
    assert epoch_of(None, run, restarted=True, overwrite=True) == 2
    other = tmp_path / "other"
    path = save_checkpoint(other, {}, epoch=1, batch=0)
    assert epoch_of(str(path), run, restarted=True) == 2  # further than where it was told to begin
    assert epoch_of(str(path), tmp_path / "new", restarted=True) == 1
    assert epoch_of(None, tmp_path / "new", restarted=True) is None


@pytest.mark.parametrize("resume", ["auto", None])
def test_auto_starts_in_an_empty_folder(tmp_path: Path, resume: str | None) -> None:
    assert epoch_of(resume, tmp_path / "new", restarted=resume is None) is None
    # Killed while it tried the folder, or in its very first write.
    for name in (".config.json.x1.part", ".probe.x1", ".vbp.lock"):
        (tmp_path / "new" / name).touch()
        assert epoch_of(resume, tmp_path / "new", restarted=resume is None) is None


def test_auto_starts_again_where_the_same_run_left_no_checkpoint_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = begun(tmp_path / "run")
    (folder / "checkpoints").mkdir()
    assert epoch_of("auto", folder) is None
    assert "run holds no checkpoint yet" in caplog.text
    assert "begins anew" in caplog.text


def test_auto_refuses_what_is_not_this_run(tmp_path: Path) -> None:
    other = begun(tmp_path / "other", {**SETTINGS, "seed": 1})
    with pytest.raises(InputError, match=r"other/config\.json \(seed: 1 -> 0\)"):
        epoch_of("auto", other)
    assert epoch_of("auto", other, overwrite=True) is None
    finished = begun(tmp_path / "finished")
    (finished / "summary.json").touch()
    with pytest.raises(InputError, match=r"must be empty or new, got .*finished"):
        epoch_of("auto", finished)
    for content in ("{", "[]"):
        (other / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"config\.json must be the settings of a run"):
            epoch_of("auto", other)
    (other / "config.json").unlink()
    with pytest.raises(InputError, match=r"must be empty or new, got .*other"):
        epoch_of("auto", other)


@pytest.mark.parametrize("step", range(4))
def test_a_run_killed_while_it_replaces_another_one_begins_anew(run: Path, step: int) -> None:
    def clear() -> None:
        for file in (run / "config.json", run / "vbp_imagenet.log", run / "checkpoints/epoch0001-batch000000.pt")[
            :step
        ]:
            file.unlink()
        raise KeyError

    (run / "config.json").write_text(json.dumps({**SETTINGS, "seed": 1}))
    with pytest.raises(KeyError):
        begin_anew(run, "config.json", SETTINGS, clear)
    assert "begins anew" in way_on(run)
    assert epoch_of("auto", run) is None
    assert epoch_of(None, run, overwrite=True) is None
    with pytest.raises(InputError, match=r"begun\.json \(seed: 0 -> 2\)"):
        find_checkpoint("auto", run, {**SETTINGS, "seed": 2})
    begin_anew(run, "config.json", SETTINGS, lambda: None)
    assert json.loads((run / "config.json").read_text()) == SETTINGS
    assert not (run / BEGUN).exists()


def test_a_run_killed_before_it_replaces_another_one_begins_anew(run: Path) -> None:
    (run / "config.json").write_text(json.dumps({**SETTINGS, "seed": 1}))
    before = sorted(path.name for path in run.rglob("*"))
    for error in (InputError("refused"), KeyError("a fault")):
        with pytest.raises(type(error)), own_folder(run, "/data", Processes(), str, SETTINGS):
            raise error
        assert sorted(path.name for path in run.rglob("*")) == before
    with pytest.raises(PeerError), own_folder(run, "/data", Processes(), str, SETTINGS):
        raise PeerError("process 1 was killed")
    assert asked(run) == SETTINGS
    assert stopped(run, Interrupted(15), SETTINGS).endswith("--resume auto begins anew")
    assert asked(run) == SETTINGS
    assert epoch_of("auto", run) is None
    # The other run is whole, and goes on if it is asked to.
    other = {**SETTINGS, "seed": 1}
    found = find_checkpoint("auto", run, other)
    assert found is not None
    assert found.name == "epoch0002-batch000000.pt"
    begin_anew(run, "config.json", SETTINGS, lambda: None)
    assert asked(run) is None
    (run / ASKED).write_text("{")
    assert asked(run) is None


def stopped(folder: Path, error: BaseException, settings: Mapping[str, Any] | None = None) -> str:
    """Return what a run says that is told to stop."""
    with (
        pytest.raises(Interrupted) as caught,
        own_folder(folder, "/data", Processes(), lambda: way_on(folder), settings),
    ):
        raise error
    return str(caught.value)


def test_a_job_that_is_told_to_stop_says_how_it_goes_on(run: Path, tmp_path: Path) -> None:
    command = "the same command with --resume auto"
    for error, name in ((Interrupted(15), "SIGTERM"), (KeyboardInterrupt(), "SIGINT")):
        assert stopped(run, error) == f"stopped by {name}; {command} goes on from epoch0002-batch000000.pt"
        none = f"stopped by {name}; there is no checkpoint yet; {command} begins anew"
        assert stopped(tmp_path / "new", error) == none
    assert stopped(run, Interrupted(15, "stopped in epoch 2")) == "stopped in epoch 2"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["train/out", "val", "train/cat/../new"])
def test_a_folder_among_the_images_is_refused_and_not_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "train/cat").mkdir(parents=True)
    with (
        pytest.raises(InputError, match=r"save_dir must lie outside of the images, got .* --save_dir"),
        own_folder(tmp_path / place, str(tmp_path), Processes(), str),
    ):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cat", "train"]


@pytest.mark.parametrize("restarted", [False, True])
def test_auto_does_not_start_over_when_no_checkpoint_can_be_read(run: Path, restarted: bool) -> None:
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    for overwrite in (False, True):
        with pytest.raises(InputError, match="got 2 files that are none"):
            epoch_of("auto", run, overwrite=overwrite, restarted=restarted)


@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/epoch0002-batch000000.pt"])
def test_a_path_is_a_run_its_checkpoints_or_one_of_them(run: Path, tmp_path: Path, place: str) -> None:
    assert epoch_of(str(run / place), run) == 2
    assert epoch_of(str(run / place), tmp_path / "new") == 2
    with pytest.raises(InputError, match="must be empty or new"):
        epoch_of(str(run / place), begun(tmp_path / "taken"))


def test_an_older_checkpoint_can_be_asked_for(run: Path) -> None:
    assert epoch_of(str(run / "checkpoints/epoch0001-batch000000.pt"), run) == 1


def test_a_path_without_a_checkpoint_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"got .*missing, which does not exist"):
        epoch_of(str(tmp_path / "missing"), tmp_path / "new")
    begun(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(InputError, match=r"must name a checkpoint or a run that has one, got .*run"):
            epoch_of(str(tmp_path / "run"), tmp_path / "new")
        (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "torn.pt").write_bytes(b"half")
    with pytest.raises(InputError, match=r"torn\.pt is no checkpoint"):
        epoch_of(str(tmp_path / "torn.pt"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


FACTS = {"train": "t1", "val": "v1", "model": "m1", "world": 2}


def now(**changed: Any) -> dict[str, Any]:
    config = RunConfig(data_path=Path("/data"), mean=(0.5, 0.5, 0.5), stats_path=Path("/stats"))
    return {**dataclasses.replace(config).to_dict(), **FACTS, **changed}


def refused(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return the differences that the message lists."""
    try:
        check_same_settings(saved, current, Path("c.pt"))
    except InputError as error:
        listed = re.search(r"got others than c\.pt \((.*)\); give the same ones", str(error))
        assert listed is not None
        return listed[1].split("; ")
    return []


def test_the_same_settings_pass_in_whatever_form_json_gives_them() -> None:
    assert refused(json.loads(json.dumps(now())), {**now(), "mean": (0.5, 0.5, 0.5)}) == []


def test_every_difference_is_listed() -> None:
    changed = now(lr_ft=2e-5, keep_ratio=0.5, world=4, mean=None)
    assert refused(now(), changed) == [
        "mean: [0.5, 0.5, 0.5] -> None", "keep_ratio: 0.65 -> 0.5", "lr_ft: 1.5e-05 -> 2e-05", "world: 2 -> 4",
    ]  # fmt: skip


def test_a_setting_of_another_version_is_a_difference_both_ways() -> None:
    assert refused(now(), now(new_flag=None)) == ["new_flag: missing -> None"]
    assert refused(now(old_flag=0), now()) == ["old_flag: 0 -> missing"]


@pytest.mark.parametrize("name", ["num_workers", "overwrite", "disable_ddp", "local_rank", "save_dir", "stats_path"])
def test_what_cannot_matter_may_differ(name: str) -> None:
    assert refused(now(), now(**{name: "other"})) == []
    without = now()
    del without[name]
    assert refused(without, now()) == []


def test_every_other_setting_of_a_run_must_be_the_same() -> None:
    may_differ = {
        name
        for name in RunConfig(data_path=Path()).to_dict()
        if refused(now(), now(**{name: "something else"})) == []
    }
    assert may_differ <= {
        "num_workers", "prefetch", "resume", "overwrite", "disable_ddp", "local_rank", "checkpoint_minutes",
        "timeout_minutes", "save_dir", "log_dir", "push_to_hub", "stats_path", "data_path", "checkpoint",
        "convnext_checkpoint", "best_effort", "allow_bad_dense", "processes",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fact"),
    [("data_path", "train"), ("data_path", "val"), ("checkpoint", "model"), ("convnext_checkpoint", "model")],
)
def test_a_name_may_differ_if_what_it_stands_for_is_known_to_be_the_same(name: str, fact: str) -> None:
    moved = now(**{name: "/elsewhere"})
    assert refused(now(), moved) == []
    assert refused(now(), {**moved, fact: "x9"}) == [f"{fact}: {FACTS[fact]!r} -> 'x9'"]
    del moved[fact]
    assert len(refused(now(), moved)) == 2
    assert len(refused({key: value for key, value in now().items() if key != fact}, moved)) == 1
