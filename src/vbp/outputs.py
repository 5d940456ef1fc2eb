"""What a classifier returns."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from vbp.errors import InputError


def logits_of(output: Any) -> Float[Tensor, "batch classes"]:
    """Give the logits of a model's output: the tensor itself, or a Hugging Face output's `logits`."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise InputError(
            f"a classifier must return a tensor or an output with .logits, got {type(output).__name__}; "
            "wrap the model"
        )
    return logits
