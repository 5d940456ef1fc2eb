"""What a run measures on a model: accuracy, size, time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from tqdm import tqdm

from vbp.aiming import latency_batch
from vbp.cost import count_macs, count_parameters, format_count
from vbp.evaluation import evaluate
from vbp.job import Job
from vbp.memory import out_of_memory
from vbp.report import Measured
from vbp.timing import measure_latency_ms


def bar(job: Job, loader: Iterable[Any], label: str) -> Any:
    """Draw progress on the main process, where the output is a terminal."""
    hidden = None if job.processes.main else True
    return tqdm(loader, desc=label, unit="batch", leave=False, disable=hidden, dynamic_ncols=True)


@contextmanager
def counted(job: Job, label: str, unit: str) -> Iterator[Callable[[str], None]]:
    """Draw progress as `bar` does over steps whose number nobody knows: call what is given with each step's name."""
    hidden = None if job.processes.main else True
    with tqdm(desc=label, unit=f" {unit}", leave=False, disable=hidden, dynamic_ncols=True) as drawn:

        def tell(name: str) -> None:
            drawn.set_postfix_str(name, refresh=False)
            drawn.update()

        yield tell


def measure(job: Job, model: nn.Module, label: str = "evaluation") -> Measured:
    """Give accuracy on all validation images, and size; the same on every process."""
    with job.timed("evaluation"), out_of_memory("evaluation"):
        accuracy = evaluate(
            model, bar(job, job.val, label), job.device, precision=job.precision, processes=job.processes
        )
    unreadable = job.processes.gather(dict(job.val.unreadable))
    if job.processes.main:  # whose log is kept
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
    if job.processes.main:
        with job.precision.autocast():
            found = measure_latency_ms(models, batch)
    return job.processes.gather(found)[0], len(batch)
