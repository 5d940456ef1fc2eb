"""Choices and settings of export and timing, which the command line reads without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ExportFormat = Literal["onnx", "pt2", "openvino", "executorch"]
ExportPrecision = Literal["float32", "float16", "bfloat16", "int8"]
Backend = Literal["torch", "onnxruntime", "openvino"]
LatencyPrecision = Literal["float32", "bfloat16", "float16", "amp_bfloat16", "amp_float16"]


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """Settings under which the models are run; the defaults are plain PyTorch on the CPU."""

    backend: Backend = "torch"
    """torch; or onnxruntime or openvino on the CPU (both models are exported first)."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    threads: int | None = None
    """Threads on the CPU; unless given, as many as PyTorch takes."""
    precision: LatencyPrecision = "float32"
    """bfloat16 and float16 convert the weights, amp_bfloat16 and amp_float16 run under autocast; openvino takes
    float32, or bfloat16 where the processor has it."""
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
