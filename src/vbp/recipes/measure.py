"""Measure a model in a run: accuracy, or agreement with the dense model, size, time."""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import nn

from vbp.cost.macs import count_macs, count_parameters
from vbp.cost.timing import LatencyComparison, compare_models, hardware
from vbp.errors import InputError
from vbp.recipes.setup import Job
from vbp.report.run_report import Measured
from vbp.runtime.decode import to_json
from vbp.runtime.memory import out_of_memory
from vbp.runtime.tables import format_count
from vbp.training.evaluate import evaluate
from vbp.training.retrieval import compare_embeddings

_log = logging.getLogger(__name__)


def measure(job: Job, model: nn.Module, label: str = "evaluation") -> Measured:
    """Return accuracy on all validation images, and size; the same on every process.

    Without labels, or for a model that is no classifier, it is the agreement with the original model.
    """
    session, processes = job.session, job.session.processes
    sizes = {"macs": count_macs(model, job.example), "params": count_parameters(model)}
    with session.timed("evaluation"), out_of_memory("evaluation"):
        if job.labelled:
            accuracy = evaluate(
                model, session.progress(job.val, label), session.device,
                precision=session.precision, processes=processes,
            )  # fmt: skip
            measured = Measured(accuracy.top1, accuracy.top5, **sizes, images=accuracy.images)
        else:
            original = job.original_embeddings
            seen = original if model is job.dense and job.original is None else job.embeddings(model, label)
            measured = Measured(None, None, **sizes, **to_json(compare_embeddings(original, seen)))
    unreadable = processes.all_gather(dict(job.val.unreadable))
    if processes.is_main:  # whose log is kept
        for errors in unreadable:
            job.val.take_over(errors)
    return measured


def measure_dense(job: Job) -> Measured:
    """Measure the dense model, and refuse one that guesses unless it was said to be at random.

    Raises:
        InputError: Its top-1 is not above chance.
    """
    measured, classes = measure(job, job.dense), job.classifier.num_classes
    _log.info("dense: %s", describe(measured))
    if not job.labelled or classes == 1 or job.config.allow_random_init or job.config.allow_bad_dense:
        return measured
    chance, images = 1 / classes, measured.images or 1
    assert measured.top1 is not None
    # Two standard deviations above it; of few images half the way to all of them is enough.
    enough = min(chance + 2 * (chance * (1 - chance) / images) ** 0.5, (1 + chance) / 2)
    if measured.top1 <= 100 * enough:
        raise InputError(
            f"the dense model must be above chance ({100 * chance:.2f} %), got top-1 {measured.top1_text} % of "
            f"{images} images; usual causes are labels or class folders in another order than the model's, another "
            "preprocessing (mean, std, img_size), and weights that were not trained; --allow_bad_dense goes on"
        )
    return measured


def describe(model: Measured) -> str:
    """Return in one line what was measured."""
    quality = f"top-1 {model.top1_text} %, top-5 {model.top5_text} %"
    if model.top1 is None:
        quality = ", ".join(f"{name} {text}" for name, text in model.quality)
    return f"{quality}, {format_count(model.macs)} MACs, {format_count(model.params)} parameters"


def compare_latency(job: Job, pruned: nn.Module) -> LatencyComparison:
    """Time the dense and the pruned model, which take turns on the main process, for all processes."""
    compare = partial(compare_models, job.dense, pruned, job.latency_images, precision=job.session.precision)
    timed = job.session.processes.from_main(compare)
    _log.info("speed-up %s at %s: %s", timed.speedup_text, timed.conditions, timed.latency_text)
    return timed


def machine(device: torch.device) -> str:
    """Return the processor, and the GPU where that is the device."""
    names = [hardware(torch.device("cpu"))]
    return "; ".join(names if device.type == "cpu" else [*names, hardware(device)])
