"""What is not imported until it is needed; and Torch-Pruning has vbp's names whichever of the two comes first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from families import FAMILIES
from pruned_models import pruned_in_place
from runs import write_run
from transformers import ViTImageProcessor

import vbp

HEAVY = {
    "PIL", "huggingface_hub", "jaxtyping", "matplotlib", "numpy", "safetensors", "scipy", "sklearn", "timm", "torch",
    "torch_pruning", "torchvision", "tqdm", "transformers",
}  # fmt: skip
COMMANDS = ("run", "finetune", "sweep", "inspect", "latency", "export", "eval", "predict", "compare", "demo")
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
        *([name, "--help"] for name in COMMANDS),
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
    with pytest.raises(AttributeError, match="module 'vbp' has no attribute 'shrink'"):
        vbp.shrink  # noqa: B018


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


def no_more_than(found: set[str], *allowed: str) -> None:
    """Check that of the libraries for models and images only these are there."""
    assert found & {"timm", "torch_pruning", "torchvision", "transformers"} == {*allowed}


def test_comparing_runs_needs_no_library_for_models(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, config={"model_name": "m", "keep_ratio": 0.5, "save_dir": "a"})
    no_more_than(command("compare", str(tmp_path / "a"), str(tmp_path / "b")))


def test_a_saved_model_of_timm_is_inspected_without_transformers(tmp_path: Path) -> None:
    # timm itself imports torchvision.
    classifier = vbp.load_classifier("test_vit", allow_random_init=True)
    no_more_than(command("inspect", saved(classifier, tmp_path / "artefact")), "timm", "torchvision")


def test_a_saved_model_of_transformers_is_inspected_without_timm(tmp_path: Path) -> None:
    # transformers itself imports torchvision.
    FAMILIES["hf-vit"].build().save_pretrained(tmp_path / "dense")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dense")
    classifier = vbp.load_classifier(str(tmp_path / "dense"))
    no_more_than(command("inspect", saved(classifier, tmp_path / "artefact")), "torchvision", "transformers")


def saved(classifier: vbp.Classifier, folder: Path) -> str:
    """Prune a classifier, save it, and return the folder."""
    plan = pruned_in_place(classifier.model, classifier.example_input())
    vbp.save_pruned(
        classifier.model, folder, plans=[plan], source=classifier.source, preprocessing=classifier.preprocessing
    )
    return str(folder)
