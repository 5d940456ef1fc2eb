"""Dense against pruned: the ratio is taken round by round, beside the ratio of the MACs."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

import vbp
from vbp import InputError
from vbp.cli.latency import run_latency
from vbp.cli.options import LatencyConfig
from vbp.cost.timing import Spread
from vbp.deploy.latency import compare_latency
from vbp.deploy.settings import LatencySettings

QUICK = {"rounds": 3, "warmup": 1, "budget_s": 0.0}


class Works(nn.Module):
    """Multiplies large matrices a number of times: what its MACs say is what it costs."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(times)))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images.flatten(2)).mean(1)
        return logits


def test_twice_the_work_takes_twice_the_time() -> None:
    # By processor time, which other programs do not disturb.
    settings = LatencySettings(threads=1, rounds=5, warmup=2)
    report = compare_latency(Works(8), Works(4), torch.randn(1, 64, 32, 32), batch_sizes=(1, 3), settings=settings)
    assert [row.batch for row in report.rows] == [1, 3]
    assert report.threads == 1
    for row in report.rows:
        assert report.ideal == report.macs[0] / report.macs[1] == 2
        assert (row.device, row.precision, row.clock) == ("cpu", "float32", "wall")
        assert row.cpu_speedup is not None
        assert row.cpu_speedup.median == pytest.approx(2, rel=0.3)
        assert row.speedup.low <= row.speedup.median <= row.speedup.high
        assert report.of_ideal(row) == row.speedup.median / 2
        assert row.rounds == 5
    assert json.loads(json.dumps(report.to_dict()))["rows"][1]["of_ideal"] == report.of_ideal(report.rows[1])


def test_the_speedup_is_the_median_of_the_ratios_of_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    from vbp.cost import timing
    from vbp.deploy import latency

    def timer(*_: object, **__: object) -> dict[str, list[timing.Turn]]:
        return turns

    # The machine slows down tenfold in the middle: medians of their own would give 100 / 60.
    dense, pruned = [20.0, 22.0, 200.0, 100.0, 220.0], [10.0, 11.0, 100.0, 60.0, 100.0]
    turns = {
        "dense": [timing.Turn(ms, 2 * ms) for ms in dense],
        "pruned": [timing.Turn(ms, ms) for ms in pruned],
    }
    monkeypatch.setattr(latency, "compare_passes", partial(timing.compare_passes, timer=timer))
    model, images = FAMILIES["timm-vit"].build(), FAMILIES["timm-vit"].example(1, torch.float32)
    (row,) = compare_latency(model, model, images, batch_sizes=(1,)).rows
    assert row.speedup == Spread(2.0, 2.0, 2.0)
    assert row.cpu_speedup == Spread(4.0, 4.0, 4.0)
    assert (row.dense_ms.median, row.pruned_ms.median) == (100.0, 60.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bfloat16"},
        {"precision": "amp_bfloat16", "channels_last": True},
        {"threads": 2},
        {"backend": "onnxruntime"},
    ],
)
def test_models_stay_as_they_were_whatever_the_settings(settings: dict[str, Any]) -> None:
    family = FAMILIES["timm-convnext-linear" if settings.get("channels_last") else "timm-vit"]
    dense = family.build()
    before, threads = copy.deepcopy(dense.state_dict()), torch.get_num_threads()
    report = compare_latency(
        dense,
        dense,
        family.example(1, torch.float32),
        batch_sizes=(2,),
        settings=LatencySettings(**QUICK, **settings),
    )
    assert report.ideal == 1
    assert report.rows[0].rounds == 3
    assert dense.training
    assert torch.get_num_threads() == threads
    assert all(
        value.dtype == before[name].dtype and torch.equal(value, before[name])
        for name, value in dense.state_dict().items()
    )
    assert report.table().splitlines()[-1].split()[0] == "2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "tensorrt"}, "backend must be one of torch, onnxruntime, openvino"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"device": "gpu"}, "device must be cpu, cuda"),
        ({"device": "meta"}, "device must be cpu, cuda"),
        ({"backend": "onnxruntime", "compile": True}, "use the torch backend"),
        ({"backend": "onnxruntime", "precision": "float16"}, "use the torch backend"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    model = nn.Flatten()
    with pytest.raises(InputError, match=message):
        compare_latency(model, model, torch.zeros(1, 3, 4, 4), settings=LatencySettings(**settings))


def test_batch_sizes_are_checked() -> None:
    with pytest.raises(InputError, match="batch size must be at least 1, got 0"):
        compare_latency(nn.Flatten(), nn.Flatten(), torch.zeros(1, 3, 4, 4), batch_sizes=(4, 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="needs a GPU"):
        compare_latency(nn.Flatten(), nn.Flatten(), torch.zeros(1, 3, 4, 4), settings=LatencySettings(device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_timed_by_its_own_events() -> None:
    settings = LatencySettings(device="cuda", precision="amp_bfloat16", channels_last=True, **QUICK)  # type: ignore[arg-type]
    report = compare_latency(Works(8), Works(4), torch.randn(1, 64, 32, 32), batch_sizes=(256,), settings=settings)
    assert report.rows[0].cpu_speedup is None
    assert report.rows[0].dense_ms.median > report.rows[0].pruned_ms.median > 0


def test_the_command_times_an_artefact(tmp_path: Path) -> None:
    from vbp.recipes.demo import load_demo

    classifier, _, val = load_demo(tmp_path / "data")
    images = next(iter(val))[0]
    sites = vbp.find_sites(classifier.model, images[:1])
    statistics = vbp.collect_statistics(classifier.model, sites, [images])
    plan = vbp.make_plan(sites, vbp.variance_scores(statistics), keep_ratio=0.5)
    macs = vbp.plan_cost(classifier.model, plan, images[:1]).macs
    vbp.prune_(classifier.model, plan, statistics.means)
    file = tmp_path / "pruned.pth"
    vbp.save_pruned(
        classifier.model, file, plans=plan, source=classifier.source, preprocessing=classifier.preprocessing
    )
    output = tmp_path / "latency.json"
    report = run_latency(LatencyConfig(str(file), batch_sizes=(1, 4), device="cpu", output=output, **QUICK))  # type: ignore[arg-type]
    assert report.macs == macs
    assert json.loads(output.read_text()) == json.loads(json.dumps(report.to_dict()))
    vbp.save_pruned(classifier.model, file, plans=plan)
    with pytest.raises(InputError, match="does not say how its dense model is built"):
        run_latency(LatencyConfig(str(file), device="cpu"))
