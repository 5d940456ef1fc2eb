"""Export a classifier to a file that runs without vbp, and check the file on real images before it is kept.

ONNX by torch's current exporter (run by onnxruntime, or anything that reads ONNX), `torch.export` (`.pt2`, loaded by
torch alone), OpenVINO (a folder with two files) or ExecuTorch (`.pte`, for phones and boards).
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.deploy.executorch_format import ExecutorchClassifier, require_executorch, write_executorch
from vbp.deploy.file_formats import (
    Parity,
    Portable,
    ProgramClassifier,
    measure_parity,
    reduces_range,
    write_program,
)
from vbp.deploy.native_files import check_new_folder, write_folder
from vbp.deploy.onnx_format import OnnxClassifier, check_opset, opset_of, quantize_onnx, require_onnx, write_onnx
from vbp.deploy.openvino_format import OPENVINO_FILE, OpenVinoClassifier, require_openvino, write_openvino
from vbp.deploy.settings import ExportFormat, ExportPrecision
from vbp.errors import InputError, printable
from vbp.runtime.choices import Toggle
from vbp.runtime.files import check_path, write_atomically
from vbp.runtime.tables import with_error
from vbp.statistics.batches import images_for
from vbp.training.evaluate import evaluate

# Greatest difference of two logits, as a share of the model's greatest logit.
TOLERANCES: dict[ExportPrecision, float] = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.1, "int8": 0.25}
# In which precisions each format is written, and why not in the others.
DTYPES: Final[dict[ExportFormat, tuple[ExportPrecision, ...]]] = {
    "onnx": ("float32", "float16", "int8"),
    "pt2": ("float32", "float16", "bfloat16"),
    "openvino": ("float32", "float16", "int8"),
    "executorch": ("float32",),
}
_WHY_NOT: Final[dict[tuple[str, str], str]] = {
    (
        "onnx",
        "bfloat16",
    ): "onnxruntime has no bfloat16 matrix product on the CPU, so that a file could not be proven; "
    "use --to pt2, or float16",
    (
        "openvino",
        "bfloat16",
    ): "OpenVINO chooses bfloat16 when it runs a float32 file, where the processor has it; use float32",
}
_SUFFIXES: Final[dict[ExportFormat, str]] = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml", "executorch": ".pte"}
_NO_CALIBRATION = "dtype int8 needs calibration images, got none; give prepared training images, 128 or more"


@dataclass(frozen=True)
class ExportReport:
    """A written file, its bytes, and its differences from the model in float32.

    Attributes:
        file: What `open_exported` takes; for OpenVINO the `.xml` in the folder, and the bytes count the `.bin` too.
        to: The format.
        dtype: The precision.
        size: Bytes.
        parity: The differences.
        tolerance: The greatest `parity.relative_error` that was allowed.
        top1: Accuracy in percent of the model and of the file, if labelled images were given.
        labelled: How many these were.
        opset: Of ONNX's operators; None in other formats.
        reduced_range: For int8: whether weights take 7 of the 8 bits.
    """

    file: Path
    to: ExportFormat
    dtype: ExportPrecision
    size: int
    parity: Parity
    tolerance: float
    top1: tuple[float, float] | None
    labelled: int = 0
    opset: int | None = None
    reduced_range: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        top1 = None if self.top1 is None else {"model": self.top1[0], "file": self.top1[1]}
        written = {"file": str(self.file), "to": self.to, "dtype": self.dtype, "bytes": self.size}
        return {
            **written,
            **asdict(self.parity),
            "tolerance": self.tolerance,
            "top1": top1,
            "labelled": self.labelled,
            "opset": self.opset,
            "reduced_range": self.reduced_range,
        }

    def table(self) -> str:
        """Return the report as lines for the terminal."""
        what = [self.to, *([] if self.opset is None else [f"opset {self.opset}"]), self.dtype]
        what += ["weights in 7 bits"] if self.reduced_range else []
        lines = [
            f"{self.file}: {', '.join(what)}, {self.size / 2**20:.1f} MiB",
            f"  run on {self.parity.images} images against the PyTorch model in float32:",
            *self.parity.lines(self.tolerance),
        ]
        if self.top1 is not None:
            before, after = (with_error(top1, self.labelled) for top1 in self.top1)
            lines.append(f"  top-1                     {before} % -> {after} %")
        return "\n".join(map(printable, lines))


def export_model(
    model: nn.Module,
    images: Float[Tensor, "images channels height width"],
    output: Path | str,
    *,
    to: ExportFormat = "onnx",
    dtype: ExportPrecision = "float32",
    opset: int | None = None,
    calibration: Iterable[Any] | None = None,
    reduce_range: Toggle = "auto",
    labelled: Iterable[Any] | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a file with one input `images` and one output of logits, both float32.

    It takes any batch size; for ExecuTorch one image. It is run again on the CPU over `images`, by the runtime that
    it is for, and put in its place only if its logits agree with those of the model.

    Args:
        model: Dense or pruned, of any library; left as it was.
        images: At least two real images, prepared as the model wants them.
        output: Ends in `.onnx`, `.pt2` or `.pte` (ExecuTorch), as `to` says; for OpenVINO a new or empty folder.
        to: `onnx` needs the extra `export`, the last two need extras of their names.
        dtype: Of weights and arithmetic, one of `DTYPES[to]`; float16 for OpenVINO is that of the stored weights.
        opset: For ONNX: the version of its operators, in the place of the one that torch chooses.
        calibration: Batches of prepared training images, as `pixels_of` takes them, that set the ranges of int8; 128
            images or more.
        reduce_range: For int8: weights take 7 bits, for processors without VNNI, whose 8-bit products can saturate;
            `auto` looks at this processor.
        labelled: Batches of images and labels, gone through twice: for the accuracy of model and file.
        tolerance: Of the relative error of a logit, in the place of `TOLERANCES[dtype]`.
        overwrite: Whether an earlier file of that name may be replaced.

    Raises:
        InputError: The combination is not supported, the model cannot be exported, or the file's logits are too far
            from the model's; no file is left behind.
        OutputError: The file could not be written.

    Example:
        >>> vbp.export_model(pruned, images, folder / "pruned.pt2", to="pt2").tolerance
        0.0001
    """
    path, allowed = Path(output), TOLERANCES[dtype] if tolerance is None and dtype in TOLERANCES else tolerance
    check_export(path, to=to, dtype=dtype, opset=opset, reduce_range=reduce_range, overwrite=overwrite)
    if dtype == "int8" and calibration is None:
        raise InputError(_NO_CALIBRATION)
    if dtype != "int8" and calibration is not None:
        raise InputError(f"calibration images are for dtype int8 alone, got them with {dtype}; leave them out")
    if images.ndim != 4 or len(images) < 2:
        raise InputError(f"images must be two or more of one size, stacked, got shape {tuple(images.shape)}")
    assert allowed is not None
    reference = Portable(model, torch.float32)
    if calibration is not None:
        calibration = _not_empty(images_for(reference, calibration))
    images = images.detach().cpu().float()
    reduced = reduces_range(reduce_range) if dtype == "int8" else None
    with tempfile.TemporaryDirectory(prefix="vbp-export-") as folder:
        draft = Path(folder) / f"model{_SUFFIXES[to]}"
        _write(model, images, draft, to, dtype, opset, calibration, bool(reduced))
        exported = open_exported(draft)
        parity = measure_parity(reference, exported, images)
        if not parity.relative_error <= allowed:
            raise InputError(
                f"the exported {dtype} file must give the model's logits within {allowed:g} of the largest one, got "
                f"a difference of {parity.relative_error:.3g} (same class first on {parity.top1_agreement:.1%} of "
                f"{parity.images} images); nothing was written to {path}: {_remedy(dtype)}"
            )
        top1, count = None, 0
        if labelled is not None:
            before, after = (evaluate(one, labelled, "cpu") for one in (reference, exported))
            top1, count = (before.top1, after.top1), before.images
        written = opset_of(draft) if to == "onnx" else None
        size = sum(file.stat().st_size for file in draft.parent.iterdir())
        file = _put(draft, path, to)
    return ExportReport(file, to, dtype, size, parity, allowed, top1, count, written, reduced)


