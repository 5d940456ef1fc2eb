"""OpenVINO: files give the model's logits, int8 holds what it says, nothing is sent, and times are its own."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, randomise_
from torch import Tensor, nn

import vbp
from vbp import InputError
from vbp.deploy.latency import compare_latency
from vbp.deploy.settings import LatencySettings

openvino = pytest.importorskip("openvino", reason="needs the extra openvino")
QUICK: dict[str, Any] = {"rounds": 3, "warmup": 1, "budget_s": 0.0}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(FAMILIES[name].build()).eval()


def operations(file: Path) -> list[str]:
    """Return the types of a graph's operations."""
    return re.findall(r'<layer id="\d+" name="[^"]*" type="(\w+)"', file.read_text())


@pytest.mark.parametrize("name", ["timm-swin", "timm-convnext-conv"])
def test_float32_files_give_the_models_logits_for_any_batch(name: str, tmp_path: Path) -> None:
    model, images = build(name), FAMILIES[name].example(5, torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = vbp.export_model(model, images, tmp_path / "folder", to="openvino")
    assert report.parity.relative_error <= 1e-5
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["folder", "model.bin", "model.xml"]
    assert report.size == sum(file.stat().st_size for file in (tmp_path / "folder").iterdir())
    assert report.file == tmp_path / "folder/model.xml"
    compiled = openvino.Core().compile_model(str(report.file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for exported in (vbp.open_exported(tmp_path / "folder"), vbp.open_exported(report.file, threads=1)):
        for size in (1, 3):
            with torch.inference_mode():
                expected = model(images[:size])
            scale = float(expected.abs().max())
            torch.testing.assert_close(exported(images[:size]), expected, rtol=0, atol=1e-5 * scale)
            (logits,) = compiled({"images": images[:size].numpy()}).values()
            torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-5 * scale)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_float16_halves_the_weights(tmp_path: Path) -> None:
    model, images = build("timm-vit"), FAMILIES["timm-vit"].example(4, torch.float32)
    whole = vbp.export_model(model, images, tmp_path / "whole", to="openvino")
    half = vbp.export_model(model, images, tmp_path / "half", to="openvino", dtype="float16")
    sizes = [(report.file.with_suffix(".bin")).stat().st_size for report in (whole, half)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.05)
    # Not the model's own weights, and near to them.
    assert 1e-5 < half.parity.relative_error < 0.01


@pytest.mark.parametrize("reduce_range", ["off", "on"])
def test_int8_takes_its_ranges_from_the_images(reduce_range: Any, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("nncf", reason="needs the extra openvino")
    model, images = build("timm-vit"), FAMILIES["timm-vit"].example(16, torch.float32)
    with torch.inference_mode():
        labels = model(images).argmax(1)
    report = vbp.export_model(
        model, images, tmp_path / "int8", to="openvino", dtype="int8", calibration=[images], tolerance=0.5,
        labelled=[(images, labels)], reduce_range=reduce_range,
    )  # fmt: skip
    graph = openvino.Core().read_model(report.file)
    weights = [
        operation.data
        for operation in graph.get_ops()
        if operation.get_type_name() == "Constant" and operation.get_element_type() == openvino.Type.i8
    ]
    # qkv, proj, fc1 and fc2 of two blocks, the patch embedding and the head.
    assert len(weights) == 10
    largest = max(int(abs(weight.astype(int)).max()) for weight in weights)
    assert largest <= 64 if reduce_range == "on" else 126 <= largest <= 128
    assert report.reduced_range == (reduce_range == "on")
    assert ("weights in 7 bits" in report.table()) == (reduce_range == "on")
    assert report.top1 is not None
    assert report.top1[0] == 100
    assert "FakeQuantize" in operations(report.file)
    # Its progress bars stay off the standard output, which holds the report.
    assert capsys.readouterr().out == ""


def without_vnni(file: Path, images: Tensor) -> Tensor:
    """Return the logits of an OpenVINO model as a processor without VNNI computes them."""
    code = (
        "import sys, json, numpy; sys.modules['openvino_telemetry'] = None; import openvino;"
        "images = numpy.array(json.loads(sys.stdin.read()), numpy.float32);"
        "print(json.dumps(openvino.Core().compile_model(sys.argv[1], 'CPU')(images)[0].tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], input=json.dumps(images.tolist()), text=True, check=True,
        capture_output=True, timeout=300, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
    )  # fmt: skip
    return torch.tensor(json.loads(done.stdout))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have no such products")
def test_weights_of_7_bits_do_not_saturate_without_vnni(tmp_path: Path) -> None:
    pytest.importorskip("nncf", reason="needs the extra openvino")
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), torch.rand(8, 3, 8, 8)
    nn.init.ones_(model[1].weight)  # all products have one sign, the largest sums
    images[:2] = 1
    found = {}
    for choice in ("off", "on"):
        report = vbp.export_model(
            model, images, tmp_path / choice, to="openvino", dtype="int8", calibration=[images], tolerance=9,
            reduce_range=choice,
        )  # fmt: skip
        found[choice] = without_vnni(report.file, images[:2])
    with torch.inference_mode():
        expected = model(images[:2])
    torch.testing.assert_close(found["on"], expected, rtol=0.03, atol=0)
    assert float(found["off"].max()) < 0.8 * float(expected.min())


def refused(**arguments: Any) -> Callable[[Path], object]:
    given = {"output": "new", "to": "openvino", **arguments}
    return lambda folder: vbp.export_model(
        nn.Flatten(), torch.zeros(2, 3, 4, 4), folder / given.pop("output"), **given
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "model.xml"}, "must be a folder for openvino"),
        ({"output": "missing/model"}, "existing folder"),
        ({"output": "used"}, "new or empty folder"),
        ({"overwrite": True}, "writes a new folder"),
        ({"dtype": "bfloat16"}, "for openvino, got bfloat16: OpenVINO chooses"),
        ({"dtype": "int8"}, "needs calibration images"),
        ({"opset": 17}, "opset is for onnx"),
        ({"reduce_range": "on"}, "reduce_range is for dtype int8"),
    ],
)
def test_what_cannot_be_written_is_refused_before_work(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    with pytest.raises(InputError, match=message):
        refused(**arguments)(tmp_path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "used"]


def test_an_operation_that_openvino_does_not_know_is_named(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            smaller = nn.functional.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True)
            return smaller.flatten(1)

    with pytest.raises(InputError, match=r"Halves cannot be written for OpenVINO: .*_upsample_bicubic2d_aa"):
        vbp.export_model(Halves(), torch.zeros(2, 3, 8, 8), tmp_path / "new", to="openvino")
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text("<net/>")
    with pytest.raises(InputError, match="damaged"):
        vbp.open_exported(tmp_path)


def test_without_the_extra_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(InputError, match=r"nncf.*pip install 'vbp-pruning\[openvino\]'"):
        refused(dtype="int8", calibration=[])(tmp_path)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"openvino.*pip install 'vbp-pruning\[openvino\]'"):
        refused()(tmp_path)
    with pytest.raises(InputError, match=r"pip install 'vbp-pruning\[openvino\]'"):
        compare_latency(
            nn.Flatten(), nn.Flatten(), torch.zeros(1, 3, 4, 4), settings=LatencySettings(backend="openvino")
        )


