"""`vbp export --to native`: a checkpoint that its own library has loaded, or one error and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, randomise_
from pruned_models import logits, pruned_in_place

from vbp import InputError, ModelSource, Preprocessing, load_pruned, save_pruned
from vbp.cli.export import ExportConfig, run_export
from vbp.deploy.export import Parity
from vbp.deploy.native import NativeReport
from vbp.recipes.demo import load_demo

PREPROCESSING = Preprocessing((32, 32), 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo's model pruned to equal and to unequal widths, its data, and a transformers model."""
    folder = tmp_path_factory.mktemp("artefacts")
    for name, scope in (("equal", "equal"), ("unequal", "global")):
        classifier, train, _ = load_demo(folder / "data")
        plan = pruned_in_place(classifier.model, next(iter(train))[0], 0.601, scope=scope)
        save_pruned(
            classifier.model, folder / name, plans=plan, source=classifier.source,
            preprocessing=classifier.preprocessing, class_names=[f"digit {number}" for number in range(10)],
        )  # fmt: skip
    model = randomise_(FAMILIES["hf-vit"].build()).eval()
    plan = pruned_in_place(model, FAMILIES["hf-vit"].example(4, torch.float32), 0.65, scope="equal")
    source = ModelSource("transformers", type(model).__name__, model.config.to_dict())
    save_pruned(model, folder / "transformers", plans=plan, source=source, preprocessing=PREPROCESSING)
    save_pruned(model, folder / "own", plans=plan, preprocessing=PREPROCESSING)
    return folder


def exported(artefact: Path, output: Path, **arguments: object) -> NativeReport:
    """Do the job of the command."""
    report = run_export(ExportConfig(str(artefact), output, to="native", num_workers=0, **arguments))  # type: ignore[arg-type]
    assert isinstance(report, NativeReport)
    return report


def test_a_timm_checkpoint_is_proven_on_the_data(artefacts: Path, tmp_path: Path) -> None:
    import timm

    report = exported(artefacts / "equal", tmp_path / "native", data_path=artefacts / "data", images=40)
    assert report.arguments == {"mlp_ratio": 154 / 64}
    assert (report.parity.images, report.parity.top1_agreement) == (40, 1.0)
    assert report.parity.relative_error <= 1e-6
    assert [file.name for file in tmp_path.iterdir()] == ["native"]
    assert report.size == sum(file.stat().st_size for file in (tmp_path / "native").iterdir())
    images = torch.randn(2, 3, 32, 32)
    native = eval(report.loads_by, {"timm": timm})
    assert torch.equal(logits(native, images), logits(load_pruned(artefacts / "equal"), images))
    assert native.pretrained_cfg["label_names"][3] == "digit 3"
    assert report.loads_by in report.table()
    assert json.loads(json.dumps(report.to_dict()))["arguments"] == {"mlp_ratio": 154 / 64}


def test_a_hugging_face_checkpoint_is_proven_on_photographs(artefacts: Path, tmp_path: Path) -> None:
    import transformers

    (tmp_path / "native").mkdir()
    report = exported(artefacts / "transformers", tmp_path / "native")
    assert report.arguments == {"intermediate_size": 42}
    assert report.parity.images == 2
    assert report.parity.relative_error <= 1e-6
    images = torch.randn(2, 3, 32, 32)
    native = eval(report.loads_by, {"transformers": transformers})
    assert torch.equal(logits(native, images), logits(load_pruned(artefacts / "transformers"), images))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "unequal",
            {},
            r"no configuration of vit_tiny_patch16_224 can say these widths: .* prune with --equal_widths",
        ),
        ("own", {}, "does not say how its dense model is built"),
        ("equal", {"dtype": "float16"}, "dtype is for onnx and pt2, got float16 with native"),
        ("equal", {"overwrite": True}, "overwrite replaces a file"),
        ("equal", {"output": "used"}, "must go into a new or empty folder"),
        ("equal", {"output": "absent/native"}, "must lie in an existing folder"),
    ],
)
def test_what_cannot_be_is_one_error_and_nothing_is_written(
    artefacts: Path, tmp_path: Path, name: str, arguments: dict[str, object], message: str
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    output = tmp_path / str(arguments.pop("output", "native"))
    with pytest.raises(InputError, match=message):
        exported(artefacts / name, output, **arguments)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "used", tmp_path / "used/notes.txt"]


def test_a_checkpoint_that_does_not_load_is_not_left(
    artefacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "vbp.deploy.native_files.save_file", lambda _, path, *__: path.write_bytes(b"half of the weights")
        )
        with pytest.raises(InputError, match=r"cannot be loaded without vbp: .*header"):
            exported(artefacts / "equal", tmp_path / "native")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("vbp.deploy.native.measure_parity", lambda *_: Parity(2, 0.1, 2e-4, 1.0))
    with pytest.raises(InputError, match=r"must give the model's logits within 0\.0001 .* nothing was written"):
        exported(artefacts / "equal", tmp_path / "native")
    assert not list(tmp_path.iterdir())
    assert exported(artefacts / "equal", tmp_path / "native", tolerance=1e-3).tolerance == 1e-3
