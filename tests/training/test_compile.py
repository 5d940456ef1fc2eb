"""A compiler that fails gives one line, and no traceback of the compiler's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vbp import InputError
from vbp.training.compile import Compiled


def test_a_compiler_that_fails_is_named_and_its_word_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def back_end(graph: Any, inputs: list[Tensor]) -> Any:
        raise FileNotFoundError("no C++ compiler\nand more lines")

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compiled(module, backend=back_end))
    model = Compiled(nn.Linear(2, 2))
    with pytest.raises(
        InputError, match=r"torch.compile can compile here, got FileNotFoundError: no C\+\+ compiler; leave --compile"
    ):
        model(torch.zeros(1, 2))


def test_parameters_and_mode_are_those_of_the_module() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model = Compiled(module)
    assert list(model.parameters()) == list(module.parameters())
    model.eval()
    assert not module[1].training
