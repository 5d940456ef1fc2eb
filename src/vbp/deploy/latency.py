"""Measure how much faster a pruned model is than its dense one, beside the speed-up that its MACs promise."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.cost.macs import count_macs
from vbp.cost.timing import LatencyComparison, compare_passes, hardware, system_load
from vbp.deploy.file_formats import Portable
from vbp.deploy.onnx_format import OnnxClassifier, require_onnx, write_onnx
from vbp.deploy.openvino_format import (
    Arithmetic,
    OpenVinoClassifier,
    arithmetic_of_processor,
    require_openvino,
    write_openvino,
)
from vbp.deploy.settings import Backend, LatencyPrecision, LatencySettings
from vbp.errors import InputError
from vbp.runtime.decode import to_json
from vbp.runtime.forward import copy_model
from vbp.runtime.tables import format_count, text_table


@dataclass(frozen=True)
class LatencyReport:
    """Dense against pruned, a row for each batch size, with the MACs of one image of both.

    `load` counts the programs that wanted the processor, mean of the minute before and of the minute at the end.
    """

    rows: tuple[LatencyComparison, ...]
    macs: tuple[int, int]
    settings: LatencySettings
    hardware: str
    threads: int
    load: tuple[float | None, float | None]

    @property
    def ideal(self) -> float:
        """Return the speed-up that the MACs promise."""
        return self.macs[0] / self.macs[1]

    def of_ideal(self, row: LatencyComparison) -> float:
        """Return the share of the ideal speed-up that was measured."""
        return row.speedup.median / self.ideal

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        rows = [{**to_json(row), "ideal": self.ideal, "of_ideal": self.of_ideal(row)} for row in self.rows]
        return {**to_json(self), "torch": torch.__version__, "rows": rows}

    def table(self) -> str:
        """Return the figures as a table for the terminal."""
        heading = ("batch", "dense", "pruned", "speed-up (quartiles)", "by MACs", "of ideal")
        settings = self.settings
        how = [settings.backend, settings.precision, self.hardware]
        how += [f"{self.threads} threads"] if settings.device == "cpu" else []
        how += [name for name in ("compile", "channels_last") if getattr(settings, name)]
        dense, pruned = map(format_count, self.macs)
        table = text_table([heading, *map(self._cells, self.rows)], "r", (6, 12, 12, 20, 8, 8))
        return "\n".join([", ".join(how), f"MACs {dense} -> {pruned}", table])

    def _cells(self, row: LatencyComparison) -> tuple[str, ...]:
        dense, pruned = f"{row.dense_ms.median:.2f} ms", f"{row.pruned_ms.median:.2f} ms"
        return str(row.batch), dense, pruned, row.speedup_text, f"{self.ideal:.2f}x", f"{self.of_ideal(row):.1%}"


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
    _check_settings(chosen, batch_sizes)
    # Counted before anything is compiled or converted.
    macs = tuple(count_macs(copy_model(model).cpu().float(), example[:1].cpu().float()) for model in (dense, pruned))
    device, before = torch.device(chosen.device), system_load()
    rows = []
    with (
        _cpu_threads(chosen.threads),
        torch.inference_mode(),
        tempfile.TemporaryDirectory(prefix="vbp-latency-") as folder,
    ):
        run_dense = _runner_of(dense, example, chosen, Path(folder) / "dense")
        run_pruned = _runner_of(pruned, example, chosen, Path(folder) / "pruned")
        for batch in batch_sizes:
            images = _batch_for(example, batch, chosen)
            passes = partial(run_dense, images), partial(run_pruned, images)
            timed = compare_passes(
                *passes, device, batch=batch, precision=chosen.precision, rounds=chosen.rounds, warmup=chosen.warmup,
                budget_s=chosen.budget_s,
            )  # fmt: skip
            rows.append(timed)
        threads = torch.get_num_threads()
    loads = (before, system_load())
    return LatencyReport(tuple(rows), (macs[0], macs[1]), chosen, hardware(device), threads, loads)


def _check_settings(settings: LatencySettings, batch_sizes: Sequence[int]) -> None:
    """Raise InputError for a setting that is wrong, contradicts another, or does not suit this machine."""
    for name, allowed in (("backend", get_args(Backend)), ("precision", get_args(LatencyPrecision))):
        if getattr(settings, name) not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(settings, name)!r}")
    numbers = {"batch size": min(batch_sizes, default=0), "rounds": settings.rounds, "warmup": settings.warmup}
    numbers["threads"] = 1 if settings.threads is None else settings.threads
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    kind = "unknown"
    with contextlib.suppress(RuntimeError):
        kind = torch.device(settings.device).type
    if kind not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu, cuda or cuda:N, got {settings.device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {settings.device} needs a GPU that PyTorch can use, got none; use --device cpu")
    if kind == "cuda" and settings.threads is not None:
        raise InputError("threads are for the CPU, got them with a GPU; leave them out")
    if settings.backend == "torch":
        return
    allowed_precisions: tuple[str, ...] = ("float32",)
    if settings.backend == "onnxruntime":
        require_onnx()
    else:
        require_openvino()
        allowed_precisions = arithmetic_of_processor()
    refused = [name for name in ("compile", "channels_last") if getattr(settings, name)]
    if kind != "cpu" or settings.precision not in allowed_precisions or refused:
        raise InputError(
            f"{settings.backend} is timed on the CPU in {' or '.join(allowed_precisions)} and without compile and "
            f"channels_last, got {', '.join([settings.device, settings.precision, *refused])}; use the torch backend "
            "for these"
        )


@contextlib.contextmanager
def _cpu_threads(count: int | None) -> Iterator[None]:
    """Set PyTorch's threads, and set them back."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _runner_of(model: nn.Module, example: Tensor, settings: LatencySettings, file: Path) -> Callable[[Any], object]:
    """Return a function that runs a copy of the model on a batch of `_batch_for`; other runtimes write to `file`."""
    if settings.backend != "torch":
        return _exported_runner(model, example, settings, file)
    amp = settings.precision.startswith("amp_")
    dtype = getattr(torch, settings.precision.removeprefix("amp_"))
    ready = copy_model(model).to(settings.device, torch.float32 if amp else dtype).eval()
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


def _exported_runner(
    model: nn.Module, example: Tensor, settings: LatencySettings, file: Path
) -> Callable[[Any], object]:
    portable, images, threads = Portable(model, torch.float32), example.cpu().float(), torch.get_num_threads()
    with torch.inference_mode(False), torch.no_grad():
        if settings.backend == "onnxruntime":
            write_onnx(portable, images, file.with_suffix(".onnx"))
            session = OnnxClassifier(file.with_suffix(".onnx"), threads).session
            return lambda batch: session.run(None, {"images": batch})
        write_openvino(portable, images, file.with_suffix(".xml"))
    arithmetic: Arithmetic = "bfloat16" if settings.precision == "bfloat16" else "float32"
    compiled = OpenVinoClassifier(file.with_suffix(".xml"), threads, arithmetic).compiled
    return lambda batch: compiled(batch, share_outputs=True)


def _batch_for(example: Tensor, batch: int, settings: LatencySettings) -> Any:
    """Return a batch of that many images as the runner takes it."""
    images = example.detach().float().cpu()
    images = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch].contiguous()
    if settings.backend != "torch":
        return images.numpy()
    amp = settings.precision.startswith("amp_")
    images = images.to(settings.device, torch.float32 if amp else getattr(torch, settings.precision))
    return images.to(memory_format=torch.channels_last) if settings.channels_last else images
