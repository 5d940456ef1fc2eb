"""Export a classifier to a file that runs without vbp, and check the file on real images before it is kept.

ONNX by torch's current exporter (run by onnxruntime, or anything that reads ONNX) or `torch.export` (`.pt2`, loaded
by torch alone); both take any batch size.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.deploy.file_formats import (
    OnnxClassifier,
    Portable,
    ProgramClassifier,
    quantize_onnx,
    require_onnx,
    write_onnx,
    write_program,
)
from vbp.deploy.settings import ExportFormat, ExportPrecision
from vbp.errors import InputError, printable
from vbp.runtime.files import check_path, write_atomically
from vbp.runtime.log_file import log_lines
from vbp.runtime.tables import with_error
from vbp.statistics.batches import images_for
from vbp.training.evaluate import evaluate

_log = logging.getLogger(__name__)

# Greatest difference of two logits, as a share of the model's greatest logit.
TOLERANCES: dict[ExportPrecision, float] = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.1, "int8": 0.25}
_NO_CALIBRATION = "dtype int8 needs calibration images, got none; give prepared training images, 128 or more"


@dataclass(frozen=True)
class Parity:
    """Differences between a file and its model over a number of images.

    `max_abs_error` is the greatest difference of two logits, `relative_error` the same as a share of the model's
    greatest logit (by amount), `top1_agreement` the share of the images with the same class first, in [0, 1].
    """

    images: int
    max_abs_error: float
    relative_error: float
    top1_agreement: float

    def lines(self, tolerance: float) -> list[str]:
        """Return two lines for the terminal."""
        error = f"{self.max_abs_error:.3g}, or {self.relative_error:.2e} of the largest logit"
        return [
            f"  largest error of a logit  {error} (tolerance {tolerance:.2g})",
            f"  same class first          {self.top1_agreement:.1%}",
        ]


@dataclass(frozen=True)
class ExportReport:
    """A written file, its bytes, and its differences from the model in float32.

    `tolerance` is the greatest `parity.relative_error` that was allowed; `top1` the accuracy in percent of the model
    and of the file, over the `labelled` images if any were given.
    """

    file: Path
    to: ExportFormat
    dtype: ExportPrecision
    size: int
    parity: Parity
    tolerance: float
    top1: tuple[float, float] | None
    labelled: int = 0

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
        }

    def table(self) -> str:
        """Return the report as lines for the terminal."""
        lines = [
            f"{self.file}: {self.to}, {self.dtype}, {self.size / 2**20:.1f} MiB",
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
    calibration: Iterable[Any] | None = None,
    labelled: Iterable[Any] | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a file with one input `images` and one output of logits, both float32, for any batch size.

    The file is run again, by onnxruntime or as reloaded program on the CPU, over `images`. It is put in its place
    only if its logits agree with those of the model.

    Args:
        model: Dense or pruned, of any library; left as it was.
        images: At least two real images, prepared as the model wants them.
        output: Ends in `.onnx` or `.pt2`, as `to` says.
        to: `onnx` needs the extra `export`.
        dtype: Of weights and arithmetic; int8 for ONNX alone, bfloat16 for pt2 alone.
        calibration: Batches of prepared training images, as `pixels_of` takes them, that set the ranges of int8; 128
            images or more.
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
    _check_choice(to, dtype, calibration)
    _check_output(path, to, overwrite)
    if images.ndim != 4 or len(images) < 2:
        raise InputError(f"images must be two or more of one size, stacked, got shape {tuple(images.shape)}")
    assert allowed is not None
    reference = Portable(model, torch.float32)
    if calibration is not None:
        calibration = _not_empty(images_for(reference, calibration))
    images = images.detach().cpu().float()
    with tempfile.TemporaryDirectory(prefix="vbp-export-") as folder:
        draft = Path(folder) / f"model.{to}"
        _write(model, images, draft, to, dtype, calibration)
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
        with draft.open("rb") as content:
            write_atomically(path, lambda file: shutil.copyfileobj(content, file))
    report = ExportReport(path, to, dtype, path.stat().st_size, parity, allowed, top1, count)
    log_lines(_log, report.table())
    return report


def measure_parity(
    model: nn.Module, exported: nn.Module, images: Float[Tensor, "images channels height width"]
) -> Parity:
    """Run both over the images: the first one alone, the others in batches, to prove that any batch size works."""
    with torch.inference_mode():
        expected = torch.cat([model(batch) for batch in _batches(images)])
        actual = torch.cat([exported(batch) for batch in _batches(images)])
    return compare_logits(expected, actual)


def compare_logits(expected: Float[Tensor, "images classes"], actual: Float[Tensor, "images classes"]) -> Parity:
    """Compare the logits of a file with those of the model; a value that is not finite makes both errors NaN."""
    error = float((expected.double() - actual.double()).abs().max())
    scale = float(expected.double().abs().max())
    error = error if bool(actual.isfinite().all()) else float("nan")
    agreement = float((expected.argmax(1) == actual.argmax(1)).double().mean())
    # Logits that are all zero have no scale: any difference is then infinitely large.
    relative = error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))
    return Parity(len(expected), error, relative, agreement)


def open_exported(path: Path | str, *, threads: int = 0) -> nn.Module:
    """Open an exported file as a module on the CPU: float32 images to logits.

    Args:
        path: A file of `export_model`, known by its ending.
        threads: For ONNX: threads inside one operation; 0 leaves the choice to onnxruntime.

    Raises:
        InputError: The file is missing or has another ending, or onnxruntime is not installed.

    Example:
        >>> vbp.open_exported(exported)(images).shape
        torch.Size([8, 7])
    """
    file = Path(path)
    if not file.is_file() or file.suffix not in (".onnx", ".pt2"):
        raise InputError(f"an exported model must be an existing .onnx or .pt2 file, got {file}; check the path")
    if file.suffix == ".pt2":
        return ProgramClassifier(file)
    require_onnx()
    return OnnxClassifier(file, threads)


def _check_choice(to: str, dtype: str, calibration: object | None) -> None:
    for name, value, allowed in (("to", to, get_args(ExportFormat)), ("dtype", dtype, get_args(ExportPrecision))):
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if (to, dtype) == ("onnx", "bfloat16"):
        raise InputError(
            "dtype bfloat16 is for pt2 alone: onnxruntime has no bfloat16 matrix product on the CPU, so that an ONNX "
            "file could not be proven; use --to pt2, or float16"
        )
    if (to, dtype) == ("pt2", "int8"):
        raise InputError("dtype int8 is for onnx alone: only onnxruntime quantises here; use --to onnx")
    if dtype == "int8" and calibration is None:
        raise InputError(_NO_CALIBRATION)
    if dtype != "int8" and calibration is not None:
        raise InputError(f"calibration images are for dtype int8 alone, got them with {dtype}; leave them out")
    if to == "onnx":
        require_onnx()


def _not_empty(calibration: Iterator[Tensor]) -> Iterable[Tensor]:
    first = next(calibration, None)
    if first is None:
        raise InputError(_NO_CALIBRATION)
    return itertools.chain((first,), calibration)


def _check_output(path: Path, to: str, overwrite: bool) -> None:
    check_path(path, "output")
    if path.suffix != f".{to}":
        raise InputError(f"output must end in .{to}, got {path}; the ending tells others how to read it")
    if not path.parent.is_dir():
        raise InputError(f"output must lie in an existing folder, got {path}; create {path.parent}")
    if path.exists() and not overwrite:
        raise InputError(f"output must be a new file, got the existing {path}; choose another or pass --overwrite")


def _write(
    model: nn.Module,
    images: Tensor,
    path: Path,
    to: ExportFormat,
    dtype: ExportPrecision,
    calibration: Iterable[Tensor] | None,
) -> None:
    portable = Portable(model, torch.float32 if dtype == "int8" else getattr(torch, dtype))
    write: Callable[[Portable, Tensor, Path], None] = write_onnx if to == "onnx" else write_program
    try:
        with torch.no_grad():
            write(portable, images, path)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        # The exporters' own errors derive from these; what follows their first line is a listing of the graph.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{type(model).__name__} cannot be exported to {to} in {dtype}: {reason}; try the other format, or a "
            "model whose forward does not depend on the values of its input"
        ) from error
    if calibration is not None:
        floats = path.with_name("float32.onnx")
        path.replace(floats)
        quantize_onnx(floats, path, calibration)


def _remedy(dtype: str) -> str:
    if dtype == "float32":
        return "report this with the model's name, or give a tolerance"
    return "give more calibration images, or use float16" if dtype == "int8" else "use float32"


def _batches(images: Tensor) -> Iterator[Tensor]:
    yield images[:1]
    yield from torch.split(images[1:], 32)
