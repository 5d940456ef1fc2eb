"""A part of `benchmarks/family_coverage.py`: small members of families through all of its steps."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    for name in ("family_models", "family_coverage"):
        spec = importlib.util.spec_from_file_location(name, _FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look there
        spec.loader.exec_module(module)
    return module


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
    ((family, name),) = coverage.smallest("torchvision", ("squeezenet",))
    assert (family, name()) == ("squeezenet", "squeezenet1_1")
    assert coverage.in_process("timm", "vit", "test_vit", 0.01).steps == {"find": "error: not done in 0.01 s"}
