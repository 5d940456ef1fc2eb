"""A part of `benchmarks/family_coverage.py`: small members of families through all of its steps."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def coverage() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(
            str(Path(__file__).parents[2] / "benchmarks")
        )  # the processes of the models look there, too
        yield importlib.import_module("family_coverage")


@pytest.mark.parametrize(
    ("library", "name"),
    [("timm", "test_efficientnet"), ("timm", "test_byobnet"), ("timm", "test_vit"), ("torchvision", "squeezenet1_1")],
)
def test_a_model_works_in_every_step(coverage: ModuleType, library: str, name: str) -> None:
    result = coverage.check(library, name)
    assert result.steps == dict.fromkeys(coverage.STEPS, "ok")
    text = coverage.table([result])
    assert f"| `{name}` |" in text
    assert "1 models: 1 work, 0 are refused, 0 err." in text


def test_what_does_not_run_is_an_error_and_the_smallest_model_is_taken(coverage: ModuleType) -> None:
    assert coverage.check("timm", "no_such_model").verdict == "error"
    assert coverage.smallest("torchvision", "squeezenet") == "squeezenet1_1"


def test_a_model_has_a_process_and_a_limit_of_its_own(coverage: ModuleType) -> None:
    assert coverage.in_process("torchvision", "squeezenet", 0.01).steps == {"find": "error: not done in 0.01 s"}
    assert coverage.in_process("torchvision", "no_family", 60).steps == {"find": "error: the process ended with 1"}
    result = coverage.in_process("torchvision", "squeezenet", 60)
    assert (result.family, result.name, result.verdict) == ("squeezenet", "squeezenet1_1", "works")
