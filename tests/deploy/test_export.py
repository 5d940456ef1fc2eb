"""Exported files give the model's logits for any batch size, or no file is left."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, randomise_
from torch import Tensor, nn

import vbp
from vbp import InputError
from vbp.cli.export import run_export
from vbp.cli.options import ExportConfig
from vbp.deploy.export import TOLERANCES, ExportReport, export_model, open_exported
from vbp.deploy.file_formats import compare_logits
from vbp.runtime.tables import with_error


def pruned(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = randomise_(FAMILIES[name].build()).eval()
    images = FAMILIES[name].example(4, torch.float32)
    sites = vbp.find_sites(model, images[:1])
    statistics = vbp.collect_statistics(model, sites, [images])
    vbp.prune_(model, vbp.make_plan(sites, vbp.variance_scores(statistics), keep_ratio=0.5), statistics.means)
    return model


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        output = model(images)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("timm-vit", "onnx"),
        ("timm-swin", "onnx"),
        ("timm-convnext-linear", "onnx"),
        ("hf-vit", "onnx"),
        ("timm-swin", "pt2"),
        ("hf-vit", "pt2"),
    ],
)
def test_a_pruned_model_gives_the_same_logits_from_its_file(name: str, to: str, tmp_path: Path) -> None:
    model, images = pruned(name), FAMILIES[name].example(5, torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = export_model(model, images, tmp_path / f"model.{to}", to=to)  # type: ignore[arg-type]
    exported = open_exported(report.file)
    for size in (1, 3, 5):
        expected = logits(model, images[:size])
        torch.testing.assert_close(
            logits(exported, images[:size]), expected, rtol=1e-4, atol=1e-5 * expected.abs().max()
        )
    assert report.parity.images == 5
    assert report.parity.top1_agreement == 1
    assert report.parity.relative_error <= 1e-4
    assert report.size == report.file.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == [f"model.{to}"]
    assert json.loads(json.dumps(report.to_dict()))["tolerance"] == TOLERANCES["float32"]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("to", "dtype"), [("onnx", "float16"), ("pt2", "bfloat16")])
def test_half_precision_is_near_and_its_accuracy_measured(to: str, dtype: str, tmp_path: Path) -> None:
    model, images = pruned("timm-vit"), FAMILIES["timm-vit"].example(8, torch.float32)
    labels = logits(model, images).argmax(1)
    report = export_model(
        model,
        images,
        tmp_path / f"model.{to}",
        to=to,
        dtype=dtype,
        labelled=[(images, labels)],  # type: ignore[arg-type]
    )
    # Float32 arithmetic would be nearer than this.
    assert 1e-5 < report.parity.relative_error <= TOLERANCES[dtype]  # type: ignore[index]
    output = open_exported(report.file)(images)
    assert output.dtype == torch.float32
    right = float((output.argmax(1) == labels).double().mean())
    assert report.top1 == (100.0, 100 * right)
    assert f"top-1                     100.00 % -> {with_error(100 * right, 8)} %" in report.table()
    assert report.to_dict()["labelled"] == 8


def test_int8_takes_its_ranges_from_the_calibration_images(tmp_path: Path) -> None:
    import onnx

    model, images = pruned("timm-vit"), FAMILIES["timm-vit"].example(32, torch.float32)
    labelled = [(images, logits(model, images).argmax(1))]
    report = export_model(
        model,
        images,
        tmp_path / "a.onnx",
        dtype="int8",
        calibration=[{"image": images}],
        labelled=labelled,
        tolerance=0.5,
    )
    graph = onnx.load(report.file).graph
    quantised = [
        value for value in graph.initializer if value.data_type == onnx.TensorProto.INT8 and len(value.dims) > 1
    ]
    # qkv, proj, fc1 and fc2 of two blocks, the patch embedding and the head; a scale for each of their channels.
    assert len(quantised) == 10
    scales = {value.name: list(value.dims) for value in graph.initializer if value.name.endswith("_scale")}
    assert sum(dims not in ([], [1]) for dims in scales.values()) >= 10
    assert report.top1 is not None
    assert report.top1[0] == 100
    # The input's range is that of the calibration images, in 255 steps.
    input_scale = next(value for value in graph.initializer if value.name == "images_scale")
    assert onnx.numpy_helper.to_array(input_scale) == pytest.approx(
        float(images.max() - images.min()) / 255, rel=1e-3
    )


@pytest.mark.parametrize("opset", [17, 22])
def test_the_opset_is_the_one_that_was_asked(opset: int, tmp_path: Path) -> None:
    import onnx

    model, images = pruned("timm-vit"), FAMILIES["timm-vit"].example(3, torch.float32)
    report = export_model(model, images, tmp_path / "a.onnx", opset=opset)
    versions = {entry.domain: entry.version for entry in onnx.load(report.file).opset_import}
    assert versions == {"": opset}
    assert report.opset == report.to_dict()["opset"] == opset
    assert f"onnx, opset {opset}, float32" in report.table()


def test_an_opset_that_cannot_say_the_model_is_refused(tmp_path: Path) -> None:
    # Opset 16 has no LayerNormalization.
    model, images = pruned("timm-vit"), FAMILIES["timm-vit"].example(3, torch.float32)
    with pytest.raises(InputError, match="got 16, to which torch could not convert"):
        export_model(model, images, tmp_path / "a.onnx", opset=16)
    assert not list(tmp_path.iterdir())


VNNI = {"architecture": "x86_64", "avx2": True, "avx512_vnni": True}
AVX2 = {"architecture": "x86_64", "avx2": True, "avx_vnni": False}
ARM = {"architecture": "aarch64"}


@pytest.mark.parametrize(
    ("choice", "processor", "reduced"),
    [("auto", VNNI, False), ("auto", AVX2, True), ("auto", ARM, False), ("on", VNNI, True), ("off", AVX2, False)],
)
def test_int8_weights_take_7_bits_where_products_can_saturate(
    choice: Any, processor: dict[str, Any], reduced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), torch.randn(16, 3, 8, 8)
    labelled = [(images, logits(model, images).argmax(1))]
    report = export_model(
        model, images, tmp_path / "a.onnx", dtype="int8", calibration=[images], reduce_range=choice, opset=17,
        labelled=labelled,
    )  # fmt: skip
    graph = onnx.load(report.file).graph
    (weight,) = [
        onnx.numpy_helper.to_array(value)
        for value in graph.initializer
        if value.data_type == onnx.TensorProto.INT8 and len(value.dims) == 2
    ]
    # 127 of the 255 steps, for each of the seven rows.
    assert int(abs(weight.astype(int)).max()) == (64 if reduced else 127)
    assert report.reduced_range == report.to_dict()["reduced_range"] == reduced
    assert ("weights in 7 bits" in report.table()) == reduced
    assert report.opset == 17
    assert report.top1 is not None
    assert report.top1[1] > 80


def test_a_file_that_is_not_true_is_not_left_behind(tmp_path: Path) -> None:
    model, images = pruned("timm-vit"), FAMILIES["timm-vit"].example(2, torch.float32)
    file = tmp_path / "model.pt2"
    file.write_bytes(b"an earlier one")
    with pytest.raises(InputError, match="nothing was written"):
        export_model(model, images, file, to="pt2", dtype="bfloat16", tolerance=1e-7, overwrite=True)
    assert file.read_bytes() == b"an earlier one"
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_compared() -> None:
    expected = torch.tensor([[1.0, 2.0, -4.0], [3.0, 0.0, 1.0]])
    found = torch.tensor([[2.5, 2.0, -4.0], [3.0, 0.0, 1.5]])
    parity = compare_logits(expected, found)
    assert (parity.images, parity.max_abs_error, parity.relative_error) == (2, 1.5, 0.375)
    assert parity.top1_agreement == 0.5
    found[1, 1] = float("nan")
    assert not compare_logits(expected, found).relative_error <= 1e9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "tflite"}, "to must be one of onnx, pt2, openvino, executorch"),
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"dtype": "bfloat16"}, "no bfloat16 matrix product"),
        ({"to": "pt2", "dtype": "int8"}, "must be one of float32, float16, bfloat16 for pt2"),
        ({"dtype": "int8"}, "needs calibration images"),
        ({"dtype": "int8", "calibration": []}, "needs calibration images"),
        ({"calibration": []}, "for dtype int8 alone"),
        ({"output": "model.pt2"}, r"must end in \.onnx"),
        ({"output": "missing/model.onnx"}, "existing folder"),
        ({"output": "there.onnx"}, "must be a new file"),
        ({"images": torch.zeros(1, 3, 32, 32)}, "two or more"),
        ({"opset": 12}, "opset must be 13 to "),
        ({"opset": 1000}, "opset must be 13 to .*, got 1000"),
        ({"to": "pt2", "opset": 17}, "opset is for onnx, got 17 with pt2"),
        ({"reduce_range": "off"}, "reduce_range is for dtype int8, got off"),
        ({"reduce_range": "yes"}, "reduce_range must be one of auto, on, off"),
    ],
)
def test_what_cannot_be_is_refused_before_work(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "there.onnx").write_bytes(b"")
    given = {"images": torch.zeros(2, 3, 32, 32), "output": "model.onnx", **arguments}
    with pytest.raises(InputError, match=message):
        export_model(
            FAMILIES["timm-vit"].build(),
            given.pop("images"),  # type: ignore[arg-type]
            tmp_path / str(given.pop("output")),
            **given,  # type: ignore[arg-type]
        )
    assert [file.name for file in tmp_path.iterdir()] == ["there.onnx"]


def test_a_model_that_cannot_be_traced_is_one_error(tmp_path: Path) -> None:
    class Decides(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) if images.sum() > 0 else -images.flatten(1)

    with pytest.raises(InputError, match="Decides cannot be exported to pt2"):
        export_model(Decides(), torch.zeros(2, 3, 4, 4), tmp_path / "model.pt2", to="pt2")
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"onnxruntime.*pip install 'vbp-pruning\[export\]'"):
        export_model(FAMILIES["timm-vit"].build(), torch.zeros(2, 3, 32, 32), tmp_path / "model.onnx")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the demo's model, pruned and saved, and its data."""
    from vbp.recipes.demo import load_demo

    folder = tmp_path_factory.mktemp("demo")
    classifier, train, _ = load_demo(folder / "data")
    model = copy.deepcopy(classifier.model)
    images = next(iter(train))[0]
    sites = vbp.find_sites(model, images[:1])
    statistics = vbp.collect_statistics(model, sites, [images])
    plan = vbp.make_plan(sites, vbp.variance_scores(statistics), keep_ratio=0.5, round_to=8)
    vbp.prune_(model, plan, statistics.means)
    vbp.save_pruned(
        model,
        folder / "pruned.pth",
        plans=plan,
        source=classifier.source,
        preprocessing=classifier.preprocessing,
    )
    return folder / "pruned.pth", folder / "data"


