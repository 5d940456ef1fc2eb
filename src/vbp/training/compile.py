"""Call a model through torch.compile; where that does not work, one line tells why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vbp.errors import InputError, first_line


class Compiled(nn.Module):
    """Call a module through torch.compile; parameters, buffers and mode are those of the module itself.

    It is compiled when it is first called, and again for its other mode and for a batch of another size.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        # Past nn.Module, which would list all parameters a second time.
        self._compiled: Callable[[Any], Any]
        object.__setattr__(self, "_compiled", torch.compile(module))

    def forward(self, pixels: Any) -> Any:
        """Return the output of the module."""
        with compile_errors():
            return self._compiled(pixels)


@contextmanager
def compile_errors() -> Iterator[None]:
    """Turn an error of the compiler into one that names the remedy."""
    from torch._dynamo.exc import TorchDynamoException  # loading the compiler takes seconds

    try:
        yield
    except TorchDynamoException as error:
        # The cause says what is wrong; what is wrapped around it says where in the compiler.
        cause = getattr(error, "inner_exception", None) or error
        raise InputError(
            "compile needs a model that torch.compile can compile here, got "
            f"{type(cause).__name__}: {first_line(cause)}; "
            "leave --compile out, or install what it lacks (a C++ compiler, on a GPU Triton)"
        ) from error
