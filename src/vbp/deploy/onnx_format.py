"""ONNX files of classifiers: written by torch, quantised and run by onnxruntime."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.deploy.file_formats import Portable, only_errors, require, tracing_example
from vbp.errors import InputError, one_line

_log = logging.getLogger(__name__)

# A protobuf holds two GiB; the graph beside the weights takes little.
_MOST_BYTES = 2_000_000_000
# Earlier ones have no scale for each channel of an int8 weight.
LEAST_OPSET = 13


def require_onnx() -> None:
    """Raise InputError if a package is not installed that writes or runs ONNX files."""
    require(("onnx", "onnxscript", "onnxruntime"), "ONNX", "export")


def check_opset(opset: int) -> None:
    """Raise InputError for a number that is no opset of the installed onnx, or too early for int8."""
    import onnx

    latest = onnx.defs.onnx_opset_version()
    if not LEAST_OPSET <= opset <= latest:
        raise InputError(f"opset must be {LEAST_OPSET} to {latest}, got {opset}; leave it out to let torch choose")


def opset_of(path: Path) -> int:
    """Return the version of ONNX's operators that a file uses."""
    import onnx

    return next(int(entry.version) for entry in onnx.load(path).opset_import if entry.domain in ("", "ai.onnx"))


def write_onnx(model: Portable, images: Tensor, path: Path, opset: int | None = None) -> None:
    """Write an ONNX file with one input `images`, one output `logits` and a free batch dimension.

    Raises:
        InputError: The weights are too large, or the model has an operation that the opset cannot say.
    """
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if size > _MOST_BYTES:
        raise InputError(
            f"an ONNX file holds weights of at most {_MOST_BYTES / 1e9:.0f} GB, got {size / 1e9:.1f} GB; "
            "export to pt2, or in float16"
        )
    # torch converts what it wrote to the opset; where that fails, it logs so and leaves the file as it was.
    with only_errors("torch.onnx", "onnxscript"):
        program = torch.onnx.export(
            model,
            (tracing_example(images),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["logits"],
            opset_version=opset,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=False)
    if opset is not None and (written := opset_of(path)) != opset:
        raise InputError(
            f"opset must be one that can say every operation of the model, got {opset}, to which torch could not "
            f"convert its opset {written}; leave --opset out, or take one of 17 to 25"
        )


def quantize_onnx(source: Path, target: Path, calibration: Iterable[Tensor], *, reduce_range: bool) -> None:
    """Quantise matrix products and convolutions to int8 (QDQ; weights by channel, activations by tensor).

    With `reduce_range` weights take 7 of the 8 bits.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    reader = _Reader(calibration)
    prepared = target.with_name(f"prepared-{target.name}")
    # The tools log on the root logger, and would add a handler if it had none.
    with only_errors(""):
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
            reduce_range=reduce_range,
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


class OnnxClassifier(nn.Module):
    """An ONNX file of `write_onnx`, run by onnxruntime on the CPU; 0 threads leave the choice to it."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no other class
            raise InputError(
                f"{path} is damaged or no ONNX file that this onnxruntime runs ({one_line(error)}); export it again"
            ) from error

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of a batch."""
        (logits,) = self.session.run(None, {"images": images.float().cpu().numpy()})
        return torch.from_numpy(logits)
