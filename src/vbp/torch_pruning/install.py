"""Put the names where users of Torch-Pruning look for them."""

from __future__ import annotations

import warnings

import torch_pruning as tp

from vbp.torch_pruning.importance import VarianceImportance
from vbp.torch_pruning.pruner import VBPPruner

_warned = False


def install() -> None:
    """Make `tp.importance.VarianceImportance` and `tp.pruner.VBPPruner` ours, unless Torch-Pruning brings its own.

    Then both stay as they are, for they belong together, and one warning says so; ours are at `vbp.torch_pruning`.
    """
    global _warned
    ours = ((tp.importance, VarianceImportance), (tp.pruner, VBPPruner))
    theirs = [f"{module.__name__}.{kind.__name__}" for module, kind in ours if _taken(module, kind)]
    if not theirs:
        for module, kind in ours:
            setattr(module, kind.__name__, kind)
    elif not _warned:
        _warned = True
        warnings.warn(
            f"Torch-Pruning {tp.__version__} brings {' and '.join(theirs)} itself; they are left alone, "
            "vbp's are vbp.torch_pruning.VarianceImportance and vbp.torch_pruning.VBPPruner",
            stacklevel=2,
        )


def _taken(module: object, kind: type) -> bool:
    return getattr(module, kind.__name__, kind) is not kind