def _put(draft: Path, path: Path, to: ExportFormat) -> Path:
    """Copy what was written into its place, whole or not at all; return the file to open."""
    if to != "openvino":
        with draft.open("rb") as content:
            write_atomically(path, lambda file: shutil.copyfileobj(content, file))
        return path

    def copy_files(folder: Path) -> None:
        for file in draft.parent.iterdir():
            shutil.copyfile(file, folder / file.name)

    write_folder(path, copy_files)
    return path / OPENVINO_FILE


def open_exported(path: Path | str, *, threads: int = 0) -> nn.Module:
    """Open an exported file as a module on the CPU: float32 images to logits.

    Args:
        path: A file of `export_model`, known by its ending, or the folder of one for OpenVINO.
        threads: For ONNX and OpenVINO: threads inside one operation; 0 leaves the choice to the runtime.

    Raises:
        InputError: The file is missing, damaged or has another ending, or the package that runs it is not installed.

    Example:
        >>> vbp.open_exported(exported)(images).shape
        torch.Size([8, 7])
    """
    file = Path(path)
    if file.is_dir():
        file /= OPENVINO_FILE
    if not file.is_file() or file.suffix not in _SUFFIXES.values():
        raise InputError(
            f"an exported model must be an existing {', '.join(_SUFFIXES.values())} file, or a folder with "
            f"{OPENVINO_FILE}, got {path}; check the path"
        )
    if file.suffix == ".pt2":
        return ProgramClassifier(file)
    if file.suffix == ".pte":
        require_executorch()
        return ExecutorchClassifier(file)
    if file.suffix == ".xml":
        require_openvino()
        return OpenVinoClassifier(file, threads)
    require_onnx()
    return OnnxClassifier(file, threads)


