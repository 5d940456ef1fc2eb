"""Files of torch.export: float32 images in, float32 logits out; loaded by torch alone."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.runtime.forward import logits_of


class Portable(nn.Module):
    """A classifier whose file is used alike for every model and precision.

    Args:
        model: Copied, in evaluation mode on the CPU; left as it was.
        dtype: Of the weights and of all that is computed.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().to(dtype)
        self.dtype = dtype
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of a batch."""
        return logits_of(self.model(images.to(self.dtype))).float()


def tracing_example(images: Tensor) -> Tensor:
    """Return a batch to trace with: a batch of one would be taken for a constant."""
    return images[:1].repeat(2, *(1 for _ in images.shape[1:]))


def write_program(model: Portable, images: Tensor, path: Path) -> None:
    """Write a `.pt2` file with a free batch dimension."""
    example = (tracing_example(images),)
    program = torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)


class ProgramClassifier(nn.Module):
    """A file of `write_program`, run by torch on the CPU.

    Raises:
        InputError: The file is damaged or something else.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            program = torch.export.load(path).module()
        except (RuntimeError, ValueError, KeyError, OSError, AssertionError) as error:
            raise InputError(f"{path} is damaged or no file of torch.export ({error}); export it again") from error
        # Not as a submodule: a program refuses eval() and train(), for it has no mode.
        self.program = (program,)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of a batch."""
        logits: Tensor = self.program[0](images)
        return logits
