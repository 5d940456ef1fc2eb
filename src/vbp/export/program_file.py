"""Files of torch.export: a traced program with its weights, loaded by torch alone."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError
from vbp.export.portable import Portable, tracing_example


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
        """Give the logits of a batch."""
        logits: Tensor = self.program[0](images)
        return logits
