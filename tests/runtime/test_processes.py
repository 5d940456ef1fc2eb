"""The device of a process, on a machine that says it has GPUs; the command that started it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vbp import InputError
from vbp.runtime.processes import Processes, command_line, device_of


@pytest.fixture
def chosen() -> Iterator[list[int]]:
    """Return the numbers of the GPUs that torch is told to take; there are two, and the second is the current one."""
    told: list[int] = []
    with (
        FakeTensorMode(),  # tensors on GPUs that are not there
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "device_count", return_value=2),
        mock.patch.object(torch.cuda, "current_device", return_value=1),
        mock.patch.object(torch._C, "_cuda_setDevice", told.append),
    ):
        yield told


@pytest.mark.parametrize(("name", "number"), [("auto", 1), ("cuda", 1), ("cuda:0", 0)])
def test_one_process_takes_a_gpu_by_its_number(chosen: list[int], name: str, number: int) -> None:
    assert device_of(name, Processes()) == torch.device("cuda", number)
    assert chosen == [number]


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_the_gpu_of_its_place(chosen: list[int], name: str) -> None:
    assert device_of(name, Processes(3, 4, 1, 2)) == torch.device("cuda", 1)
    assert device_of(name, Processes(2, 4, 0, 2)) == torch.device("cuda", 0)
    assert chosen == [1, 0]


def test_processes_that_would_share_a_gpu_are_refused(chosen: list[int]) -> None:
    with pytest.raises(InputError, match="got 3 processes for 2 GPUs"):
        device_of("cuda", Processes(0, 3, 0, 3))
    with pytest.raises(InputError, match="device must be auto, cpu or cuda under torchrun"):
        device_of("cuda:0", Processes(0, 2, 0, 2))
    assert chosen == []


def test_the_cpu_is_taken_where_it_is_asked_for_or_alone(chosen: list[int]) -> None:
    assert device_of("cpu", Processes()) == torch.device("cpu")
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        assert device_of("auto", Processes()) == torch.device("cpu")
    assert chosen == []


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["/env/bin/python3", "/env/bin/vbp", "run", "--data_path", "my data"], "vbp run --data_path 'my data'"),
        (["/env/bin/python3", "benchmarks/run.py", "--use_kd"], "python3 benchmarks/run.py --use_kd"),
        (["/env/bin/python3", "-m", "mine"], "python3 -m mine"),
        (["/env/bin/python3"], "python3"),
    ],
)
def test_the_command_line_is_what_was_typed(words: list[str], typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert command_line() == typed
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert command_line() == ""
