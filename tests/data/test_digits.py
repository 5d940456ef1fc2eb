"""The demo's data and weights: complete, disjoint, the same each time, and what the model was trained for."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits

from vbp.data import digits
from vbp.data.data_path import list_images
from vbp.data.loader import make_loader
from vbp.data.preprocessing import evaluation_transform
from vbp.errors import InputError, OutputError
from vbp.models.load import load_classifier
from vbp.training.evaluate import evaluate

SCRIPT = Path(__file__).parents[2] / "examples" / "train_digits_vit.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "new" / "digits"
    digits.write_digits(folder)
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def _times(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.png")}


def test_the_splits_are_complete_disjoint_and_stratified(folder: Path) -> None:
    source = load_digits()
    assert len(source.images) == 1797
    written = [path.split("/") for path in _contents(folder)]
    # Each image once in all, under its own digit.
    assert sorted(int(name.removesuffix(".png")) for _, _, name in written) == list(range(1797))
    assert all(int(digit) == source.target[int(name.removesuffix(".png"))] for _, digit, name in written)
    counts = Counter((split, digit) for split, digit, _ in written)
    assert len(counts) == 20
    assert all(0 <= counts["train", str(digit)] - counts["val", str(digit)] <= 1 for digit in range(10))


def test_the_pixels_are_those_of_scikit_learn(folder: Path) -> None:
    source = load_digits().images
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (8, 8))
            pixels = np.asarray(image).astype(float)
        np.testing.assert_allclose(pixels / 255 * 16, source[int(path.stem)], atol=8 / 255)


def test_two_writings_agree(folder: Path, tmp_path: Path) -> None:
    digits.write_digits(tmp_path)
    assert _contents(tmp_path) == _contents(folder)


def test_a_complete_folder_is_left_alone(folder: Path) -> None:
    before = _times(folder)
    list_images(folder, "train", 10)  # keeps its list in the folder
    digits.write_digits(folder)
    assert _times(folder) == before


def test_a_partial_folder_is_completed(folder: Path, tmp_path: Path) -> None:
    digits.write_digits(tmp_path)
    before = _times(tmp_path)
    missing, *others = sorted(tmp_path.rglob("*.png"))
    missing.unlink()
    others[0].write_bytes(others[0].read_bytes()[:50])  # cut short
    (others[1].parent / ".leftover.part").write_bytes(b"")
    digits.write_digits(tmp_path)
    assert _contents(tmp_path) == _contents(folder)
    after = _times(tmp_path)
    touched = {path for path in after if after[path] != before[path]}
    assert touched == {path.relative_to(tmp_path).as_posix() for path in (missing, others[0])}
    assert not list(tmp_path.glob(".digits.*"))


@pytest.mark.parametrize("stranger", ["train/n01440764/cat.JPEG", "val/3/more.png", "train/3/0000.png"])
def test_other_data_is_refused(tmp_path: Path, stranger: str) -> None:
    path = tmp_path / stranger
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="hold nothing but them"):
        digits.write_digits(tmp_path)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="choose another folder"):
        digits.write_digits(tmp_path / "file" / "digits")


def test_the_weights_load_strictly_and_classify(folder: Path) -> None:
    assert digits.WEIGHTS.stat().st_size < 2_000_000
    settings = digits.PREPROCESSING
    # Missing, additional or misshapen tensors are errors of load_classifier.
    classifier = load_classifier(
        digits.MODEL_NAME,
        model_type="vit",
        checkpoint=digits.WEIGHTS,
        model_kwargs=digits.MODEL_KWARGS,
        crop_pct=settings.crop_pct,
        interpolation=settings.interpolation,
        mean=settings.mean,
        std=settings.std,
    )
    assert classifier.preprocessing == settings
    images = list_images(folder, "val", classifier.num_classes)
    loader = make_loader(images, evaluation_transform(settings), batch_size=128, num_workers=0)
    accuracy = evaluate(classifier.model, loader, "cpu")
    assert accuracy.images == 896
    # Measured: 98.4 %, standard error 0.4.
    assert accuracy.top1 > 97


def _training(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as opened:
        training: dict[str, Any] = json.loads(opened.metadata()["training"])
    return training


def test_the_weights_say_how_they_came_about() -> None:
    training = _training(digits.WEIGHTS)
    assert (training["model"], training["model_kwargs"]) == (digits.MODEL_NAME, dict(digits.MODEL_KWARGS))
    assert training["preprocessing"] == digits.PREPROCESSING.to_dict()
    assert training["command"].startswith("python examples/train_digits_vit.py --epochs")
    assert training["val"]["images"] == 896
    assert set(training["versions"]) == {"python", "torch", "timm", "sklearn"}


def test_the_training_script_writes_weights_that_load(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "weights.safetensors"
    arguments = ["--data_path", str(folder), "--output", str(output), "--epochs", "1", "--warmup_epochs", "1"]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert str(output) in capsys.readouterr().out
    classifier = load_classifier(digits.MODEL_NAME, checkpoint=output, model_kwargs=digits.MODEL_KWARGS)
    assert classifier.num_classes == 10
    assert "--epochs 1 " in _training(output)["command"]
