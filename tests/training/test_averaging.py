"""The moving average of a model."""

from __future__ import annotations

import torch
from families import FAMILIES
from torch import nn

from vbp.training.optim import make_ema


def test_tables_of_whole_numbers_are_not_averaged() -> None:
    # 0.9999 * 11 + (1 - 0.9999) * 11 in float32, rounded down, is 10: the index would point at another place.
    model = FAMILIES["timm-swin"].build()
    tables = {name: buffer.clone() for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    assert tables
    average = make_ema(model, 0.9999)
    for _ in range(3):
        average.update_parameters(model)
    for name, table in tables.items():
        assert torch.equal(average.module.get_buffer(name), table), name
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_it_begins_at_the_weights_after_the_first_step() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    average = make_ema(model, 0.75)
    seen = []
    for value in (4.0, 8.0, 0.0):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        seen.append(float(average.module.weight))
    assert seen == [4.0, 5.0, 3.75]
