"""What all formats of exported files share, and the format of torch.export.

A portable copy of the model goes into every writer, each file is opened as a module, and the logits of both are
compared.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError, one_line
from vbp.runtime.choices import Toggle
from vbp.runtime.forward import copy_model, logits_of


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


def require(packages: Sequence[str], what: str, extra: str) -> None:
    """Raise InputError if a package is not installed that writes or runs such files."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"{what} needs the package {name}, which cannot be imported ({one_line(error)}); "
                f"install it: pip install 'vbp-pruning[{extra}]'"
            ) from error


@contextlib.contextmanager
def only_errors(*names: str) -> Iterator[None]:
    """Let these loggers show errors alone; the root logger, whose name is empty, gets no handler by the way."""
    loggers, handler = [logging.getLogger(name) for name in names], logging.NullHandler()
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            logger.removeHandler(handler)


def reduces_range(choice: Toggle) -> bool:
    """Return whether int8 weights take 7 bits: `auto` means on a processor whose 8-bit products can saturate.

    Those are x86 processors without VNNI: they add two products of 8 bits each into 16 bits.

    Raises:
        InputError: It is `auto`, and this version of torch does not say what the processor can do.
    """
    if choice != "auto":
        return choice == "on"
    if not hasattr(torch.cpu, "get_capabilities"):
        raise InputError(
            "reduce_range auto needs a later torch, which can tell whether the processor has VNNI, got "
            f"{torch.__version__}; give on (no VNNI) or off"
        )
    able = torch.cpu.get_capabilities()
    return able.get("architecture") == "x86_64" and not (able.get("avx512_vnni") or able.get("avx_vnni"))


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


def _batches(images: Tensor) -> Iterator[Tensor]:
    yield images[:1]
    yield from torch.split(images[1:], 32)
