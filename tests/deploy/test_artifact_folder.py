"""The folder of a pruned model: readable, bit-equal, whole or not at all, and never a mixture."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, Family
from pruned_models import logits, pruned_in_place
from torch import nn

import vbp.runtime.files
from vbp import (
    InputError,
    ModelSource,
    OutputError,
    Preprocessing,
    PruningPlan,
    load_classifier,
    load_pruned,
    read_artifact,
    save_pruned,
)
from vbp.deploy.artifact_files import FOLDER_FORMAT, MANIFEST, WEIGHTS

PREPROCESSING = Preprocessing((32, 32), 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def example() -> tuple[nn.Module, PruningPlan, torch.Tensor]:
    """Return a pruned ViT, its plan and images."""
    torch.manual_seed(0)
    family = FAMILIES["timm-vit"]
    model, images = family.build().eval(), family.example(2, torch.float32)
    return model, pruned_in_place(model, images), images


def test_every_family_comes_back(family: Family, tmp_path: Path) -> None:
    model, images = family.build(), family.example(2, torch.float32)
    plan = pruned_in_place(model, images)
    save_pruned(model, tmp_path / "pruned", plans=plan)
    assert sorted(entry.name for entry in (tmp_path / "pruned").iterdir()) == [WEIGHTS, MANIFEST]
    loaded = load_pruned(tmp_path / "pruned", model=family.build())
    assert torch.equal(logits(loaded, images), logits(model, images))


def test_the_manifest_is_read_by_people(example: tuple[nn.Module, PruningPlan, torch.Tensor], tmp_path: Path) -> None:
    model, plan, _ = example
    source = ModelSource("timm", "vit_tiny_patch16_224", {"img_size": 32})
    save_pruned(
        model, tmp_path / "m", plans=plan, source=source, preprocessing=PREPROCESSING, metrics={"top1": 71.5},
        class_names=["tench, Tinca tinca", "écrevisse"],
    )  # fmt: skip
    text = (tmp_path / "m" / MANIFEST).read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["format"] == FOLDER_FORMAT
    assert content["source"] == source.to_dict()
    assert content["metrics"] == {"top1": 71.5}
    assert content["plans"] == [plan.to_dict()]
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert len(text.splitlines()) < 200  # the kept channels of a site stand on one line
    assert "écrevisse" in text
    artifact = read_artifact(tmp_path / "m")
    assert artifact.class_names == ("tench, Tinca tinca", "écrevisse")
    assert (artifact.plans, artifact.source, artifact.preprocessing) == ((plan,), source, PREPROCESSING)
    assert read_artifact(tmp_path / "m" / MANIFEST).plans == (plan,)  # either file of the folder stands for it


LOADING = """
import pathlib, sys
def refuse(event, arguments):
    if event.startswith("socket."):
        raise AssertionError(f"the network was asked for: {event} {arguments}")
sys.addaudithook(refuse)
import torch, vbp
from vbp.runtime.forward import logits_of
for name in sys.argv[1:]:
    images, expected = torch.load(f"{name}.pt")
    with torch.no_grad():
        assert torch.equal(logits_of(vbp.load_pruned(name)(images)), expected), name
