"""What is not imported until it is needed; and Torch-Pruning has vbp's names whichever of the two comes first."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import vbp

HEAVY = {
    "PIL", "huggingface_hub", "jaxtyping", "matplotlib", "numpy", "safetensors", "scipy", "sklearn", "timm", "torch",
    "torch_pruning", "torchvision", "tqdm", "transformers",
}  # fmt: skip
WITHOUT_CODE = "try:\n    main()\nexcept SystemExit:\n    pass\n"


def imported(code: str, *words: str) -> set[str]:
    """Return the libraries that a fresh process has imported after some code."""
    told = "\nimport json, sys\nsys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code + told, *words], capture_output=True, text=True, check=True, timeout=120
    )
    return {name.partition(".")[0] for name in json.loads(result.stderr.splitlines()[-1])}


def command(*words: str) -> set[str]:
    """Return what `vbp` has imported when it has done what was typed."""
    return imported("from vbp.cli.main import main\n" + WITHOUT_CODE, *words)


def test_importing_vbp_imports_no_library() -> None:
    assert imported("import vbp; dir(vbp); vbp.RunConfig; vbp.InputError") & HEAVY == set()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        *([name, "--help"] for name in ("run", "sweep", "inspect", "latency", "export", "compare", "demo")),
        ["run", "--data_path", "data", "--keep_rate", "0.5"],
        ["run", "--data_path", "data", "--keep_ratio", "half"],
        ["inspect", "--bogus"],
        ["compare", "output/a"],
        ["prune"],
    ],
    ids=" ".join,
)
def test_help_and_a_wrong_flag_need_no_library(words: list[str]) -> None:
    assert command(*words) & HEAVY == set()


def test_a_public_name_is_what_its_room_has() -> None:
    from vbp.pruning.surgery import prune_

    assert vbp.prune_ is prune_
    assert {*vbp.__all__} <= {*dir(vbp)}
    for name in vbp.__all__:
        assert getattr(vbp, name).__module__.startswith("vbp."), name
    with pytest.raises(AttributeError, match="module 'vbp' has no attribute 'prune'"):
        vbp.prune  # noqa: B018


BEFORE, AFTER = "import torch_pruning as tp\nimport vbp\n", "import vbp\nimport torch_pruning as tp\n"
CHECK = """
assert tp.importance.VarianceImportance.__module__ == "vbp.torch_pruning.importance"
assert tp.pruner.VBPPruner.__module__ == "vbp.torch_pruning.pruner"
from torch_pruning.pruner import VBPPruner
assert not hasattr(tp.importance, "Variance")
"""


@pytest.mark.parametrize("imports", [BEFORE, AFTER])
def test_torch_pruning_has_the_names_whichever_is_imported_first(imports: str) -> None:
    assert "torch_pruning" in imported(imports + CHECK)


def test_names_that_torch_pruning_brings_itself_are_left_alone() -> None:
    # Its next version, as it were: the module is changed while it is imported.
    code = """
import warnings
import torch_pruning.pruner.importance as importance, sys
importance.VarianceImportance = type("VarianceImportance", (), {})
with warnings.catch_warnings(record=True) as caught:
    import vbp
assert "brings torch_pruning.pruner.importance.VarianceImportance itself" in str(caught[0].message), caught
import torch_pruning as tp
assert tp.importance.VarianceImportance.__module__ == "__main__"
assert not hasattr(tp.pruner, "VBPPruner")
"""
    assert "torch_pruning" in imported(code)