def check_export(
    output: Path,
    *,
    to: ExportFormat,
    dtype: ExportPrecision,
    opset: int | None = None,
    reduce_range: Toggle = "auto",
    overwrite: bool = False,
) -> None:
    """Raise InputError for what `export_model` cannot write, or not to there, before any work."""
    choices = (("to", to, ExportFormat), ("dtype", dtype, ExportPrecision), ("reduce_range", reduce_range, Toggle))
    for name, value, kind in choices:
        if value not in get_args(kind):
            raise InputError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
    if dtype not in DTYPES[to]:
        others = ", ".join(each for each, able in DTYPES.items() if dtype in able)
        why = _WHY_NOT.get((to, dtype), f"use one of them, or --to {others}")
        raise InputError(f"dtype must be one of {', '.join(DTYPES[to])} for {to}, got {dtype}: {why}")
    if reduce_range != "auto" and dtype != "int8":
        raise InputError(f"reduce_range is for dtype int8, got {reduce_range} with {dtype}; leave it out")
    if opset is not None and to != "onnx":
        raise InputError(f"opset is for onnx, got {opset} with {to}; leave it out")
    if to == "onnx":
        require_onnx()
    if to == "openvino":
        require_openvino(nncf=dtype == "int8")
    if to == "executorch":
        require_executorch()
    if opset is not None:
        check_opset(opset)
    _check_output(output, to, overwrite)


def _not_empty(calibration: Iterator[Tensor]) -> Iterable[Tensor]:
    first = next(calibration, None)
    if first is None:
        raise InputError(_NO_CALIBRATION)
    return itertools.chain((first,), calibration)


def _check_output(path: Path, to: ExportFormat, overwrite: bool) -> None:
    check_path(path, "output")
    if to == "openvino":
        if path.suffix in (*_SUFFIXES.values(), ".bin"):
            raise InputError(
                f"output must be a folder for openvino, got {path}; give one without {path.suffix}: "
                f"{OPENVINO_FILE} and its .bin are written into it"
            )
        if overwrite:
            raise InputError("overwrite replaces a file, and openvino writes a new folder; leave it out")
        check_new_folder(path, "an OpenVINO model")
    elif path.suffix != _SUFFIXES[to]:
        raise InputError(f"output must end in {_SUFFIXES[to]}, got {path}; the ending tells others how to read it")
    elif path.exists() and not overwrite:
        raise InputError(f"output must be a new file, got the existing {path}; choose another or pass --overwrite")
    if not path.parent.is_dir():
        raise InputError(f"output must lie in an existing folder, got {path}; create {path.parent}")


def _write(
    model: nn.Module,
    images: Tensor,
    path: Path,
    to: ExportFormat,
    dtype: ExportPrecision,
    opset: int | None,
    calibration: Iterable[Tensor] | None,
    reduce_range: bool,
) -> None:
    half = dtype == "float16"
    # OpenVINO rounds to float16 what it writes, and NNCF and onnxruntime quantise a float32 file.
    portable = Portable(model, torch.float32 if dtype == "int8" or to == "openvino" else getattr(torch, dtype))
    try:
        with torch.no_grad():
            if to == "pt2":
                write_program(portable, images, path)
            elif to == "openvino":
                write_openvino(portable, images, path, half=half, calibration=calibration, reduce_range=reduce_range)
            elif to == "executorch":
                write_executorch(portable, images, path)
            else:
                write_onnx(portable, images, path, opset)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        # The exporters' own errors derive from these; what follows their first line is a listing of the graph.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{type(model).__name__} cannot be exported to {to} in {dtype}: {reason}; try another format, or a "
            "model whose forward does not depend on the values of its input"
        ) from error
    if to == "onnx" and calibration is not None:
        floats = path.with_name("float32.onnx")
        path.replace(floats)
        quantize_onnx(floats, path, calibration, reduce_range=reduce_range)
        floats.unlink()


def _remedy(dtype: str) -> str:
    if dtype == "float32":
        return "report this with the model's name, or give a tolerance"
    return "give more calibration images, or use float16" if dtype == "int8" else "use float32"
