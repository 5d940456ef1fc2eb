"""How much faster a pruned model is than its dense one, beside what its MACs promise."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.cost.macs import count_macs
from vbp.cost.timing import Spread, compare_passes, hardware, system_load
from vbp.deploy.latency_backends import LatencySettings, batch_for, check_settings, cpu_threads, runner_of
from vbp.runtime.tables import format_count, text_table


@dataclass(frozen=True)
class LatencyRow:
    """One batch size.

    Attributes:
        dense: Milliseconds of a batch.
        pruned: Milliseconds of a batch.
        speedup: Dense over pruned, round by round.
        cpu_speedup: The same by processor time: steadier on a machine with other work; None on a GPU.
        ideal: Dense over pruned by MACs.
        rounds: How many were timed.
    """

    batch: int
    dense: Spread
    pruned: Spread
    speedup: Spread
    cpu_speedup: Spread | None
    ideal: float
    rounds: int

    @property
    def of_ideal(self) -> float:
        """Return the share of the ideal speed-up that was measured."""
        return self.speedup.median / self.ideal


@dataclass(frozen=True)
class LatencyReport:
    """Dense against pruned for several batch sizes.

    Attributes:
        macs: Multiply-accumulates of one image, dense and pruned.
        hardware: The device, in words.
        threads: In use on the CPU.
        load: Programs that wanted the processor, mean of the minute before and of the minute at the end.
    """

    rows: tuple[LatencyRow, ...]
    macs: tuple[int, int]
    settings: LatencySettings
    hardware: str
    threads: int
    load: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "macs": list(self.macs),
            "hardware": self.hardware,
            "threads": self.threads,
            "load": list(self.load),
            "settings": asdict(self.settings),
            "torch": torch.__version__,
            "rows": [{**asdict(row), "of_ideal": row.of_ideal} for row in self.rows],
        }

    def table(self) -> str:
        """Return the figures as a table for the terminal."""
        heading = ("batch", "dense", "pruned", "measured (quartiles)", "by MACs", "of ideal")
        settings = self.settings
        how = [settings.backend, settings.precision, self.hardware]
        how += [f"{self.threads} threads"] if settings.device == "cpu" else []
        how += [name for name in ("compile", "channels_last") if getattr(settings, name)]
        dense, pruned = map(format_count, self.macs)
        table = text_table([heading, *map(_cells, self.rows)], "r", (6, 12, 12, 24, 8, 8))
        return "\n".join([", ".join(how), f"MACs {dense} -> {pruned}", table])


def compare_latency(
    dense: nn.Module,
    pruned: nn.Module,
    example: Float[Tensor, "batch channels height width"],
    *,
    batch_sizes: Sequence[int] = (1, 32),
    settings: LatencySettings | None = None,
) -> LatencyReport:
    """Time a dense model against its pruned one.

    Args:
        dense: Copied; random weights take as long as trained ones.
        pruned: Copied.
        example: An image or more, prepared as the models want them.
        batch_sizes: Images in a batch.
        settings: How the models are run.

    Raises:
        InputError: A setting is wrong, contradicts another, or needs what this machine does not have.

    Example:
        >>> vbp.compare_latency(model, pruned, example, batch_sizes=[1], settings=settings).rows[0].batch
        1
    """
    chosen = settings or LatencySettings()
    check_settings(chosen, batch_sizes)
    # Counted before anything is compiled or converted.
    macs = tuple(
        count_macs(copy.deepcopy(model).cpu().float(), example[:1].cpu().float()) for model in (dense, pruned)
    )
    ideal, device, before = macs[0] / macs[1], torch.device(chosen.device), system_load()
    rows = []
    with (
        cpu_threads(chosen.threads),
        torch.inference_mode(),
        tempfile.TemporaryDirectory(prefix="vbp-latency-") as folder,
    ):
        runners = {
            name: runner_of(model, example, chosen, Path(folder) / f"{name}.onnx")
            for name, model in (("dense", dense), ("pruned", pruned))
        }
        for batch in batch_sizes:
            images = batch_for(example, batch, chosen)
            timed = compare_passes(
                partial(runners["dense"], images),
                partial(runners["pruned"], images),
                device,
                rounds=chosen.rounds,
                warmup=chosen.warmup,
                budget_s=chosen.budget_s,
            )
            rows.append(
                LatencyRow(
                    batch, timed.dense_ms, timed.pruned_ms, timed.speedup, timed.cpu_speedup, ideal, timed.rounds
                )
            )
        threads = torch.get_num_threads()
    loads = (before, system_load())
    return LatencyReport(tuple(rows), (macs[0], macs[1]), chosen, hardware(device), threads, loads)


def _cells(row: LatencyRow) -> tuple[str, ...]:
    speed = f"{row.speedup.median:.3f}x ({row.speedup.low:.3f}, {row.speedup.high:.3f})"
    return (
        str(row.batch),
        f"{row.dense.median:.2f} ms",
        f"{row.pruned.median:.2f} ms",
        speed,
        f"{row.ideal:.3f}x",
        f"{row.of_ideal:.1%}",
    )
