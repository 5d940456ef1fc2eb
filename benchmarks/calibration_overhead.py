"""What a statistics pass costs beside the bare evaluation forward, over the same batches, taking turns.

    python benchmarks/calibration_overhead.py

Prints one JSON line: median milliseconds of both, and the median over rounds of their ratio.
"""

from __future__ import annotations

import json
import platform
import statistics as stats
import time
from dataclasses import dataclass

import timm
import torch
import tyro
from torch import Tensor, nn

from vbp import collect_statistics, find_sites


@dataclass(frozen=True)
class Options:
    """Time a statistics pass against the bare forward."""

    model_name: str = "deit_tiny_patch16_224"
    """A timm model; random weights cost as much as trained ones."""
    batch_size: int = 32
    """Images in a batch."""
    batches: int = 4
    """Batches in one pass."""
    rounds: int = 15
    """Timed passes of each kind."""
    device: str = "cpu"
    """Where to run."""


def bare_forward(model: nn.Module, batches: list[Tensor]) -> None:
    """Evaluate without statistics."""
    with torch.no_grad():
        for batch in batches:
            model(batch)


def main(options: Options) -> None:
    """Time both passes in turn and print the medians."""
    device = torch.device(options.device)
    model = timm.create_model(options.model_name).eval().to(device)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    batches = [torch.randn(options.batch_size, *size, device=device) for _ in range(options.batches)]
    sites = find_sites(model, batches[0][:1])
    passes = {
        "forward": lambda: bare_forward(model, batches),
        "statistics": lambda: collect_statistics(model, sites, batches),
    }
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(options.rounds + 2):
        # The one that comes second finds other caches and another clock: each is first in every other round.
        for name in sorted(passes, reverse=turn % 2 == 0):
            run = passes[name]
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    ratios = [with_it / bare for with_it, bare in zip(times["statistics"], times["forward"], strict=True)]
    result = {
        "model": options.model_name,
        "images": options.batch_size * options.batches,
        "forward_ms": round(stats.median(times["forward"]), 2),
        "statistics_ms": round(stats.median(times["statistics"]), 2),
        "ratio_median": round(stats.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
