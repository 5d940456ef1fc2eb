"""The example scripts and the notebook run as they are, without network, and do what they say."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vbp

EXAMPLES = Path(__file__).parents[2] / "examples"
# The defaults are what a reader gets in seconds; tests take fewer epochs and images where that shows the same.
ARGUMENTS = {
    "prune_timm_model": "--model_name vit_tiny_patch16_224 --images 2 --keep_ratio 0.5",
    "prune_your_own_model": "",
    "fine_tune": "--epochs 1 --data_path DIGITS",
    "prune_without_training": "--keep_ratios 0.5 --data_path DIGITS",
}


@pytest.fixture
def lines(
    request: pytest.FixtureRequest,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> list[str]:
    """Run an example in an empty folder, and return the lines that it prints."""
    script = EXAMPLES / f"{request.param}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *ARGUMENTS[request.param].replace("DIGITS", str(digits)).split()])
    runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def example(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("lines", [name], indirect=True)


def accuracies(lines: list[str]) -> list[float]:
    return [float(value) for line in lines for value in re.findall(r"([\d.]+) %", line)]


def test_every_example_is_tested() -> None:
    # train_digits_vit has its test in tests/data/test_digits.py, beside those of the weights that it writes.
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*ARGUMENTS, "train_digits_vit"}


@example("prune_timm_model")
def test_any_timm_model(lines: list[str]) -> None:
    artifact = vbp.read_artifact("output/pruned_timm_model")
    (plan,) = artifact.plans
    assert any(line.split() == ["all", str(plan.kept), "of", "9216", "50.0%"] for line in lines)
    assert abs(plan.kept - 4608) < 8
    assert artifact.source is not None
    assert artifact.source.name == "vit_tiny_patch16_224"


@example("prune_your_own_model")
def test_a_network_of_your_own(lines: list[str]) -> None:
    dense, pruned, tuned = accuracies(lines)
    assert dense > 95
    assert pruned < tuned
    assert tuned > dense - 3
    assert vbp.read_artifact("output/pruned_own_model").plans[0].kept == round(0.4 * 3 * 256)


@example("fine_tune")
def test_fine_tuning(lines: list[str]) -> None:
    dense, pruned, tuned = accuracies(lines)
    assert pruned < tuned < dense
    assert vbp.read_artifact("output/fine_tuned").metrics == {"top1": tuned}


@example("prune_without_training")
def test_no_training_at_all(lines: list[str]) -> None:
    dense, shifted, refitted = accuracies(lines)
    assert shifted + 5 < refitted < dense


def printed(cells: list[dict[str, Any]]) -> tuple[str, int]:
    """Return what cells of a notebook print, all but warnings, and the number of their pictures."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    lines = ["".join(output["text"]) for output in outputs if output.get("name") == "stdout"]
    return "".join(lines), sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebook_runs_and_is_stored_with_its_outputs(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing of the user's own set-up counts, and nothing is written there.
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "tutorial.ipynb", as_version=4)
    work = tmp_path / "work"
    (work / "output").mkdir(parents=True)
    (work / "output/digits").symlink_to(digits)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    ).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    complaints = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    # tqdm would rather draw its bars with ipywidgets; the notebook draws none.
    assert [text for text in complaints if "IProgress not found" not in text] == []
    stored = json.loads((EXAMPLES / "tutorial.ipynb").read_text())["cells"]
    (text, pictures), (stored_text, stored_pictures) = printed(notebook.cells), printed(stored)
    assert pictures == stored_pictures >= 2
    # Run benchmarks/notebook_outputs.py where the notebook or what it prints has changed; digits may differ.
    assert re.sub(r"[\d.\s]+", " ", text) == re.sub(r"[\d.\s]+", " ", stored_text)
    accuracies, stored_accuracies = (
        [float(value) for value in re.findall(r"([\d.]+) % top-1", of)] for of in (text, stored_text)
    )
    dense, shifted, refitted = accuracies
    assert shifted < refitted < dense
    assert accuracies == pytest.approx(stored_accuracies, abs=0.5)
