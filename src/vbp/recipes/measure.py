"""Measure a model in a run: accuracy, size, time."""

from __future__ import annotations

from functools import partial

from torch import nn

from vbp.cost.macs import count_macs, count_parameters
from vbp.cost.timing import compare_models
from vbp.recipes.setup import Job
from vbp.report.run_report import Measured
from vbp.runtime.memory import out_of_memory
from vbp.runtime.tables import format_count
from vbp.training.evaluate import evaluate


def measure(job: Job, model: nn.Module, label: str = "evaluation") -> Measured:
    """Return accuracy on all validation images, and size; the same on every process."""
    session, processes = job.session, job.session.processes
    with session.timed("evaluation"), out_of_memory("evaluation"):
        accuracy = evaluate(
            model, session.progress(job.val, label), session.device,
            precision=session.precision, processes=processes,
        )  # fmt: skip
    unreadable = processes.all_gather(dict(job.val.unreadable))
    if processes.is_main:  # whose log is kept
        for errors in unreadable:
            job.val.take_over(errors)
    return Measured(
        accuracy.top1, accuracy.top5, count_macs(model, job.example), count_parameters(model), images=accuracy.images
    )


def describe(model: Measured) -> str:
    """Return in one line what was measured."""
    return (
        f"top-1 {model.top1:.2f} %, top-5 {model.top5:.2f} %, {format_count(model.macs)} MACs, "
        f"{format_count(model.params)} parameters"
    )


def latencies(job: Job, pruned: nn.Module) -> tuple[float, float]:
    """Return the milliseconds of a batch of the dense and the pruned model, which take turns on the main process."""
    compare = partial(compare_models, job.dense, pruned, job.latency_images, precision=job.session.precision)
    timed = job.session.processes.from_main(compare)
    return timed.dense_ms.median, timed.pruned_ms.median
