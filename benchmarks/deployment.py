"""What pruning and int8 bring on this processor: dense and pruned, in PyTorch, onnxruntime and OpenVINO.

    python benchmarks/deployment.py --data ../imagenet --checkpoint deit_tiny.safetensors

Prunes a timm model by `vbp.prune`, or takes an artefact that a run saved and fine-tuned (`--artifact`); writes both
models for every runtime; prints one Markdown row for each: top-1 accuracy with its standard error, milliseconds at
batch 1, how many times as fast as the dense model in PyTorch, and bytes.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

import vbp
from vbp.cost.timing import Spread, hardware, system_load, time_in_turns
from vbp.deploy.settings import ExportFormat, ExportPrecision
from vbp.runtime.choices import Toggle
from vbp.runtime.tables import with_error

Runtime = Literal["torch", "onnxruntime", "openvino"]
_FORMATS: dict[Runtime, ExportFormat] = {"onnxruntime": "onnx", "openvino": "openvino"}
_REFERENCE = "dense in PyTorch"


@dataclass(frozen=True)
class Options:
    """Compare what can be shipped."""

    data: Path
    """Folder with train and val, each with one folder for each class."""
    model_name: str = "deit_tiny_patch16_224"
    """A timm model."""
    checkpoint: Path | None = None
    """Its weights; by default those that timm names."""
    artifact: Path | None = None
    """A pruned model of it that vbp saved, in the place of pruning here."""
    keep_ratio: float = 0.65
    """Share of the hidden channels to keep."""
    round_to: int = 8
    """Multiple to which the widths are rounded."""
    calibration: int = 1000
    """Training images for pruning, balanced over the classes."""
    int8_calibration: int = 256
    """Training images that set the ranges of int8."""
    reduce_range: Toggle = "auto"
    """Whether int8 weights take 7 bits."""
    limit_val: int = 0
    """Validation images, balanced over the classes; 0 takes all."""
    runtimes: tuple[Runtime, ...] = ("torch", "onnxruntime", "openvino")
    """What runs the models."""
    threads: int = 1
    """Threads of each runtime."""
    rounds: int = 21
    """Timed turns of each model."""
    output: Path | None = None
    """JSON file for the figures."""


@dataclass(frozen=True)
class Row:
    """A model in a runtime: top-1 in percent, milliseconds and speed-up at batch 1, bytes."""

    runtime: Runtime
    model: str
    top1: float
    images: int
    ms: Spread
    speedup: Spread
    size: int

    def line(self) -> str:
        """Return a row of the table."""
        return (
            f"| {self.runtime} | {self.model} | {with_error(self.top1, self.images)} | {self.ms.median:.1f} "
            f"({self.ms.low:.1f} to {self.ms.high:.1f}) | {self.speedup.median:.2f}x | {self.size / 2**20:.1f} |"
        )


@dataclass(frozen=True)
class Shipped:
    """A model as it is shipped: its name in the table, how it is opened, and its bytes."""

    model: str
    open: Callable[[], nn.Module]
    size: int


class Deployment:
    """The dense and the pruned model, and the images."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.classifier = vbp.load_classifier(options.model_name, checkpoint=options.checkpoint)
        self.val = self.read("val", options.limit_val)
        self.train = [pixels for pixels, _ in self.read("train", options.int8_calibration)]
        self.models = {"dense": self.classifier.model, "pruned": self._pruned()}

    def read(self, split: Literal["train", "val"], count: int) -> list[tuple[Tensor, Tensor]]:
        """Decode images into memory."""
        classes, names = self.classifier.num_classes, self.classifier.class_names
        images = vbp.balanced_subset(vbp.list_images(self.options.data, split, classes, names), count, 0)
        transform = vbp.evaluation_transform(self.classifier.preprocessing)
        return list(vbp.make_loader(images, transform, batch_size=25, num_workers=0))

    def _pruned(self) -> nn.Module:
        if self.options.artifact is not None:
            return vbp.load_pruned(self.options.artifact)
        images = self.read("train", self.options.calibration)
        keep_ratio, round_to = self.options.keep_ratio, self.options.round_to
        return vbp.prune(self.classifier, images, keep_ratio=keep_ratio, round_to=round_to, calib_samples=0).model

    def shipped(self, runtime: Runtime, folder: Path) -> Iterator[Shipped]:
        """Write both models for a runtime, in float32 and where it quantises in int8."""
        for name, model in self.models.items():
            if runtime == "torch":
                size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
                yield Shipped(name, partial(nn.Module.eval, model), size)
                continue
            for dtype in ("float32", "int8"):
                report = self.export(model, folder / f"{name}-{dtype}", _FORMATS[runtime], dtype)
                yield Shipped(
                    name if dtype == "float32" else f"{name}, int8",
                    partial(vbp.open_exported, report.file, threads=self.options.threads),
                    report.size,
                )

    def export(self, model: nn.Module, path: Path, to: ExportFormat, dtype: ExportPrecision) -> Any:
        """Write a file; int8 is judged by its accuracy alone."""
        return vbp.export_model(
            model,
            self.val[0][0],
            path if to == "openvino" else path.with_suffix(f".{to}"),
            to=to,
            dtype=dtype,
            calibration=self.train if dtype == "int8" else None,
            reduce_range=self.options.reduce_range if dtype == "int8" else "auto",
            tolerance=10 if dtype == "int8" else None,
        )

    def rows(self, runtime: Runtime) -> Iterator[Row]:
        """Measure a runtime: its models and the dense one of PyTorch take turns."""
        with tempfile.TemporaryDirectory(prefix="vbp-deployment-") as folder:
            shipped = {each.model: each for each in self.shipped(runtime, Path(folder))}
            opened = {name: each.open() for name, each in shipped.items()}
            image = self.val[0][0][:1]
            passes: dict[str, Callable[[], object]] = {name: partial(model, image) for name, model in opened.items()}
            if runtime != "torch":
                passes[_REFERENCE] = partial(self.classifier.model, image)
            reference = "dense" if runtime == "torch" else _REFERENCE
            with torch.inference_mode(), threads_of_torch(self.options.threads):
                turns = time_in_turns(passes, torch.device("cpu"), rounds=self.options.rounds)
                for name, model in opened.items():
                    accuracy = vbp.evaluate(model, self.val, "cpu")
                    pairs = zip(turns[reference], turns[name], strict=True)
                    yield Row(
                        runtime,
                        name,
                        accuracy.top1,
                        accuracy.images,
                        Spread.of([turn.ms for turn in turns[name]]),
                        Spread.of([reference.ms / turn.ms for reference, turn in pairs]),
                        shipped[name].size,
                    )


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def conditions(options: Options) -> dict[str, Any]:
    """Return where and when it was measured."""
    packages = ("torch", *(name for name in options.runtimes if name != "torch"))
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "hardware": hardware(torch.device("cpu")),
        "threads": options.threads,
        "load": system_load(),
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def main(options: Options) -> None:
    """Measure all runtimes."""
    deployment, measured = Deployment(options), list[Row]()
    where = conditions(options)
    print(", ".join(f"{name} {value}" for name, value in where.items() if value is not None))
    print("\n| runtime | model | top-1 % | ms at batch 1 (quartiles) | over dense in PyTorch | MiB |")
    print("|---|---|---|---|---|---|")
    for runtime in options.runtimes:
        for row in deployment.rows(runtime):
            measured.append(row)
            print(row.line(), flush=True)
    if options.output is not None:
        found = {"conditions": where, "rows": [asdict(row) for row in measured]}
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
