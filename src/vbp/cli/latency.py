"""The job of `vbp latency`: how much faster a pruned model is than its dense one."""

from __future__ import annotations

import dataclasses

import torch

from vbp.cli.options import LatencyConfig
from vbp.deploy.artifact import load_pruned, read_artifact
from vbp.deploy.latency import LatencyReport, compare_latency
from vbp.deploy.settings import LatencySettings
from vbp.errors import InputError
from vbp.models.load import build_model
from vbp.runtime.files import write_json


def run_latency(config: LatencyConfig) -> LatencyReport:
    """Time a pruned model against its dense one."""
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
        # The other runtimes are timed on the CPU alone.
        gpu = torch.cuda.is_available() and config.backend == "torch" and config.threads is None
        settings = dataclasses.replace(settings, device="cuda" if gpu else "cpu")
    report = compare_latency(
        build_model(artifact.source, artifact.weights),
        load_pruned(config.artifact),
        artifact.preprocessing.example_input(),
        batch_sizes=config.batch_sizes,
        settings=settings,
    )
    if config.output is not None:
        write_json(config.output, report.to_dict())
    return report
