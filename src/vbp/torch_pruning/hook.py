"""Put the names where users of Torch-Pruning look for them; neither it nor torch is imported for that."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

warned = False  # whether the warning below was given


def install() -> None:
    """Make `tp.importance.VarianceImportance` and `tp.pruner.VBPPruner` ours, unless Torch-Pruning brings its own.

    Then both stay as they are, for they belong together, and one warning says so; ours are in `vbp.torch_pruning`.
    """
    import torch_pruning as tp

    from vbp.torch_pruning.importance import VarianceImportance
    from vbp.torch_pruning.pruner import VBPPruner

    if not _brings_its_own(tp):
        tp.importance.VarianceImportance, tp.pruner.VBPPruner = VarianceImportance, VBPPruner


def install_on_import() -> None:
    """Have Torch-Pruning know the two names from now on, or from its import on; they are imported when first used."""
    if "torch_pruning" in sys.modules:
        _attach(sys.modules["torch_pruning"])
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport:
    """Finds Torch-Pruning as it would be found anyway, and attaches the names when it has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch_pruning":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_attach(module: ModuleType) -> None:
                execute(module)
                _attach(module)

            spec.loader.exec_module = execute_and_attach  # type: ignore[method-assign]
        return spec


def _attach(tp: ModuleType) -> None:
    if not _brings_its_own(tp):
        for module, name in _places(tp):
            module.__getattr__ = partial(_first_use, tp, module, name)  # type: ignore[method-assign]


def _first_use(tp: ModuleType, module: ModuleType, ours: str, name: str) -> Any:
    if name == ours and not _brings_its_own(tp):
        install()
        return vars(module)[name]
    raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")


def _places(tp: ModuleType) -> tuple[tuple[ModuleType, str], tuple[ModuleType, str]]:
    return (tp.importance, "VarianceImportance"), (tp.pruner, "VBPPruner")


def _brings_its_own(tp: ModuleType) -> bool:
    global warned
    theirs = [
        f"{module.__name__}.{name}"
        for module, name in _places(tp)
        if name in vars(module) and not vars(module)[name].__module__.startswith("vbp.")
    ]
    if theirs and not warned:
        warned = True
        warnings.warn(
            f"Torch-Pruning {tp.__version__} brings {' and '.join(theirs)} itself; they are left alone, vbp's are "
            "vbp.torch_pruning.VarianceImportance and vbp.torch_pruning.VBPPruner",
            stacklevel=3,
        )
    return bool(theirs)
