"""Models take turns, fairly, and only what is timed counts."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from families import FAMILIES
from torch import nn

from vbp.cost.macs import count_macs
from vbp.cost.timing import (
    LatencyComparison,
    Spread,
    compare_models,
    hardware,
    latency_batch,
    precision_of,
    time_in_turns,
)
from vbp.runtime.precision import Precision

CPU = torch.device("cpu")


def logged(log: list[str], name: str, seconds: float) -> Callable[[], None]:
    def forward() -> None:
        log.append(name)
        time.sleep(seconds)

    return forward


def test_slow_models_take_turns_in_alternating_order() -> None:
    log: list[str] = []
    # Longer than half a turn: one pass each.
    turns = time_in_turns({name: logged(log, name, 0.07) for name in "ab"}, CPU, rounds=3, warmup=1)
    assert "".join(log) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(timed) for name, timed in turns.items()} == {"a": 3, "b": 3}
    assert all(turn.ms >= 70 for timed in turns.values() for turn in timed)


def test_a_turn_of_a_fast_model_holds_many_passes_and_an_untimed_one() -> None:
    log: list[str] = []
    turns = time_in_turns({"a": logged(log, "a", 0.01)}, CPU, rounds=3, warmup=2)
    per_turn, rest = divmod(len(log) - 2, 3)
    assert rest == 0
    assert 2 <= per_turn - 1 <= 10
    assert all(10 <= turn.ms < 100 for turn in turns["a"])


def test_no_round_begins_after_the_budget_but_three_are_timed() -> None:
    log: list[str] = []
    turns = time_in_turns({"a": logged(log, "a", 0.06)}, CPU, rounds=50, warmup=1, budget_s=0)
    assert len(turns["a"]) == 3


def test_processor_time_does_not_grow_while_the_program_waits() -> None:
    (turn,) = time_in_turns({"a": logged([], "a", 0.1)}, CPU, rounds=1, warmup=1)["a"]
    assert turn.cpu_ms < 50 < turn.ms


def test_the_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_dense_model_is_timed_against_its_pruned_one() -> None:
    class Waits(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            time.sleep(self.seconds)
            return images

    times = compare_models(Waits(0.08), Waits(0.06), torch.zeros(1), precision=Precision(), clock="wall", rounds=3)
    assert times.dense_ms.median == pytest.approx(80, abs=19)
    assert times.pruned_ms.median == pytest.approx(60, abs=19)
    assert times.rounds == 3
    assert times.cpu_speedup is not None
    assert times.conditions == "batch 1 on cpu in float32"
    # The machine was as busy with one as with the other in each round: the quartiles are of paired times.
    assert times.speedup.low <= times.speedup.median <= times.speedup.high


def test_a_comparison_says_in_what_it_was_computed_and_by_which_clock() -> None:
    times = LatencyComparison(
        *(Spread(value, value * 0.9, value * 1.1) for value in (12.0, 9.6, 1.25)),
        batch=32, device="cuda", precision="float32, autocast bf16", clock="processor", rounds=3,
        seconds=1.0, load=None,
    )  # fmt: skip
    assert times.conditions == "batch 32 on cuda in float32, autocast bf16, processor time"
    assert (times.latency_text, times.speedup_text) == ("12.00 -> 9.60 ms", "1.25x (1.12 to 1.38)")
    half = nn.Linear(2, 2, dtype=torch.float16)
    assert precision_of(half, Precision()) == "float16"
    assert precision_of(nn.Linear(2, 2), Precision(torch.bfloat16)) == "float32, autocast bf16"


def test_a_batch_on_a_cpu_takes_about_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = FAMILIES["timm-vit"].build().eval(), FAMILIES["timm-vit"].example(1, torch.float32)
    assert latency_batch(model, image, at_most=256) == 32
    assert latency_batch(model, image, at_most=8) == 8
    assert latency_batch(model, image, at_most=8, size=64) == 64
    monkeypatch.setattr("vbp.cost.timing.CPU_BATCH_MACS", 5 * count_macs(model, image))
    assert latency_batch(model, image.repeat(2, 1, 1, 1), at_most=256) == 5
    monkeypatch.setattr("vbp.cost.timing.CPU_BATCH_MACS", 1)
    assert latency_batch(model, image, at_most=256) == 1


def test_the_hardware_has_a_name() -> None:
    assert hardware(CPU).endswith(f"cores, {torch.backends.cpu.get_cpu_capability()})")
