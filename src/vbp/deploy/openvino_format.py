"""OpenVINO files of classifiers: a pair of `model.xml` and `model.bin`, quantised by NNCF, run on the CPU."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.deploy.file_formats import Portable, only_errors, require, tracing_example
from vbp.errors import InputError, one_line

_log = logging.getLogger(__name__)

OPENVINO_FILE: Final = "model.xml"
# Of the layers that are not int8. Left alone, the runtime takes bfloat16 where the processor has it.
Arithmetic = Literal["float32", "bfloat16"]
_HINTS: Final[dict[Arithmetic, str]] = {"float32": "f32", "bfloat16": "bf16"}
_TELEMETRY: Final = "openvino_telemetry"


def require_openvino(*, nncf: bool = False) -> None:
    """Raise InputError if OpenVINO is not installed, or NNCF where it is needed.

    Both report every conversion to a server of their makers unless a package for that is missing. It is hidden from
    them while they are imported, so that nothing is sent.
    """
    hidden = _TELEMETRY not in sys.modules
    if hidden:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        with only_errors("torch.utils.cpp_extension", "nncf"):
            require(("openvino", "openvino.tools.ovc", *(("nncf",) if nncf else ())), "OpenVINO", "openvino")
    finally:
        if hidden:
            del sys.modules[_TELEMETRY]


def write_openvino(
    model: Portable,
    images: Tensor,
    path: Path,
    *,
    half: bool = False,
    calibration: Iterable[Tensor] | None = None,
    reduce_range: bool = False,
) -> None:
    """Write a pair of files with one input `images`, one output `logits` and a free batch dimension.

    Args:
        model: In float32.
        images: Real images of the size that the file takes.
        path: Ends in `.xml`; the weights go beside it, into `.bin`.
        half: Whether weights are stored in float16.
        calibration: Images that set the ranges of int8; without them nothing is quantised.
        reduce_range: Whether int8 weights take 7 of the 8 bits.

    Raises:
        InputError: OpenVINO has no form of an operation, or NNCF cannot quantise the model.
    """
    import openvino

    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (tracing_example(images),), dynamic_shapes=({0: batch},))
    try:
        with only_errors("torch.utils.cpp_extension"):  # it looks for CUDA, and says so where there is none
            graph = openvino.convert_model(program)
        graph.inputs[0].get_tensor().set_names({"images"})
        graph.outputs[0].get_tensor().set_names({"logits"})
        graph.reshape({"images": [-1, *images.shape[1:]]})
        if calibration is not None:
            graph = _quantized(graph, [image[None] for part in calibration for image in part], reduce_range)
    except Exception as error:  # the errors of OpenVINO and NNCF share no other class
        raise InputError(
            f"{type(model.model).__name__} cannot be written for OpenVINO: {_reason(error)}; export it to onnx or pt2"
        ) from error
    openvino.save_model(graph, path, compress_to_fp16=half)


def _quantized(graph: Any, images: Sequence[Tensor], reduce_range: bool) -> Any:
    """Return the graph with int8 matrix products and convolutions."""
    import nncf

    types = {operation.get_type_name() for operation in graph.get_ops()}
    attention = bool(types & {"ScaledDotProductAttention", "Softmax"})
    overflow = nncf.OverflowFix.ENABLE if reduce_range else nncf.OverflowFix.DISABLE
    with _progress_to_terminal(), only_errors("nncf"):
        quantized = nncf.quantize(
            graph,
            nncf.Dataset([image.float().cpu().numpy() for image in images]),
            subset_size=len(images),
            # Moves the scale of large activations into weights, and leaves the sums of attention in float32.
            model_type=nncf.ModelType.TRANSFORMER if attention else None,
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow),
        )
    _log.info("int8: calibrated with %d images", len(images))
    return quantized


@contextlib.contextmanager
def _progress_to_terminal() -> Iterator[None]:
    """Keep NNCF's progress bars off the standard output: show them on a terminal, or not at all."""
    with contextlib.redirect_stdout(sys.stderr if sys.stderr.isatty() else io.StringIO()):
        yield


def _reason(error: Exception) -> str:
    """Return the line of an error that names the operations; else its first one."""
    missing = re.search(r"No conversion rule found for operations: .+", str(error))
    return missing[0] if missing else one_line(error)


def arithmetic_of_processor() -> tuple[Arithmetic, ...]:
    """Return in which precisions OpenVINO can compute on this CPU."""
    require_openvino()
    able = importlib.import_module("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("float32", "bfloat16") if "BF16" in able else ("float32",)


class OpenVinoClassifier(nn.Module):
    """Files of `write_openvino`, run by OpenVINO on the CPU; 0 threads leave the choice to it."""

    def __init__(self, path: Path, threads: int = 0, arithmetic: Arithmetic = "float32") -> None:
        import openvino

        super().__init__()
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _HINTS[arithmetic]}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            self.compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            raise InputError(
                f"{path} or its .bin is damaged or no model of OpenVINO ({one_line(error)}); export it again"
            ) from error

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of a batch."""
        return torch.from_numpy(self.compiled(images.float().cpu().numpy())[0])
