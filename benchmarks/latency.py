"""Measured speed-up beside the MACs ratio, for several widths: what odd widths cost.

    python benchmarks/latency.py --threads 1 2

Prunes a timm model of random weights by the same share in every block, and prints one Markdown row for each share,
`round_to`, number of threads and batch size. The figures depend on the shapes alone.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import tyro
from torch import Tensor, nn

import vbp
from vbp.cost.timing import LatencyComparison
from vbp.deploy.latency import compare_latency
from vbp.deploy.settings import Backend, LatencyPrecision, LatencySettings


@dataclass(frozen=True)
class Options:
    """Time dense against pruned."""

    model_name: str = "deit_tiny_patch16_224"
    """A timm model."""
    keep_ratios: tuple[float, ...] = (0.65, 0.5)
    """Shares of the hidden channels to keep in every block."""
    round_to: tuple[int, ...] = (1, 8, 16, 32, 64)
    """Multiples to which the widths are rounded."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Images in a batch."""
    threads: tuple[int, ...] = (1,)
    """Threads on the CPU; with a GPU give none."""
    backend: Backend = "torch"
    """torch, onnxruntime or openvino."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    precision: LatencyPrecision = "float32"
    """bfloat16 and float16 convert the weights, amp_bfloat16 and amp_float16 run under autocast."""
    compile: bool = False
    """Run through torch.compile."""
    channels_last: bool = False
    """Keep images and convolutions in channels-last layout."""
    rounds: int = 15
    """Timed turns of each model."""
    budget_s: float = 30
    """Seconds for a batch size after which no further round begins."""
    output: Path | None = None
    """JSON file for all figures."""


def pruned_copy(model: nn.Module, example: Tensor, keep_ratio: float, round_to: int) -> tuple[nn.Module, list[int]]:
    """Return the model with as many channels left as asked, and the widths that it then has."""
    sites = vbp.find_sites(model, example)
    generator = torch.Generator().manual_seed(0)
    scores = {site.name: torch.rand(site.hidden, generator=generator, dtype=torch.float64) for site in sites}
    plan = vbp.make_plan(sites, scores, keep_ratio=keep_ratio, scope="per_layer", round_to=round_to)
    pruned = copy.deepcopy(model)
    vbp.prune_(pruned, plan)
    return pruned, sorted({kept for kept, _ in plan.widths.values()})


def line(
    keep: float, multiple: int, widths: list[int], threads: int | None, row: LatencyComparison, ideal: float
) -> str:
    """Return a row of the table."""
    width = str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
    cpu = "" if row.cpu_speedup is None else f"{row.cpu_speedup.median / ideal:.3f}"
    return (
        f"| {keep} | {multiple} | {width} | {threads or ''} | {row.batch} | {row.dense_ms.median:.1f} | "
        f"{row.pruned_ms.median:.1f} | {row.speedup.median:.3f} ({row.speedup.low:.3f}, {row.speedup.high:.3f}) | "
        f"{ideal:.3f} | {row.speedup.median / ideal:.3f} | {cpu} |"
    )


def main(options: Options) -> None:
    """Measure all combinations."""
    torch.manual_seed(0)
    model = timm.create_model(options.model_name).eval()
    example = torch.randn(1, *timm.data.resolve_model_data_config(model)["input_size"])  # type: ignore[attr-defined, no-untyped-call]
    print(
        "| keep | round_to | widths | threads | batch | dense ms | pruned ms | measured (quartiles) | by MACs "
        "| of ideal | of ideal, processor time |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    found = []
    for keep in options.keep_ratios:
        for multiple in options.round_to:
            pruned, widths = pruned_copy(model, example, keep, multiple)
            for threads in options.threads or (None,):
                settings = LatencySettings(
                    backend=options.backend,
                    device=options.device,
                    threads=threads,
                    precision=options.precision,
                    compile=options.compile,
                    channels_last=options.channels_last,
                    rounds=options.rounds,
                    budget_s=options.budget_s,
                )
                report = compare_latency(model, pruned, example, batch_sizes=options.batch_sizes, settings=settings)
                found.append({"keep": keep, "round_to": multiple, "widths": widths, **report.to_dict()})
                for row in report.rows:
                    print(line(keep, multiple, widths, threads, row, report.ideal), flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
