"""Files of classifiers that run without vbp: ONNX by onnxruntime, `.pt2` of torch.export by torch alone."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError, one_line
from vbp.runtime.forward import copy_model, logits_of

_log = logging.getLogger(__name__)

# A protobuf holds two GiB; the graph beside the weights takes little.
_MOST_BYTES = 2_000_000_000


class Portable(nn.Module):
    """A copy of a classifier, in evaluation mode on the CPU, with one interface for every model and precision."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = copy_model(model).cpu().to(dtype)
        self.dtype = dtype
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of a batch."""
        return logits_of(self.model(images.to(self.dtype))).float()


def tracing_example(images: Tensor) -> Tensor:
    """Return a batch to trace with: a batch of one would be taken for a constant."""
    return images[:1].repeat(2, *(1 for _ in images.shape[1:]))


def require_onnx() -> None:
    """Raise InputError if a package is not installed that writes or runs ONNX files."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"ONNX needs the package {name}, which cannot be imported ({error}); "
                "install it: pip install 'vbp-pruning[export]'"
            ) from error


def write_onnx(model: Portable, images: Tensor, path: Path) -> None:
    """Write an ONNX file with one input `images`, one output `logits` and a free batch dimension."""
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if size > _MOST_BYTES:
        raise InputError(
            f"an ONNX file holds weights of at most {_MOST_BYTES / 1e9:.0f} GB, got {size / 1e9:.1f} GB; "
            "export to pt2, or in float16"
        )
    program = torch.onnx.export(
        model,
        (tracing_example(images),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=False)


def quantize_onnx(source: Path, target: Path, calibration: Iterable[Tensor]) -> None:
    """Quantise matrix products and convolutions to int8 (QDQ; weights by channel, activations by tensor)."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    reader = _Reader(calibration)
    prepared = target.with_name(f"prepared-{target.name}")
    # The tools log on the root logger, and would add a handler if it had none.
    with _muted_root_logger():
        # Symbolic shape inference wants sympy's view of every node; plain ONNX inference finds what is needed.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
    prepared.unlink()
    _log.info("int8: calibrated with %d images", reader.images)


class _Reader:
    """Passes calibration images to onnxruntime, few at a time: it keeps every activation of a batch."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.images = 0
        self._parts: Iterator[Tensor] = (part for batch in batches for part in torch.split(batch, 8))

    def get_next(self) -> dict[str, Any] | None:
        part = next(self._parts, None)
        if part is None:
            return None
        self.images += len(part)
        return {"images": part.float().cpu().numpy()}


@contextlib.contextmanager
def _muted_root_logger() -> Iterator[None]:
    root, handler = logging.getLogger(), logging.NullHandler()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


class OnnxClassifier(nn.Module):
    """An ONNX file of `write_onnx`, run by onnxruntime on the CPU; 0 threads leave the choice to it."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of a batch."""
        (logits,) = self.session.run(None, {"images": images.float().cpu().numpy()})
        return torch.from_numpy(logits)


def write_program(model: Portable, images: Tensor, path: Path) -> None:
    """Write a `.pt2` file with a free batch dimension."""
    example = (tracing_example(images),)
    program = torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)


class ProgramClassifier(nn.Module):
    """A file of `write_program`, run by torch on the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            program = torch.export.load(path).module()
        except (RuntimeError, ValueError, KeyError, OSError, AssertionError) as error:
            raise InputError(
                f"{path} is damaged or no file of torch.export ({one_line(error)}); export it again"
            ) from error
        # Not as a submodule: a program refuses eval() and train(), for it has no mode.
        self.program = (program,)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of a batch."""
        logits: Tensor = self.program[0](images)
        return logits
