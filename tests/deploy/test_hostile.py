"""What a stranger's artefact may do: describe an architecture, and nothing else.

Kin to public reports of loaders that fetched an address, wrote into a folder or built gigabytes because a model's
description said so: each door that reads an artefact gets each of these, and answers with one line.
"""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from pruned_models import pruned_in_place
from torch import nn

from vbp import InputError, ModelSource, PruningPlan, load_classifier, load_pruned, read_artifact, save_pruned
from vbp.cli.export import run_export
from vbp.cli.inspect import run_inspect
from vbp.cli.latency import run_latency
from vbp.cli.options import ExportConfig, InspectConfig, LatencyConfig

MEAN = (0.5, 0.5, 0.5)
HOSTILE: dict[str, dict[str, Any]] = {
    "url": {"pretrained_cfg": {"url": "https://example.org/weights.pth"}, "pretrained": True},
    "file": {"checkpoint_path": "/etc/passwd"},
    "cache": {"cache_dir": "/tmp/elsewhere", "pretrained": True},
    "overlay": {"pretrained_cfg_overlay": {"file": "weights.pth"}},
    "scripted": {"scriptable": True},
    "features": {"features_only": True},
    "path as word": {"act_layer": "../../x"},
    "table": {"block_args": {"a": 1}},
    "depth": {"depth": 10**6},
    "possible depth": {"depth": 4000},
    "more than a number": {"depth": 10**30},
    "width": {"embed_dim": 2**19},
    "image": {"img_size": 2**18},
    "stages": {"embed_dim": [10**5] * 500},
    "long": {"embed_dim": [1] * 10**6},
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loading opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def honest() -> tuple[nn.Module, PruningPlan, ModelSource, Any]:
    classifier = load_classifier("test_vit", allow_random_init=True, model_kwargs={"num_classes": 3})
    plan = pruned_in_place(classifier.model, classifier.example_input())
    return classifier.model, plan, classifier.source, classifier.preprocessing


def write(path: Path, honest: Any, **arguments: Any) -> Path:
    model, plan, source, preprocessing = honest
    changed = ModelSource(source.library, source.name, {**source.arguments, **arguments})
    save_pruned(model, path, plans=plan, source=changed, preprocessing=preprocessing)
    return path


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("form", ["m", "m.pth"])
@pytest.mark.parametrize("name", list(HOSTILE))
def test_loading_describes_an_architecture_and_nothing_else(
    name: str, form: str, honest: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / form, honest, **HOSTILE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as refused:
        load_pruned(path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB: half a GiB
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [form]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("door", ["inspect", "latency", "export"])
def test_each_command_refuses_it(door: str, honest: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "m", honest, **HOSTILE["url"])
    jobs: dict[str, Callable[[], object]] = {
        "inspect": lambda: run_inspect(InspectConfig(str(path))),
        "latency": lambda: run_latency(LatencyConfig(artifact=str(path))),
        "export": lambda: run_export(ExportConfig(str(path), tmp_path / "m.onnx")),
    }
    with pytest.raises(InputError, match="takes no argument 'pretrained_cfg'"):
        jobs[door]()
    assert not (tmp_path / "m.onnx").exists()


def test_the_hub_is_no_other_door(honest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "m", honest, **HOSTILE["url"])
    monkeypatch.setattr("vbp.deploy.artifact.fetch", lambda reference, files: folder)
    with pytest.raises(InputError, match="pretrained"):
        load_pruned("hf://someone/model")
    assert read_artifact("hf://someone/model").source is not None  # it reads, and builds nothing


CODE: dict[str, dict[str, Any]] = {
    "remote code": {"auto_map": {"AutoConfig": "someone/repo--code.Config"}},
    "kernel": {"attn_implementation": "kernels-community/flash-attn"},
    "hidden kernel": {"_attn_implementation_internal": "someone/kernel"},
    "quantised": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "backbone": {"vision_config": {"backbone": "someone/weights", "use_pretrained_backbone": True}},
    "timm": {"model_type": "timm_wrapper", "architecture": "test_vit"},
    "no model": {"model_type": ["vit"]},
    "depth": {"num_hidden_layers": 10**7},
    "many": {"num_hidden_layers": 4000},
    "width": {"intermediate_size": 10**6},
    "deep": {"a": [[[[[[[[[[1]]]]]]]]]]},
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("door", ["artefact", "folder"])
@pytest.mark.parametrize("name", list(CODE))
def test_a_hugging_face_configuration_describes_an_architecture_alone(name: str, door: str, tmp_path: Path) -> None:
    family = FAMILIES["hf-vit"]
    model: Any = family.build()
    values = {**model.config.to_dict(), "architectures": [type(model).__name__], **CODE[name]}
    if door == "folder":
        model.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(values))
    else:
        source = ModelSource("transformers", type(model).__name__, values)
        save_pruned(model, tmp_path / "m", plans=pruned_in_place(model, family.example()), source=source)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepared: dict[str, Any] = {
        "img_size": 32,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": MEAN,
        "std": MEAN,
    }
    load: Callable[[], object] = partial(load_classifier, str(tmp_path), **prepared)
    if door == "artefact":
        load = partial(load_pruned, tmp_path / "m")
    with pytest.raises(InputError) as refused:
        load()
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19
