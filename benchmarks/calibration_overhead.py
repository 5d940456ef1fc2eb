"""What a statistics pass costs beside the bare evaluation forward, over the same batches, taking turns.

    python benchmarks/calibration_overhead.py

Passes: means and variances alone; with the covariance of a share of the tokens (what the refit needs), for each share
asked for; with covariance and sensitivity (what `auto` needs). Prints one JSON line a pass: median milliseconds, and
the median over rounds of the ratio to the bare forward of the same round.
"""

from __future__ import annotations

import json
import platform
import statistics as stats
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import tyro
from torch import Tensor, nn

from vbp import Site, collect_statistics, find_sites
from vbp.method.sampling import RandomProbes, TokenSample
from vbp.recipes.options import COVARIANCE_TOKENS

_FORWARD = "forward"


@dataclass(frozen=True)
class Options:
    """Time statistics passes against the bare forward."""

    model_name: str = "deit_tiny_patch16_224"
    """A timm model; random weights cost as much as trained ones."""
    batch_size: int = 32
    """Images in a batch."""
    batches: int = 4
    """Batches in one pass."""
    rounds: int = 15
    """Timed passes of each kind."""
    covariance_tokens: tuple[float, ...] = (COVARIANCE_TOKENS, 1.0)
    """Shares of the tokens, a pass for each."""
    sensitivity: bool = True
    """Also time the pass of auto: covariance of the first share, and sensitivity."""
    device: str = "cpu"
    """Where to run."""


def bare_forward(model: nn.Module, batches: list[Tensor]) -> None:
    """Evaluate without statistics."""
    with torch.no_grad():
        for batch in batches:
            model(batch)


def passes_of(
    options: Options, model: nn.Module, sites: tuple[Site, ...], batches: list[Tensor]
) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""

    def collecting(share: float, probes: RandomProbes | None = None) -> Callable[[], object]:
        tokens = TokenSample(share)
        return lambda: collect_statistics(model, sites, batches, covariance=True, tokens=tokens, sensitivity=probes)

    passes: dict[str, Callable[[], object]] = {
        _FORWARD: lambda: bare_forward(model, batches),
        "statistics": lambda: collect_statistics(model, sites, batches),
    }
    for share in options.covariance_tokens:
        passes[f"covariance of {share:g} of the tokens"] = collecting(share)
    if options.sensitivity:
        passes[f"covariance of {options.covariance_tokens[0]:g} of the tokens, sensitivity"] = collecting(
            options.covariance_tokens[0], RandomProbes()
        )
    return passes


def timed(passes: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the milliseconds of each pass in each round, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    for turn in range(rounds + 2):
        # Who comes later finds other caches and another clock: each is first in some rounds, and they go either way.
        start_at = turn // 2 % len(names)
        order = names[start_at:] + names[:start_at]
        for name in order if turn % 2 else reversed(order):
            start = time.perf_counter()
            passes[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main(options: Options) -> None:
    """Time all passes in turn and print the medians."""
    device = torch.device(options.device)
    model = timm.create_model(options.model_name).eval().to(device)
    size = timm.data.resolve_model_data_config(model)["input_size"]  # type: ignore[attr-defined, no-untyped-call]
    batches = [torch.randn(options.batch_size, *size, device=device) for _ in range(options.batches)]
    sites = find_sites(model, batches[0][:1])
    times = timed(passes_of(options, model, sites, batches), options.rounds, device)
    setting = {
        "model": options.model_name,
        "images": options.batch_size * options.batches,
        "batch": options.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(setting))
    for name, took in times.items():
        ratios = [with_it / bare for with_it, bare in zip(took, times[_FORWARD], strict=True)]
        found = {
            "pass": name,
            "ms": round(stats.median(took), 2),
            "ratio_median": round(stats.median(ratios), 4),
            "ratio_min": round(min(ratios), 4),
            "ratio_max": round(max(ratios), 4),
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
