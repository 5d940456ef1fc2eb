"""The job of `vbp latency`: how much faster a pruned model is than its dense one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from vbp.deploy.artifact import load_pruned, read_artifact
from vbp.deploy.latency import LatencyReport, compare_latency
from vbp.deploy.latency_backends import Backend, LatencyPrecision, LatencySettings
from vbp.errors import InputError
from vbp.models.load import build_model
from vbp.runtime.files import write_json


@dataclass(frozen=True)
class LatencyConfig:
    """Time a pruned model against its dense one, in turns, beside what its MACs promise.

    Example: vbp latency output/vbp/artifact --batch_sizes 1 32 --threads 1
    """

    artifact: tyro.conf.Positional[str]
    """A pruned model that vbp saved; the dense one is built of random weights, which take as long."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Images in a batch."""
    backend: Backend = "torch"
    """torch, or onnxruntime on the CPU (both models are exported first)."""
    device: str = "auto"
    """auto (a GPU if there is one, else the CPU), cpu, cuda or cuda:N."""
    threads: int | None = None
    """Threads on the CPU; unless given, as many as PyTorch takes."""
    precision: LatencyPrecision = "float32"
    """bfloat16 and float16 convert the weights, amp_bfloat16 and amp_float16 run under autocast."""
    compile: bool = False
    """Run both through torch.compile."""
    channels_last: bool = False
    """Keep images and convolutions in channels-last layout."""
    rounds: int = 21
    """Timed turns of each model."""
    warmup: int = 3
    """Passes of each model before them."""
    budget_s: float = 60
    """Seconds for a batch size after which no further round begins; three are timed in any case."""
    output: Path | None = None
    """JSON file for the figures."""
    json: Annotated[bool, tyro.conf.arg(help="Print JSON in the place of a table.")] = False


def run_latency(config: LatencyConfig) -> LatencyReport:
    """Do what the configuration says.

    Raises:
        InputError: The artefact is wrong or does not know its dense model, or a setting does not fit this machine.
        OutputError: The JSON file could not be written.
    """
    if config.output is not None and not config.output.parent.is_dir():
        raise InputError(f"output must lie in an existing folder, got {config.output}; create {config.output.parent}")
    artifact = read_artifact(config.artifact)
    if artifact.source is None or artifact.preprocessing is None:
        raise InputError(
            f"{config.artifact} does not say how its dense model is built; time it in Python: vbp.compare_latency"
        )
    names = {field.name for field in dataclasses.fields(LatencySettings)}
    settings = LatencySettings(**{name: getattr(config, name) for name in names})
    if config.device == "auto":
        # onnxruntime is timed on the CPU alone.
        gpu = torch.cuda.is_available() and config.backend == "torch" and config.threads is None
        settings = dataclasses.replace(settings, device="cuda" if gpu else "cpu")
    preprocessing = artifact.preprocessing
    example = torch.randn(
        1, len(preprocessing.mean), *preprocessing.img_size, generator=torch.Generator().manual_seed(0)
    )
    report = compare_latency(
        build_model(artifact.source),
        load_pruned(config.artifact),
        example,
        batch_sizes=config.batch_sizes,
        settings=settings,
    )
    if config.output is not None:
        write_json(config.output, report.to_dict())
    return report
