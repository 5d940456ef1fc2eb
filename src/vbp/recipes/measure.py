"""What a run measures on a model: accuracy, size, time."""

from __future__ import annotations

from torch import nn

from vbp.cost.macs import count_macs, count_parameters, format_count
from vbp.cost.timing import measure_latency_ms
from vbp.recipes.setup import Job, latency_batch
from vbp.report.run_report import Measured
from vbp.runtime.memory import out_of_memory
from vbp.runtime.session import bar
from vbp.training.evaluate import evaluate


def measure(job: Job, model: nn.Module, label: str = "evaluation") -> Measured:
    """Return accuracy on all validation images, and size; the same on every process."""
    with job.timed("evaluation"), out_of_memory("evaluation"):
        accuracy = evaluate(
            model, bar(job, job.val, label), job.device, precision=job.precision, processes=job.processes
        )
    unreadable = job.processes.all_gather(dict(job.val.unreadable))
    if job.processes.is_main:  # whose log is kept
        for found in unreadable:
            job.val.take_over(found)
    return Measured(
        accuracy.top1,
        accuracy.top5,
        count_macs(model, job.example),
        count_parameters(model),
        images=accuracy.images,
    )


def figures(model: Measured) -> str:
    """Say in one line what was measured."""
    return (
        f"top-1 {model.top1:.2f} %, top-5 {model.top5:.2f} %, {format_count(model.macs)} MACs, "
        f"{format_count(model.params)} parameters"
    )


def latencies(job: Job, models: dict[str, nn.Module]) -> tuple[dict[str, float], int]:
    """Time the models side by side on the main process, and give milliseconds a batch and the batch's images."""
    batch = latency_batch(job.config, job.model, job.example)
    found = {}
    if job.processes.is_main:
        with job.precision.autocast():
            found = measure_latency_ms(models, batch)
    return job.processes.all_gather(found)[0], len(batch)
