"""Folders of runs that never ran: every number is made up, but they fit each other as those of a real run do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vbp import PruningPlan, Site, Statistics, make_plan, variance_scores
from vbp.cost.timing import LatencyComparison, Spread
from vbp.method.moments import ChannelMoments
from vbp.runtime.decode import to_json


def sites(count: int, hidden: int = 40) -> list[Site]:
    """Return MLP sites of a transformer."""
    return [Site((f"blocks.{i}.mlp.fc1",), f"blocks.{i}.mlp.fc2", hidden) for i in range(count)]


def plan_and_statistics(found: list[Site], keep_ratio: float = 0.5) -> tuple[PruningPlan, Statistics]:
    """Return random statistics, whose scale grows with the site, and the plan that follows from them."""
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for index, site in enumerate(found):
        spread = torch.randn(site.hidden, generator=generator, dtype=torch.float64) * 1.3
        names = [f"{site.name}#query", f"{site.name}#key"] if site.kind == "query_key" else [site.name]
        for name in names:
            m2 = 999 * (spread + 0.1 * index).exp()
            moments[name] = ChannelMoments(1000, torch.randn(site.hidden, generator=generator).double(), m2)
    statistics = Statistics(moments, 1000, "model", "data")
    return make_plan(found, variance_scores(statistics), keep_ratio=keep_ratio), statistics


def timing(speedup: float = 1.25, **changed: Any) -> LatencyComparison:
    """Return a comparison of a dense model that takes 12 ms, whose speed-up is not the quotient of its medians."""
    dense, pruned, ratio = 12.0, 12.5 / speedup, speedup
    spreads = [Spread(value, value - 0.04, value + 0.06) for value in (dense, pruned, ratio)]
    conditions = {"batch": 32, "device": "cpu", "precision": "float32", "clock": "wall"}
    rest = {"rounds": 15, "seconds": 2.5, "load": 0.5, "cpu_speedup": None}
    return LatencyComparison(*spreads, **conditions | rest | changed)


def write_run(folder: Path, count: int = 3, *, found: list[Site] | None = None, **changed: Any) -> dict[str, Any]:
    """Write the folder of a run and give its summary.

    Args:
        folder: Made if missing.
        count: Number of sites.
        found: Sites in the place of those.
        changed: Entries of the summary to replace; None leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan, statistics = plan_and_statistics(found or sites(count))
    plan.save(folder / "plan.json")
    statistics.save(folder / "statistics.safetensors")
    small = {"macs": 1_010_000_000, "params": 4_480_000}
    epochs = [{"epoch": 0, "top1": 61.12, "top5": 84.5}] + [
        {"epoch": epoch, "top1": top1, "top5": 90.0, "train_loss": 2 / epoch, "train_top1": top1 - 5,
         "lr": 1e-5 / epoch, "images": 1000, "seconds": 1.0}
        for epoch, top1 in ((1, 68.0), (2, 70.86), (3, 70.5))
    ]  # fmt: skip
    summary: dict[str, Any] = {
        "base": {"top1": 72.02, "top5": 91.1, "macs": 1_258_000_000, "params": 5_717_416},
        "pruned": {"top1": 61.12, "top5": 84.5, "epoch": 0} | small,
        "best": {"top1": 70.86, "top5": 90.2, "epoch": 2} | small,
        "final": {"top1": 70.5, "top5": 90.1, "epoch": 3} | small,
        "uncompensated": {"top1": 55.64, "top5": 80.1} | small,
        "keep_ratio": plan.kept / plan.total,
        "sites": {name: list(widths) for name, widths in plan.widths.items()},
        "seconds": {"calibration": 12.34, "finetune": 66.78},
        "images": {"calibration": 1000, "val": 1300},
        "convergence": {
            "stages": [
                {"images": 250, "changed": None},
                {"images": 500, "changed": 0.0123},
                {"images": 1000, "changed": 0.0087},
            ],
            "converged": 1000,
        },
        "latency": to_json(timing()),
        "device": "cpu",
        "processes": 1,
        "versions": {"torch": "2.15.0"},
        "date": "2026-11-30 14:05+00:00",
        "command": "vbp run --data_path data --keep_ratio 0.5",
        "hardware": "Some processor (2 cores, AVX512)",
        "changed": ["model_name", "keep_ratio"],
        "imagenet": True,
        "config": {"model_name": "deit_tiny_patch16_224", "compensation": "mean", "keep_ratio": 0.5, "mean": None},
        "files": {},
    }
    summary = {name: value for name, value in (summary | changed).items() if value is not None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in epochs))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "vbp_best.pth").write_bytes(b"")
    return summary
