"""ExecuTorch programs of classifiers, for phones and boards: a `.pte` file for one image at a time, with XNNPACK."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vbp.deploy.file_formats import Portable, only_errors, require
from vbp.errors import InputError, one_line

# It warns, and torch logs, of what is its own affair.
_LOGGERS = ("torch.utils._pytree", "torch.utils.cpp_extension")


def require_executorch() -> None:
    """Raise InputError if ExecuTorch is not installed."""
    with warnings.catch_warnings(), only_errors(*_LOGGERS):
        warnings.simplefilter("ignore")
        require(("executorch.exir", "executorch.runtime"), "ExecuTorch", "executorch")


def write_executorch(model: Portable, images: Tensor, path: Path) -> None:
    """Write a program with one input and one output for a batch of one image: its memory is planned ahead."""
    with warnings.catch_warnings(), only_errors(*_LOGGERS):
        warnings.simplefilter("ignore")
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = torch.export.export(model, (images[:1],))
        try:
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        except Exception as error:  # its errors share no other class
            raise InputError(
                f"{type(model.model).__name__} cannot be written for ExecuTorch ({one_line(error)}); export it to "
                "onnx or pt2"
            ) from error
    path.write_bytes(lowered.buffer)


class ExecutorchClassifier(nn.Module):
    """A file of `write_executorch`, run by ExecuTorch on the CPU, image by image."""

    def __init__(self, path: Path) -> None:
        from executorch.runtime import Runtime

        super().__init__()
        try:
            # The program owns the memory of its method.
            self.program = Runtime.get().load_program(path)
            self.method = self.program.load_method("forward")
        except RuntimeError as error:
            raise InputError(
                f"{path} is damaged or no program of ExecuTorch ({one_line(error)}); export it again"
            ) from error

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of a batch."""
        # The output lies in memory that the next image takes.
        return torch.cat([self.method.execute([image[None].float().contiguous()])[0].clone() for image in images])
