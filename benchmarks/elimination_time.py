"""What elimination and refit for one given budget cost on a model of full size, and how much memory they take.

    OMP_NUM_THREADS=2 python benchmarks/elimination_time.py --model_name vit_base_patch16_224

Weights and covariances are random: a power law of eigenvalues, channels of very different variance. What the steps
cost does not depend on them. Prints one JSON line: seconds of the elimination, and of plan and surgery with refit;
the most memory that the process ever held, the model and all covariances included.
"""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass

import timm
import torch
import tyro
from torch import Tensor

import vbp
from vbp.method.covariance import ChannelCovariance, covariance_bytes
from vbp.method.moments import ChannelMoments
from vbp.pruning.criteria import eliminations
from vbp.statistics.statistics import Statistics


@dataclass(frozen=True)
class Options:
    """Time elimination and refit on the MLPs of a timm model."""

    model_name: str = "deit_tiny_patch16_224"
    """A timm model; random weights cost as much as trained ones."""
    keep_ratio: float = 0.5
    """Share of the hidden channels to keep."""
    samples: int = 100_000
    """Tokens that the covariances claim to be of."""
    device: str = "cpu"
    """Where to run."""


def random_covariance(hidden: int, samples: int, generator: torch.Generator) -> ChannelCovariance:
    """Return a covariance of full rank, its k-th eigenvalue about 1/k, seen through channels of different scale."""
    axes = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    axes *= torch.arange(1, hidden + 1, dtype=torch.float64).rsqrt()
    axes *= torch.randn(hidden, 1, generator=generator, dtype=torch.float64).exp()
    mean = torch.randn(hidden, generator=generator, dtype=torch.float64)
    return ChannelCovariance(samples, mean, (axes @ axes.T).mul_(samples - 1))


def random_statistics(sites: tuple[vbp.Site, ...], samples: int) -> Statistics:
    """Return statistics of all sites."""
    generator = torch.Generator().manual_seed(0)
    found = {site.name: random_covariance(site.hidden, samples, generator) for site in sites}
    moments = {name: ChannelMoments(samples, one.mean, one.m2.diagonal().clone()) for name, one in found.items()}
    return Statistics(moments, images=1, model="random", covariances=found)


class Clock:
    """Seconds on the wall, and of all cores together: on a busy machine the second says more of the work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return both since the last reading, once the device has done its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        found = {"wall_s": round(wall - self._wall, 2), "cpu_s": round(cpu - self._cpu, 2)}
        self._wall, self._cpu = wall, cpu
        return found


def main(options: Options) -> None:
    """Eliminate, plan, prune, and print the seconds."""
    device = torch.device(options.device)
    model = timm.create_model(options.model_name).eval().to(device)
    size = timm.data.resolve_model_data_config(model)["input_size"]  # type: ignore[attr-defined, no-untyped-call]
    sites = vbp.find_sites(model, torch.randn(1, *size, device=device))
    statistics = random_statistics(sites, options.samples)
    clock = Clock(device)
    orders = eliminations(model, sites, statistics)
    elimination = clock.read()
    scores: Mapping[str, Tensor] = {name: order.scores for name, order in orders.items()}
    plan = vbp.make_plan(sites, scores, keep_ratio=options.keep_ratio)
    vbp.prune_(model, plan, statistics.means, statistics.covariances)
    refit = clock.read()
    result = {
        "model": options.model_name,
        "sites": len(sites),
        "hidden": sites[0].hidden,
        "keep_ratio": options.keep_ratio,
        "elimination": elimination,
        "plan_and_refit": refit,
        "covariances_gb": round(covariance_bytes([site.hidden for site in sites]) / 1e9, 2),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