def test_nothing_is_reported_to_the_makers(tmp_path: Path) -> None:
    # Their package for it keeps an identifier in the home folder as soon as it has something to send.
    code = (
        "import sys, torch, vbp; images = torch.randn(4, 3, 4, 4);"
        "vbp.export_model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)), images, sys.argv[1],"
        " to='openvino', dtype='int8', calibration=[images], tolerance=9);"
        "assert 'nncf' in sys.modules and 'openvino_telemetry' not in sys.modules"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    environment.pop("CI", None)
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "new")], env=environment, check=True, timeout=300)
    assert (tmp_path / "new/model.xml").is_file()
    assert not (tmp_path / "intel").exists()


def test_latency_is_measured_in_its_runtime() -> None:
    family = FAMILIES["timm-vit"]
    dense = family.build()
    before, threads = {key: value.clone() for key, value in dense.state_dict().items()}, torch.get_num_threads()
    settings = LatencySettings(backend="openvino", threads=1, **QUICK)
    report = compare_latency(dense, dense, family.example(1, torch.float32), batch_sizes=(1, 2), settings=settings)
    assert [row.batch for row in report.rows] == [1, 2]
    assert all(row.dense_ms.median > 0 for row in report.rows)
    assert report.table().startswith("openvino, float32")
    assert (dense.training, torch.get_num_threads()) == (True, threads)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("settings", [{"compile": True}, {"precision": "float16"}, {"channels_last": True}])
def test_latency_refuses_what_its_runtime_cannot(settings: dict[str, Any]) -> None:
    model = nn.Flatten()
    with pytest.raises(InputError, match="openvino is timed on the CPU in float32"):
        compare_latency(
            model, model, torch.zeros(1, 3, 4, 4), settings=LatencySettings(backend="openvino", **settings)
        )
