"""Publish on the hub and load from it, through the hub's own client against a stand-in on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from families import FAMILIES
from hub_stand_in import Hub
from pruned_models import logits, pruned_in_place
from torch import nn

from vbp import (
    InputError,
    ModelSource,
    OutputError,
    Preprocessing,
    PrunedArtifact,
    load_pruned,
    model_card,
    push_to_hub,
    read_artifact,
    save_pruned,
)
from vbp.deploy.artifact_files import MANIFEST, WEIGHTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a pruned model."""
    torch.manual_seed(0)
    model = FAMILIES["hf-vit"].build()
    plan = pruned_in_place(model, FAMILIES["hf-vit"].example(2, torch.float32))
    save_pruned(
        model, tmp_path / "pruned", plans=plan,
        source=ModelSource("transformers", type(model).__name__, model.config.to_dict()),
        preprocessing=Preprocessing((32, 32), 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3),
        metrics={
            "top1": 71.25, "dense": {"top1": 72.5, "macs": 1260000, "images": 650}, "pruned": {"top1": 70.0},
            "note": "text",
        },
    )  # fmt: skip
    return tmp_path / "pruned"


def test_what_is_published_is_loaded_again(hub: Hub, folder: Path) -> None:
    (folder / "train.log").write_text("of no interest to others")
    address = push_to_hub(
        folder, "me/small-vit", base_model="google/vit", license="apache-2.0", dataset="imagenet-1k"
    )
    assert address == f"{huggingface_hub.constants.ENDPOINT}/me/small-vit/commit/{hub.digest(1)}"
    assert sorted(hub.repositories["me/small-vit"][0]) == ["README.md", WEIGHTS, MANIFEST]
    images = FAMILIES["hf-vit"].example(2, torch.float32)
    here, there = load_pruned(folder), load_pruned("hf://me/small-vit")
    assert torch.equal(logits(there, images), logits(here, images))
    assert torch.equal(logits(load_pruned(Path("hf://me/small-vit")), images), logits(here, images))
    asked = len(hub.requests)
    assert read_artifact(f"hf://me/small-vit@{hub.digest(1)}").metrics == read_artifact(folder).metrics
    assert len(hub.requests) == asked  # a commit does not change: the cache is enough


def test_a_revision_is_one_commit(hub: Hub, folder: Path) -> None:
    push_to_hub(folder, "me/vit", private=True)
    assert hub.private == {"me/vit"}
    artifact = read_artifact(folder)
    (folder / "README.md").write_text("# Written by hand\n")
    save_pruned(artifact.weights, folder, plans=artifact.plans, metrics={"top1": 99})
    push_to_hub(folder, "me/vit")
    assert hub.repositories["me/vit"][1]["README.md"] == b"# Written by hand\n"
    assert read_artifact("hf://me/vit").metrics == {"top1": 99}
    assert (read_artifact(f"hf://me/vit@{hub.digest(1)}").metrics or {})["top1"] == 71.25


def test_what_cannot_be_had_is_named(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_to_hub(folder, "me/vit")
    hub.repositories["me/foreign"] = [{"config.json": b"{}"}]
    for reference, message in (
        ("hf://me/absent", "there is no me/absent on the hub, or it is private"),
        ("hf://me/vit@v9", "me/vit has no revision v9"),
        ("hf://me/foreign", r"hf://me/foreign is no pruned model: it has no vbp\.json, model\.safetensors"),
        ("hf://vit", "must be hf://USER/REPO"),
        ("hf://me/vit@", "must be hf://USER/REPO"),
    ):
        with pytest.raises(InputError, match=message):
            load_pruned(reference)
    with pytest.raises(InputError, match="must be USER/REPO, got 'a/b/c'"):
        push_to_hub(folder, "a/b/c")
    with pytest.raises(InputError, match="takes the folder of a pruned model"):
        push_to_hub(folder / "absent", "me/vit")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(InputError, match=r"nobody who may write to me/vit is logged in .*hf auth login"):
        push_to_hub(folder, "me/vit")
    (folder / WEIGHTS).write_bytes(b"half")
    requests = len(hub.requests)
    with pytest.raises(InputError, match="is truncated"):
        push_to_hub(folder, "me/vit")
    assert len(hub.requests) == requests


def test_without_network_the_error_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants: Any = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(InputError, match="hf://me/vit could not be fetched"):
        load_pruned("hf://me/vit")
    with pytest.raises(OutputError, match="me/vit could not be written"):
        push_to_hub(folder, "me/vit")


def test_the_card_says_what_was_measured(folder: Path) -> None:
    artifact = read_artifact(folder)
    text = model_card(artifact, "me/small-vit", base_model="google/vit", license="mit", dataset="imagenet-1k")
    data = huggingface_hub.ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("vbp-pruning", "image-classification", "mit")
    assert data.base_model == "google/vit"
    assert [(result.metric_name, result.metric_value, result.dataset_name) for result in data.eval_results] == [
        ("Top-1 accuracy", 71.25, "imagenet-1k")
    ]
    assert "77 of 128 hidden MLP channels are left" in text
    assert "| top1 | 71.25 |" in text
    assert "|  | top1 | macs | images |" in text
    assert "| dense | 72.50 ± 1.75 | 1,260,000 | 650 |\n| pruned | 70.00 |  |  |" in text
    assert 'vbp.load_pruned("hf://me/small-vit")' in text
    assert "note" not in text
    for name, (kept, total) in artifact.plans[0].widths.items():
        assert f"| `{name}` | {kept} | {total} |" in text


def test_the_card_of_a_model_of_which_little_is_known() -> None:
    state = nn.Linear(2, 2).state_dict()
    text = model_card(PrunedArtifact((), state), "me/own")
    data = huggingface_hub.ModelCard(text).data
    assert data.eval_results is None
    assert data.license is None
    assert "Measured" not in text
    assert "A model of its author's own" in text


def test_a_link_is_not_published(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """Kin to reports of uploads that held a file from elsewhere, such as a key: a link looks like the file itself."""
    (tmp_path / "secret").write_text("key")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"got a link: README\.md"):
        push_to_hub(folder, "me/vit")
    (folder / "README.md").unlink()
    digest = json.loads((folder / "vbp.json").read_text())["weights"]["sha256"]
    (folder / f".model.safetensors.{digest[:16]}").symlink_to(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"got a link: \.model\.safetensors"):
        push_to_hub(folder, "me/vit")
    assert hub.requests == []
