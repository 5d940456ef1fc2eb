"""How a model is run when its latency is measured."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vbp.deploy.file_formats import OnnxClassifier, Portable, require_onnx, write_onnx
from vbp.errors import InputError

Backend = Literal["torch", "onnxruntime"]


LatencyPrecision = Literal["float32", "bfloat16", "float16", "amp_bfloat16", "amp_float16"]


@dataclass(frozen=True)
class LatencySettings:
    """How the models are run; the defaults are plain PyTorch on the CPU.

    Attributes:
        backend: `torch`, or `onnxruntime` on the CPU.
        device: cpu, cuda or cuda:N.
        threads: Threads on the CPU; None leaves them as they are.
        precision: `bfloat16` and `float16` convert the weights, `amp_*` run under autocast.
        compile: Run through torch.compile.
        channels_last: Keep images and convolutions in the layout that GPUs like.
        rounds: Timed turns of each model.
        warmup: Passes of each model before them.
        budget_s: Seconds for a batch size after which no further round begins; three are timed in any case.
    """

    backend: Backend = "torch"
    device: str = "cpu"
    threads: int | None = None
    precision: LatencyPrecision = "float32"
    compile: bool = False
    channels_last: bool = False
    rounds: int = 21
    warmup: int = 3
    budget_s: float = 60


def check_settings(settings: LatencySettings, batch_sizes: Sequence[int]) -> None:
    """Check the settings before any work.

    Raises:
        InputError: One is wrong, contradicts another, or needs what this machine does not have.
    """
    choices = (("backend", get_args(Backend)), ("precision", get_args(LatencyPrecision)))
    for name, allowed in choices:
        if getattr(settings, name) not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(settings, name)!r}")
    numbers = {"batch size": min(batch_sizes, default=0), "rounds": settings.rounds, "warmup": settings.warmup}
    numbers["threads"] = 1 if settings.threads is None else settings.threads
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    try:
        kind = torch.device(settings.device).type
    except RuntimeError as error:
        raise InputError(f"device must be cpu, cuda or cuda:N, got {settings.device!r}") from error
    if kind not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu, cuda or cuda:N, got {settings.device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {settings.device} needs a GPU that PyTorch can use, got none; use --device cpu")
    if kind == "cuda" and settings.threads is not None:
        raise InputError("threads are for the CPU, got them with a GPU; leave them out")
    if settings.backend == "onnxruntime":
        _check_onnxruntime(settings, kind)


def _check_onnxruntime(settings: LatencySettings, kind: str) -> None:
    refused = [name for name in ("compile", "channels_last") if getattr(settings, name)]
    if kind != "cpu" or settings.precision != "float32" or refused:
        raise InputError(
            "onnxruntime is timed on the CPU in float32 and without compile and channels_last, got "
            f"{', '.join([settings.device, settings.precision, *refused])}; use the torch backend for these"
        )
    require_onnx()


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Set PyTorch's threads, and set them back."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def runner_of(model: nn.Module, example: Tensor, settings: LatencySettings, file: Path) -> Callable[[Any], object]:
    """Return what runs a batch of `batch_for`.

    Args:
        model: Copied.
        example: An image or more.
        settings: How it is run.
        file: Where onnxruntime's file may be put.
    """
    if settings.backend == "onnxruntime":
        with torch.inference_mode(False), torch.no_grad():
            write_onnx(Portable(model, torch.float32), example.cpu().float(), file)
        session = OnnxClassifier(file, torch.get_num_threads()).session
        return lambda images: session.run(None, {"images": images})
    amp = settings.precision.startswith("amp_")
    dtype = getattr(torch, settings.precision.removeprefix("amp_"))
    ready = copy.deepcopy(model).to(settings.device, torch.float32 if amp else dtype).eval()
    if settings.channels_last:
        ready = ready.to(memory_format=torch.channels_last)
    if settings.compile:
        ready.compile(dynamic=False)
    if not amp:
        return ready

    def under_autocast(images: Tensor) -> object:
        with torch.autocast(torch.device(settings.device).type, dtype):
            return ready(images)

    return under_autocast


def batch_for(example: Tensor, batch: int, settings: LatencySettings) -> Any:
    """Return a batch of that many images as the runner takes it."""
    images = example.detach().float().cpu()
    images = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch].contiguous()
    if settings.backend == "onnxruntime":
        return images.numpy()
    amp = settings.precision.startswith("amp_")
    images = images.to(settings.device, torch.float32 if amp else getattr(torch, settings.precision))
    return images.to(memory_format=torch.channels_last) if settings.channels_last else images
