"""What takes long is said once it does."""

from __future__ import annotations

import logging
import time

import pytest

from vbp.runtime.log_file import told_if_slow

LOG = logging.getLogger("vbp.test")


def test_work_is_told_when_it_takes_long_and_only_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with told_if_slow(LOG, "timing batch %d", 32, seconds=0.05):
        time.sleep(0.3)
    with told_if_slow(LOG, "quick work", seconds=0.2):
        pass
    with pytest.raises(KeyError), told_if_slow(LOG, "failed work", seconds=0.2):
        raise KeyError
    time.sleep(0.4)
    assert caplog.messages == ["timing batch 32"]


def test_a_function_may_be_told_at_each_call(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    @told_if_slow(LOG, "slow function", seconds=0.05)
    def work(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    assert [work(0.3), work(0.0), work(0.3)] == [0.3, 0.0, 0.3]
    assert caplog.messages == ["slow function"] * 2
