"""What the width of an MLP's hidden layer costs on a CPU: time a channel, beside a round width.

    python benchmarks/latency_widths.py

Prints one Markdown row for each width: the processor time of an MLP with that many channels, per channel and relative
to the multiples of 16 of the same round (their median), as median over rounds in which all take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

from vbp.cost.timing import time_in_turns


@dataclass(frozen=True)
class Options:
    """Time linear, GELU, linear; the defaults are those of DeiT-Tiny."""

    embedding: int = 192
    """Width of input and output."""
    widths: tuple[int, ...] = (384, 385, 388, 392, 400, 496, 497, 499, 500, 504, 511, 512)
    """Hidden channels."""
    tokens: int = 197
    """Tokens of an image."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Images in a batch."""
    rounds: int = 9
    """Timed turns of each width."""


def forward(layers: nn.Module, inputs: Tensor) -> Callable[[], object]:
    """Return one pass."""
    return lambda: layers(inputs)


def main(options: Options) -> None:
    """Measure all widths with one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| width | batch | time a channel, relative to multiples of 16 |\n|---|---|---|")
    for batch in options.batch_sizes:
        inputs = torch.randn(batch * options.tokens, options.embedding)
        layers = {
            str(width): nn.Sequential(
                nn.Linear(options.embedding, width), nn.GELU(), nn.Linear(width, options.embedding)
            )
            for width in sorted(options.widths)
        }
        with torch.inference_mode():
            turns = time_in_turns(
                {width: forward(model, inputs) for width, model in layers.items()},
                torch.device("cpu"),
                rounds=options.rounds,
            )
        channel_ms = {int(width): [turn.cpu_ms / int(width) for turn in timed] for width, timed in turns.items()}
        rounds = zip(*(times for width, times in channel_ms.items() if width % 16 == 0), strict=True)
        usual = [statistics.median(times) for times in rounds]
        for width, times in channel_ms.items():
            ratio = statistics.median(one / other for one, other in zip(times, usual, strict=True))
            print(f"| {width} | {batch} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
