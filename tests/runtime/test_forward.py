"""Hooks around a body: called in order, able to replace an output, and gone whatever the body does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vbp.runtime.forward import hooked


def test_hooks_see_inputs_and_replace_outputs_while_the_body_runs() -> None:
    layer, values = nn.Linear(3, 2), torch.randn(4, 3)
    seen: list[Any] = []
    expected = layer(values)
    with hooked(
        [(layer, lambda module, args, output: seen.append(output)), (layer, lambda module, args, output: 2 * output)],
        before=[(layer, lambda module, args, kwargs: seen.append(kwargs["input"]))],
    ):
        doubled = layer(input=values)
    assert seen[0] is values
    assert torch.equal(seen[1], expected)
    assert torch.equal(doubled, 2 * expected)
    assert torch.equal(layer(values), expected)
    assert len(seen) == 2


def test_no_hook_stays_behind_an_error() -> None:
    layer, calls = nn.Linear(3, 2), []
    with pytest.raises(RuntimeError, match="no luck"), hooked([(layer, lambda *args: calls.append(args))]):
        raise RuntimeError("no luck")
    layer(torch.zeros(3))
    assert calls == []
