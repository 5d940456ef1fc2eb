"""Run a model in evaluation mode or frozen and leave it as it was; what a classifier returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vbp.errors import InputError


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and each back into its own mode afterwards.

    `model.train(mode)` would thaw a BatchNorm that its user keeps frozen in a training model.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient, and give each its own will back afterwards."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def logits_of(output: Any) -> Float[Tensor, "batch classes"]:
    """Return the logits of a model's output: the tensor itself, or a Hugging Face output's `logits`."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise InputError(
            f"a classifier must return a tensor or an output with .logits, got {type(output).__name__}; "
            "wrap the model"
        )
    return logits