def command(artifact: tuple[Path, Path], output: Path, **arguments: object) -> ExportReport:
    config = ExportConfig(str(artifact[0]), output, num_workers=0, **arguments)  # type: ignore[arg-type]
    return run_export(config)


def test_the_command_exports_an_artefact_and_measures_int8(artifact: tuple[Path, Path], tmp_path: Path) -> None:
    report = command(
        artifact, tmp_path / "a.onnx", dtype="int8", data_path=artifact[1], limit_val=100, calib_samples=32
    )
    assert report.parity.images == 32
    assert report.top1 is not None
    assert report.top1[0] > 50
    assert report.top1[1] > report.top1[0] - 5


def test_the_command_refuses_before_it_reads_anything(tmp_path: Path) -> None:
    nowhere = (tmp_path / "missing.pth", tmp_path)
    for arguments, message in (
        ({"to": "native", "opset": 17}, "opset is for onnx"),
        ({"to": "native", "reduce_range": "on"}, "reduce_range for int8"),
        ({"to": "pt2", "opset": 17}, "opset is for onnx"),
        ({"dtype": "int8"}, "needs calibration images"),
        ({"reduce_range": "on"}, "reduce_range is for dtype int8"),
    ):
        with pytest.raises(InputError, match=message):
            command(nowhere, tmp_path / ("a.pt2" if arguments.get("to") == "pt2" else "a.onnx"), **arguments)


def test_a_damaged_onnx_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"a\.onnx is damaged"):
        open_exported(tmp_path / "a.onnx")


def test_the_command_without_data_proves_the_file_on_photographs(artifact: tuple[Path, Path], tmp_path: Path) -> None:
    report = command(artifact, tmp_path / "a.pt2", to="pt2")
    assert (report.parity.images, report.top1) == (2, None)
    with pytest.raises(InputError, match="--data_path"):
        command(artifact, tmp_path / "b.onnx", dtype="int8")
