"""The step of the channel counts follows from the device, and from how narrow the sites are."""

from __future__ import annotations

import pytest
import torch

from vbp import Site
from vbp.cost.widths import recommended_round_to


@pytest.mark.parametrize(
    ("device", "dtype", "step"),
    [
        ("cpu", torch.float32, 8),
        ("cpu", torch.bfloat16, 8),
        ("cuda", torch.float32, 32),
        ("cuda", torch.bfloat16, 64),
        ("cuda", torch.float16, 64),
    ],
)
def test_the_device_decides(device: str, dtype: torch.dtype, step: int) -> None:
    assert recommended_round_to(torch.device(device), dtype) == step
    assert recommended_round_to(torch.device(device), dtype, [Site(("a",), "b", 768)]) == step


def test_a_site_keeps_eight_widths_to_choose_from() -> None:
    wide, narrow = Site(("a",), "b", 3072), Site(("c",), "d", 384)
    heads = Site(("e",), "f", 192, "value", heads=3)
    gpu = torch.device("cuda")
    assert recommended_round_to(gpu, torch.bfloat16, [wide, narrow]) == 32
    assert recommended_round_to(gpu, torch.bfloat16, [wide, heads]) == 8
    assert recommended_round_to(torch.device("cpu"), torch.float32, [Site(("a",), "b", 4)]) == 1
