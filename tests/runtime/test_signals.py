"""A signal is noted and acted upon between two steps, or acts as it would have; it is never lost."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vbp.errors import InputError, Interrupted, OutputError
from vbp.runtime.signals import (
    Interruption,
    killed_reader,
    leave_signals_to_parent,
    reading_processes,
    stop_at_sigterm,
)

SIGNALS = [signal.SIGTERM, signal.SIGINT]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class ActedError(Exception):
    """What the handlers of the surrounding program do."""


@pytest.fixture(autouse=True)
def before() -> Iterator[None]:
    """Let signals raise `ActedError`, as another program's handler might; nothing here may end the test run."""

    def act(number: int, frame: object) -> None:
        raise ActedError(signal.Signals(number).name)

    kept = {number: signal.signal(number, act) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_loop_goes_on(number: signal.Signals) -> None:
    handlers = [signal.getsignal(each) for each in SIGNALS]
    interruption = Interruption()

    def loop() -> None:
        with interruption:
            assert interruption.signal is None
            os.kill(os.getpid(), number)
            assert interruption.signal == number
            raise KeyError  # it stops in its own way

    with pytest.raises(KeyError):
        loop()
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    with pytest.raises(ActedError):
        signal.raise_signal(number)


def test_handlers_come_back_without_a_signal_too() -> None:
    handlers = [signal.getsignal(each) for each in SIGNALS]
    with Interruption():
        assert [signal.getsignal(each) for each in SIGNALS] != handlers
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


def test_one_request_that_arrives_several_times_is_one_and_a_second_acts_at_once() -> None:
    clock = Clock()
    with Interruption(clock) as interruption:
        signal.raise_signal(signal.SIGINT)
        clock.seconds += 1
        signal.raise_signal(signal.SIGTERM)  # passed on by torchrun
        assert interruption.signal == signal.SIGINT
        clock.seconds += 2
        with pytest.raises(ActedError, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
        interruption.signal = None


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_nobody_acted_upon_acts_at_the_end(number: signal.Signals) -> None:
    interruption = Interruption()
    with pytest.raises(ActedError, match=number.name), interruption:
        signal.raise_signal(number)
    assert interruption.signal == number


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    handlers = [signal.getsignal(each) for each in SIGNALS]
    seen: list[object] = []

    def work() -> None:
        with Interruption() as interruption:
            seen.extend([interruption.signal, *(signal.getsignal(each) for each in SIGNALS)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, *handlers]


def test_a_checkpoint_is_due_every_so_many_minutes() -> None:
    clock = Clock()
    interruption = Interruption(clock)
    found = []
    for second in range(301):
        clock.seconds = 100.0 + second
        if interruption.due(2):
            found.append(second)
    assert found == [120, 240]
    clock.seconds += 1e9
    assert not interruption.due(0)
    assert interruption.due(2)


class _Processes(Dataset[torch.Tensor]):
    """Tells which process read it."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(os.getpid())

    def __len__(self) -> int:
        return 6


def test_processes_that_read_images_outlive_a_signal_meant_for_all() -> None:
    loader = DataLoader(
        _Processes(), batch_size=None, num_workers=1, prefetch_factor=1, worker_init_fn=leave_signals_to_parent,
        multiprocessing_context="fork",
    )  # fmt: skip
    read = []
    for process in loader:
        read.append(int(process))
        for number in SIGNALS:
            os.kill(read[0], number)
    assert read == [read[0]] * 6
    assert read[0] != os.getpid()


def test_sigterm_interrupts_a_command_and_then_acts_as_before() -> None:
    with pytest.raises(Interrupted, match="stopped by SIGTERM; files written so far") as caught, stop_at_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert (caught.value.signal, caught.value.told) == (signal.SIGTERM, False)
    with pytest.raises(ActedError):
        signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with stop_at_sigterm():
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DataLoader worker (pid 77) is killed by signal: Killed. ", r"process 77, .* \(Killed\), .* more memory$"),
        (
            "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
            r"process 7, 8, which .*--num_workers.* more memory$",
        ),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is", r"shared memory \(/dev/shm"),
        (
            "DataLoader worker (pid 7) is killed by signal: Segmentation fault. ",
            r"--num_workers 0 .* where the cause",
        ),
    ],
)
def test_the_end_of_a_reading_process_says_what_helps(text: str, expected: str) -> None:
    killed = killed_reader(RuntimeError(text))
    assert killed is not None
    assert re.search(expected, str(killed))
    assert killed_reader(RuntimeError("size mismatch")) is None


def test_the_end_of_a_reading_process_is_not_taken_for_another_error() -> None:
    def write() -> None:
        try:
            raise RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. ")
        except RuntimeError as error:
            raise OutputError("the disk is full") from error

    with pytest.raises(InputError, match="process 77"), reading_processes():
        write()
    with pytest.raises(OutputError, match="full"), reading_processes():
        raise OutputError("the disk is full")


def test_causes_that_form_a_circle_end() -> None:
    first, second = RuntimeError("one"), RuntimeError("other")
    first.__cause__, second.__cause__ = second, first
    with pytest.raises(RuntimeError, match="one"), reading_processes():
        raise first
