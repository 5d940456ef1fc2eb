"""What a stranger's artefact may do: describe an architecture, and nothing else.

Kin to public reports of loaders that fetched an address, wrote into a folder or built gigabytes because a model's
description said so: each door that reads an artefact gets each of these, and answers with one line.
"""

from __future__ import annotations

import json
import resource
import socket
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from memory import at_most
from pruned_models import pruned_in_place
from torch import nn

from vbp import InputError, ModelSource, PruningPlan, load_classifier, load_pruned, prune_, read_artifact, save_pruned
from vbp.cli.export import run_export
from vbp.cli.inspect import run_inspect
from vbp.cli.latency import run_latency
from vbp.cli.options import ExportConfig, InspectConfig, LatencyConfig
from vbp.models.limits import Limits
from vbp.pruning.plan import SitePlan
from vbp.report.run_report import RunReport
from vbp.sites.site import Site

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
    with pytest.raises(InputError, match="the argument 'pretrained_cfg'"):
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


def test_no_damaged_byte_of_a_file_loads_as_another_model(honest: Any, tmp_path: Path) -> None:
    """Kin to reports of checkpoints that load after a faulty copy: torch.load looks at no check sum."""
    path = write(tmp_path / "m.pth", honest)
    whole = path.read_bytes()
    assert read_artifact(path).plans == (honest[1],)
    for place in [*range(0, len(whole), len(whole) // 150), *range(len(whole) - 90, len(whole), 7)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"m\.pth"):
            read_artifact(path)


def test_an_archive_is_not_unpacked_beyond_its_own_size(tmp_path: Path) -> None:
    """Kin to reports of archives of kilobytes that fill the memory: torch.save compresses nothing."""
    state = {"head.weight": torch.zeros(2**24)}
    torch.save({"format": "vbp-pruned/2", "state_dict": state}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "m.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    (tmp_path / "plain.pth").unlink()
    assert (tmp_path / "m.pth").stat().st_size < 2**20
    with pytest.raises(InputError, match="unpacks to"):
        load_pruned(tmp_path / "m.pth")
    with pytest.raises(InputError, match="unpacks to"):
        load_classifier("test_vit", checkpoint=tmp_path / "m.pth")


class _Bytes:
    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (2**33,)


def _tar(path: Path) -> None:
    header = tarfile.TarInfo("\x80header")  # begins as a pickle does
    header.type, header.size = tarfile.XHDTYPE, 2**33
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT, encoding="latin1"))
        file.truncate(2**33 + 2**20)


def _with_entry(path: Path) -> None:
    """Write a whole archive, and one entry more that is packed."""
    torch.save({"x": torch.zeros(2)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/more", bytes(2**20))


TORCH_FILES: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: torch.save({"x": _Bytes()}, path),
    "bytes of the old format": lambda path: torch.save({"x": _Bytes()}, path, _use_new_zipfile_serialization=False),
    "an expanded tensor": lambda path: torch.save({"x": torch.zeros(1).expand(2**40)}, path),
    "a tensor without values": lambda path: torch.save({"x": torch.zeros(2**40, device="meta")}, path),
    "many names of one tensor": lambda path: torch.save(dict.fromkeys(map(str, range(500)), torch.ones(2**16)), path),
    "a tar archive": _tar,
    "a packed entry": _with_entry,
    "half an archive": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(10**5)),
    "zeros": lambda path: path.write_bytes(bytes(10**6)),
    "nothing": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("name", list(TORCH_FILES))
def test_a_file_of_torch_takes_no_more_memory_than_it_has_bytes(name: str, tmp_path: Path) -> None:
    """Kin to reports of weight files of kilobytes that fill the memory although no code in them is run."""
    FAMILIES["hf-vit"].build().save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    (tmp_path / "hf" / "model.safetensors").unlink()
    doors: dict[Path, Callable[[Path], object]] = {
        tmp_path / "m.pth": load_pruned,
        tmp_path / "w.pth": lambda path: load_classifier("test_vit", checkpoint=path),
        tmp_path / "hf" / "pytorch_model.bin": lambda path: load_classifier(
            str(path.parent), img_size=30, crop_pct=1.0, interpolation="bicubic", mean=MEAN, std=MEAN
        ),
    }
    for path, door in doors.items():
        TORCH_FILES[name](path)
        with at_most(256), pytest.raises(InputError) as refused:
            door(path)
        path.unlink()
        assert "\n" not in str(refused.value)
        assert "weights_only" not in str(refused.value)


def test_views_do_not_raise_the_limits_of_an_architecture(honest: Any) -> None:
    weights = {name: value.expand(1000, *value.shape) for name, value in honest[0].state_dict().items()}
    assert Limits.of_dense(weights) == Limits.of_dense(honest[0].state_dict())


def test_a_hugging_face_folder_names_no_file_elsewhere(tmp_path: Path) -> None:
    model: Any = FAMILIES["hf-vit"].build()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for elsewhere in ("/dev/zero", "../x.safetensors", 3):
        index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), elsewhere)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with at_most(256), pytest.raises(InputError, match="it names files elsewhere"):
            load_classifier(str(tmp_path))


def test_json_nested_without_end_is_one_error(honest: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", honest)
    deep = "[" * 10**6
    readers: dict[Path, Callable[[], object]] = {
        folder / "vbp.json": lambda: load_pruned(folder),
        tmp_path / "plan.json": lambda: PruningPlan.load(tmp_path / "plan.json"),
        tmp_path / "summary.json": lambda: RunReport.read(tmp_path),
        tmp_path / "config.json": lambda: load_classifier(str(tmp_path)),
    }
    for file, read in readers.items():
        file.write_text(deep)
        with pytest.raises(InputError, match="nested too deep"):
            read()


def test_a_plan_that_reaches_beyond_its_layer_is_refused() -> None:
    """Kin to reports of plans applied to other rows than they were made for: the model is left as it was."""
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for offset in (1, 8, 2**20):
        site = Site(("0",), "2", 8, offsets=(offset,))
        with pytest.raises(InputError, match="must have each of the rows 0 to 8 of 0 once"):
            prune_(model, PruningPlan((SitePlan(site, (0, 1)),), 0.25, "per_layer"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _Harmless:
    """A type that no plain file holds."""


def test_the_advice_to_run_a_file_is_not_passed_on(tmp_path: Path) -> None:
    """Kin to reports of users who set weights_only=False because the error said so."""
    for content in ({"format": "vbp-pruned/2", "x": _Harmless()}, _Harmless()):
        torch.save(content, tmp_path / "m.pth")
        with pytest.raises(InputError) as refused:
            load_pruned(tmp_path / "m.pth")
        assert "weights_only" not in str(refused.value)
        with pytest.raises(InputError) as refused:
            load_classifier("test_vit", checkpoint=tmp_path / "m.pth")
        assert "weights_only" not in str(refused.value)
