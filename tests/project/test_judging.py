"""What benchmarks judge models by."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

_PATH = Path(__file__).parents[2] / "benchmarks" / "judging.py"


@pytest.fixture(scope="module")
def judging() -> ModuleType:
    spec = importlib.util.spec_from_file_location("judging", _PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["judging"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


class _Pick(nn.Module):
    """Answers with the pixels of the first row times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.factor * pixels[:, 0, 0]


def test_places_are_the_middle_and_the_eight_shifts_around_it(judging: ModuleType) -> None:
    pixels = torch.arange(36.0).view(1, 1, 6, 6)
    found = list(judging.places(pixels, 2))
    assert [int(one[0, 0, 0, 0]) for one in found] == [14, 0, 2, 4, 12, 16, 24, 26, 28]
    assert {one.shape for one in found} == {(1, 1, 2, 2)}
    assert [one.tolist() for one in judging.places(pixels, 0)] == [pixels.tolist()]


def test_a_judge_counts_each_place_but_compares_by_image(judging: ModuleType) -> None:
    torch.manual_seed(0)
    pixels, labels = torch.randn(40, 1, 5, 5), torch.randint(3, (40,))
    judge = judging.Judge(_Pick(1.0), [(pixels[:25], labels[:25]), (pixels[25:], labels[25:])], shift=1)
    same, turned = judge(_Pick(1.0)), judge(_Pick(-1.0))
    assert same.right.shape == (40, 9)
    assert (same.relative, same.agreement, same.divergence) == (1.0, 1.0, 0.0)
    assert turned.agreement == 0.0  # the largest of three has become the smallest
    assert turned.divergence > 0

    difference, error = judge.difference(turned, same)
    assert difference == pytest.approx(turned.relative - 1)
    by_image = (turned.right.double() - same.right.double()).mean(1) / judge.accuracy
    assert error == pytest.approx(float(by_image.std()) / 40**0.5)
    assert judge.difference(same, same) == (0.0, 0.0)
