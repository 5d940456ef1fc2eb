"""Units are timed inside the model they belong to: by a clock that counts operations, predictions are exact."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vbp import find_sites, make_plan, prune_
from vbp.cost.layer_timing import measure_layer_times, timing_conditions
from vbp.cost.timing import Turn
from vbp.runtime.precision import Precision


def operations(forward: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    with counter:
        forward()
    return float(counter.get_total_flops())


class OperationClock:
    """Takes turns by a clock that ticks once an operation; the machine slows down from round to round."""

    def __init__(self) -> None:
        self.passes: list[str] = []

    def __call__(
        self, passes: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, **_: Any
    ) -> dict[str, list[Turn]]:
        self.passes = list(passes)
        found = {name: operations(forward) for name, forward in passes.items()}
        return {name: [Turn(ms * slow, ms * slow) for slow in (1, 2, 5)] for name, ms in found.items()}


def predicted_and_counted(model: nn.Module, image: Tensor, *, attention: bool) -> tuple[float, float]:
    sites = find_sites(model, image, attention=attention)
    times = measure_layer_times(model, sites, image, precision=Precision(), timer=OperationClock())
    generator = torch.Generator().manual_seed(2)
    scores = {site.name: torch.rand(site.hidden, generator=generator) for site in sites}
    plan = make_plan(sites, scores, keep_ratio=0.6, attn_keep_ratio=0.5 if attention else None)
    pruned = copy.deepcopy(model)
    prune_(pruned, plan)
    with torch.inference_mode():
        dense, narrow = (operations(lambda which=which: which(image)) for which in (model, pruned))  # type: ignore[misc]
    assert times.dense_ms == 2 * dense
    return times.share(plan), narrow / dense


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin", "hf-vit", "timm-convnext-conv", "torchvision-vit"])
def test_predictions_are_exact_by_a_clock_that_counts_operations(name: str) -> None:
    family = FAMILIES[name]
    model, image = family.build().eval(), family.example(1, torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attention = name in ("timm-vit", "timm-swin", "hf-vit")
    predicted, counted = predicted_and_counted(model, image, attention=attention)
    assert predicted == pytest.approx(counted, rel=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_sites_in_one_module_are_timed_one_at_a_time() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 16)
    ).eval()
    predicted, counted = predicted_and_counted(model, torch.randn(2, 3, 4, 4), attention=False)
    assert predicted == pytest.approx(counted, rel=1e-9)


def test_sites_of_one_shape_are_timed_once_at_the_widths_of_the_plan() -> None:
    family, clock = FAMILIES["timm-vit"], OperationClock()
    model, image = family.build().eval(), family.example(1, torch.float32)
    sites = find_sites(model, image)
    times = measure_layer_times(model, sites, image, precision=Precision(), round_to=16, timer=clock)
    assert [unit.curve for unit in times.units] == ["blocks.0.mlp.fc1"] * 2
    assert [width for width, _ in times.curves["blocks.0.mlp.fc1"]] == [16, 32, 48, 64, 80, 96, 112, 128]
    assert len(clock.passes) == 9
    odd = measure_layer_times(model, sites, image, precision=Precision(), timer=OperationClock())
    assert [width for width, _ in odd.curves["blocks.0.mlp.fc1"]] == [15, 31, 47, 63, 79, 95, 111, 128]


def test_curves_rise_whatever_the_noise() -> None:
    def noisy(passes: Mapping[str, object], *_: Any, **__: Any) -> dict[str, list[Turn]]:
        values = {name: 50.0 + (-1) ** place * 10 for place, name in enumerate(passes)}
        return {name: [Turn(value, value)] for name, value in values.items()}

    family = FAMILIES["timm-vit"]
    model, image = family.build().eval(), family.example(1, torch.float32)
    times = measure_layer_times(model, find_sites(model, image), image, precision=Precision(), timer=noisy)
    curve = [ms for _, ms in times.curves["blocks.0.mlp.fc1"]]
    assert curve == sorted(curve)


def test_conditions_tell_apart_what_times_depend_on() -> None:
    family = FAMILIES["timm-vit"]
    model, image = family.build(), family.example(1, torch.float32)
    sites = find_sites(model, image)

    def made(images: Tensor = image, precision: Precision | None = None, which: nn.Module = model) -> Any:
        return timing_conditions(which, sites, images, precision=precision or Precision())

    base = made()
    assert base == made(torch.randn_like(image), which=family.build())
    assert base != made(image.repeat(2, 1, 1, 1))
    assert base != made(precision=Precision(torch.bfloat16))
    assert base != made(which=copy.deepcopy(model).to(torch.bfloat16))
    pruned = copy.deepcopy(model)
    scores = {site.name: torch.arange(site.hidden) for site in sites}
    prune_(pruned, make_plan(sites, scores, keep_ratio=0.5))
    assert base != made(which=pruned)


def test_conditions_are_plain_types_that_a_checkpoint_can_hold() -> None:
    family = FAMILIES["timm-vit"]
    model, image = family.build(), family.example(1, torch.float32)
    conditions = timing_conditions(model, find_sites(model, image), image, precision=Precision())
    assert {type(value) for value in dataclasses.asdict(conditions).values()} == {str, int, tuple}