assert not list(pathlib.Path.home().rglob("*.safetensors"))
"""


def test_another_process_without_network_loads_it(tmp_path: Path) -> None:
    swin = load_classifier(
        "swin_tiny_patch4_window7_224", allow_random_init=True, img_size=64,
        model_kwargs={"window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "num_classes": 5},
    )  # fmt: skip
    deit = FAMILIES["hf-deit"].build()
    sources = {
        "timm": (swin.model, swin.source, torch.randn(2, 3, 64, 64)),
        "hf": (
            deit,
            ModelSource("transformers", type(deit).__name__, deit.config.to_dict()),
            FAMILIES["hf-deit"].example(2, torch.float32),
        ),
    }
    for name, (model, source, images) in sources.items():
        save_pruned(model, tmp_path / name, plans=pruned_in_place(model, images), source=source)
        torch.save((images, logits(model, images)), tmp_path / f"{name}.pt")
    (tmp_path / "home").mkdir()
    unset = {"HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    subprocess.run(
        [sys.executable, "-c", LOADING, *(str(tmp_path / name) for name in sources)],
        env={**environment, "HOME": str(tmp_path / "home")}, check=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["m.pth", "m"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_is_kept_in_hidden_buffers_too(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family = FAMILIES["timm-swin"]  # its mask of shifted windows is in no state dict
    model, images = family.build().to(dtype), family.example(2, dtype)
    save_pruned(model, tmp_path / name, plans=pruned_in_place(model, images))
    loaded = load_pruned(tmp_path / name, model=family.build())
    assert torch.equal(logits(loaded, images), logits(model, images))


class Tied(nn.Module):
    """Two MLPs, whose last layers are one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2))
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.right.weight = self.left.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return four logits."""
        return self.right(self.second(self.left(self.first(images))))


@pytest.mark.parametrize("name", ["m.pth", "m"])
def test_tied_weights_are_stored_once_and_tied_again(name: str, tmp_path: Path) -> None:
    model, images = Tied(), torch.randn(9, 4)
    save_pruned(model, tmp_path / name, plans=pruned_in_place(model, images))
    loaded = load_pruned(tmp_path / name, model=Tied())
    assert isinstance(loaded, Tied)
    assert loaded.left.weight is loaded.right.weight
    assert torch.equal(loaded(images), model(images))
    if name == "m":
        assert read_artifact(tmp_path / name).weights["left.weight"].shape == (4, 4)
        assert json.loads((tmp_path / name / MANIFEST).read_text())["weights"]["shared"] == {
            "right.weight": "left.weight"
        }


def test_views_and_channels_last_weights_are_saved_plainly(tmp_path: Path) -> None:
    family = FAMILIES["timm-convnext-conv"]
    model, images = family.build(), family.example(2, torch.float32)
    plan = pruned_in_place(model, images)
    expected = logits(model, images)
    model.to(memory_format=torch.channels_last)
    large = torch.randn(5, *model.head.fc.weight.shape)
    large[3] = model.head.fc.weight.detach()
    model.head.fc.weight = nn.Parameter(large[3])
    save_pruned(model, tmp_path / "m", plans=plan)
    weights = read_artifact(tmp_path / "m").weights
    assert all(value.is_contiguous() for value in weights.values())
    assert (tmp_path / "m" / WEIGHTS).stat().st_size < 8 * sum(value.numel() for value in weights.values())
    assert torch.equal(logits(load_pruned(tmp_path / "m", model=family.build()), images), expected)


def _json(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        change(content)
        (folder / MANIFEST).write_text(json.dumps(content))

    return write


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
        r"model\.safetensors is truncated or of another model: vbp\.json says \d+ bytes",
    ),
    "one bit": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1] + b"\x55"),
        "damaged or of another model than",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"model\.safetensors cannot be read"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), r"there is no vbp\.json in it"),
    "half a manifest": (
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:99]),
        r"vbp\.json is damaged",
    ),
    "a list": (lambda folder: (folder / MANIFEST).write_text("[]"), "got 'list'; it is no pruned model"),
    "newer": (_json(lambda content: content.update(format="vbp-artifact/3")), "a newer vbp wrote it"),
    "foreign": (_json(lambda content: content.pop("format")), "got None; it is no pruned model"),
    "no digest": (_json(lambda content: content.update(weights={"bytes": 1})), "must have bytes, sha256, shared"),
    "no plans": (_json(lambda content: content.pop("plans")), "lacks 'plans'"),
    "plans of another type": (_json(lambda content: content.update(plans=3)), "is damaged"),
    "source of another type": (_json(lambda content: content.update(source=3)), "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_named(
    name: str, example: tuple[nn.Module, PruningPlan, torch.Tensor], tmp_path: Path
) -> None:
    damage, message = DAMAGES[name]
    save_pruned(example[0], tmp_path / "m", plans=example[1])
    damage(tmp_path / "m")
    with pytest.raises(InputError, match=message):
        read_artifact(tmp_path / "m")


def test_files_of_two_models_are_not_mixed(
    example: tuple[nn.Module, PruningPlan, torch.Tensor], tmp_path: Path
) -> None:
    model, plan, _ = example
    save_pruned(model, tmp_path / "one", plans=plan)
    save_pruned({name: value + 1 for name, value in model.state_dict().items()}, tmp_path / "two", plans=plan)
    (tmp_path / "two" / WEIGHTS).replace(tmp_path / "one" / WEIGHTS)
    with pytest.raises(InputError, match=r"of another model than vbp\.json beside it"):
        load_pruned(tmp_path / "one", model=copy.deepcopy(model))


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


@pytest.mark.parametrize("step", range(4))
def test_a_writer_that_is_killed_leaves_the_old_model_or_the_new_one(
    step: int,
    example: tuple[nn.Module, PruningPlan, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, plan, _ = example
    old = {name: value.clone() for name, value in model.state_dict().items()}
    new = {name: value + 1 for name, value in old.items()}
    folder = tmp_path / "m"
    save_pruned(old, folder, plans=plan, metrics={"top1": 1})
    replace, calls = Path.replace, 0

    def killed_at_a_step(self: Path, target: Path) -> Path:
        # Weights put beside the old ones, the manifest, the weights in their place: killed before or after each.
        nonlocal calls
        calls += 1
        if calls > step:
            raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed_at_a_step)
    if step < 3:
        with pytest.raises(Killed):
            save_pruned(new, folder, plans=plan, metrics={"top1": 2})
    else:
        save_pruned(new, folder, plans=plan, metrics={"top1": 2})
    monkeypatch.undo()
    found = read_artifact(folder)
    expected, top1 = (old, 1) if step < 2 else (new, 2)
    assert found.metrics == {"top1": top1}
    assert all(torch.equal(found.weights[name], value) for name, value in expected.items())
    save_pruned(new, folder, plans=plan)
    assert sorted(entry.name for entry in folder.iterdir()) == [WEIGHTS, MANIFEST]


@pytest.mark.parametrize("file", [WEIGHTS, MANIFEST])
def test_a_full_disk_leaves_the_earlier_model_whole(
    file: str,
    example: tuple[nn.Module, PruningPlan, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, plan, _ = example
    save_pruned(model, tmp_path / "m", plans=plan, metrics={"top1": 1})
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "m").iterdir()}
    real = vbp.runtime.files.write_atomically

    def full_disk(path: Path, write: Callable[[object], object]) -> None:
        if file in path.name:
            raise OutputError(28, "No space left on device")
        real(path, write)

    monkeypatch.setattr(vbp.runtime.files, "write_atomically", full_disk)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    for folder in ("m", "new"):
        with pytest.raises(OutputError, match="No space left"):
            save_pruned(state, tmp_path / folder, plans=plan)
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "m").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_nothing_else_is_overwritten(example: tuple[nn.Module, PruningPlan, torch.Tensor], tmp_path: Path) -> None:
    model, plan, _ = example
    (tmp_path / WEIGHTS).write_bytes(b"the dense model")
    with pytest.raises(InputError, match="of something else"):
        save_pruned(model, tmp_path, plans=plan)
    for name in ("m.safetensors", "m.pt"):
        with pytest.raises(InputError, match=r"a folder, or into one file that ends in \.pth"):
            save_pruned(model, tmp_path / name, plans=plan)
    with pytest.raises(InputError, match="without NaN"):
        save_pruned(model, tmp_path / "m", plans=plan, metrics={"top1": float("nan")})
    with pytest.raises(InputError, match="must be tensors, got dict in extra"):
        save_pruned({**model.state_dict(), "extra": {}}, tmp_path / "m", plans=plan)
    assert not (tmp_path / "m").exists()
    assert (tmp_path / WEIGHTS).read_bytes() == b"the dense model"
