"""`--processes N`: the processes of a job without torchrun, whose errors are one line."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launching import environment
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from vbp import InputError, RunConfig, run
from vbp.cli.launch import is_launcher, launch
from vbp.cli.main import main
from vbp.errors import PeerError


@pytest.fixture(autouse=True)
def plain_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be launched by nobody, and leave the environment as it is."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def ends_with(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[Any]:
    """Let the launcher of torch end so; return what it was given."""
    given: list[Any] = []

    def stand_in(arguments: Any) -> None:
        given.append(arguments)
        if error is not None:
            raise error

    monkeypatch.setattr("torch.distributed.run.run", stand_in)
    return given


def failed(exitcode: int) -> ChildFailedError:
    """Return the error of the launcher for a process that ended with this code."""
    failure = ProcessFailure(1, 4711, exitcode, "<N/A>")
    failure.timestamp = int(time.time())
    return ChildFailedError("job", {1: failure})


def test_a_job_that_ends_well_leaves_the_launcher_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ends_with(monkeypatch, None)
    launch(3, [sys.executable, "job.py", "--keep_ratio", "0.5"])
    (arguments,) = given
    assert arguments.nproc_per_node == "3"
    assert [arguments.training_script, *arguments.training_script_args] == [
        sys.executable, "job.py", "--keep_ratio", "0.5",
    ]  # fmt: skip


@pytest.mark.parametrize(("error", "code"), [(failed(1), 1), (failed(143), 143), (SignalException("told", 2), 130)])
def test_the_launcher_ends_as_the_job_did(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ends_with(monkeypatch, error)
    with pytest.raises(SystemExit) as exit_:
        launch(2, ["job"])
    assert exit_.value.code == code


def test_a_process_that_could_not_say_why_it_ended_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    ends_with(monkeypatch, failed(-9))
    with pytest.raises(PeerError, match="process 1 of 2 was ended by SIGKILL"):
        launch(2, ["job"])


def test_one_process_and_one_of_a_launched_job_start_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_launcher(2)
    assert not is_launcher(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_launcher(2)


def test_one_plain_process_and_several_contradict_each_other() -> None:
    with pytest.raises(InputError, match="disable_ddp means one plain process, got it with processes 2"):
        is_launcher(2, disable_ddp=True)


def test_a_call_of_the_library_starts_no_processes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"processes must be left out, .* got 2 in a job of 1; the commands start"):
        run(RunConfig(str(tmp_path / "data"), processes=2, device="cpu", save_dir=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_job_of_two_processes_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vbp.cli.main", "run", "--processes", "2", "--device", "cpu"]
    result = subprocess.run(
        [*command, "--data_path", str(tmp_path / "data")], env=environment(), cwd=tmp_path, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert "data_path must hold train/<class>/ and val/<class>/, got no folder" in result.stderr
    # Each of them may find it before it hears of the other.
    assert 1 <= len(lines) <= 2
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_setting_is_told_before_processes_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ends_with(monkeypatch, None)
    monkeypatch.setattr(sys, "argv", ["vbp", "run", "--data_path", "data", "--processes", "2", "--keep_ratio", "1.3"])
    assert main() == 1
    assert (
        capsys.readouterr().err == "error: keep_ratio must be in (0, 1], got 1.3; 0.65 keeps 65 % of the channels\n"
    )
    sys.argv[-1] = "0.5"
    assert main() == 0
    (arguments,) = given
    assert arguments.training_script_args == ["-m", "vbp.cli.main", *sys.argv[1:]]
