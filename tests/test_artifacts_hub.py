"""Publish on the hub and load from it, through the hub's own client against a stand-in on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import FAMILIES
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
from vbp.artifact_files import MANIFEST, WEIGHTS


class Hub:
    """What the hub knows: repositories, the commits of each, the files of each commit."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """Give the files of a branch or commit."""
        commits = self.repositories[repository]
        if revision == "main":
            return commits[-1] if commits else {}
        place = [self.digest(number) for number in range(1, len(commits) + 1)].index(revision)
        return commits[place]

    def digest(self, number: int) -> str:
        """Give the name of a commit."""
        return f"{number:040x}"


class Answers(BaseHTTPRequestHandler):
    """The few addresses of the hub that a download and a commit ask for."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    @property
    def address(self) -> str:
        """Give the address of the stand-in."""
        return f"http://{self.headers['Host']}"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        """Send a reply."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, content: object) -> None:
        """Send JSON."""
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def repository(self, parts: list[str]) -> str | None:
        """Give the repository of an address, or answer that there is none."""
        name = "/".join(parts)
        if name in self.hub.repositories:
            return name
        self.answer(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository Not Found")
        return None

    def do_GET(self) -> None:
        """Describe a repository, list its files, or give one."""
        self.hub.requests.append(self.path)
        path, parts = self.path.partition("?")[0], self.path.partition("?")[0].strip("/").split("/")
        inside = parts[2:4] if path.startswith("/api/models/") else parts[:2]
        name = self.repository(inside)
        if name is None:
            return
        rest = parts[4:] if path.startswith("/api/models/") else parts[2:]
        commits = self.hub.repositories[name]
        revision = rest[1] if len(rest) > 1 else "main"
        known = {"main", *(self.hub.digest(number) for number in range(1, len(commits) + 1))}
        if revision not in known:
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            return
        sha = self.hub.digest(len(commits)) if revision == "main" else revision
        files = self.hub.files(name, revision) or {}
        if rest[:1] == ["resolve"]:
            content = files[rest[2]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(200, content, ETag=etag, X_Repo_Commit=sha, Accept_Ranges="bytes")
        elif rest[:1] == ["tree"]:
            self.json([
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ])  # fmt: skip
        else:
            self.json({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files], "private": False})

    def do_HEAD(self) -> None:
        """Answer without content."""
        self.do_GET()

    def do_POST(self) -> None:
        """Make a repository, say how files are to be sent, or take a commit."""
        self.hub.requests.append(self.path)
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_writer":
            self.answer(401, b"{}", X_Error_Message="Invalid username or password.")
            return
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(content)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            self.hub.repositories.setdefault(name, [])
            if asked.get("visibility") == "private" or asked.get("private"):
                self.hub.private.add(name)
            self.json({"url": f"{self.address}/{name}", "name": name, "id": name})
        elif parts == ["api", "validate-yaml"]:
            self.json({"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            self.json({"files": files})
        else:
            self.commit("/".join(parts[2:4]), content)

    def commit(self, name: str, content: bytes) -> None:
        """Take a commit."""
        lines = [json.loads(line) for line in content.decode().splitlines()]
        commits = self.hub.repositories[name]
        files = dict(commits[-1]) if commits else {}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commits.append(files)
        sha = self.hub.digest(len(commits))
        self.json({"commitUrl": f"{self.address}/{name}/commit/{sha}", "commitOid": sha, "success": True})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run the stand-in, and let the client speak to it with an empty cache."""
    known = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Answers,), {"hub": known}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    constants: Any = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    template = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield known
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give the folder of a pruned model."""
    torch.manual_seed(0)
    model = FAMILIES["hf-vit"].build()
    plan = pruned_in_place(model, FAMILIES["hf-vit"].example(2, torch.float32))
    save_pruned(
        model, tmp_path / "pruned", plans=plan,
        source=ModelSource("transformers", type(model).__name__, model.config.to_dict()),
        preprocessing=Preprocessing((32, 32), 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3),
        metrics={"top1": 71.25, "dense": {"top1": 72.5, "macs": 1260000}, "pruned": {"top1": 70.0}, "note": "text"},
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
        push_to_hub(folder / WEIGHTS, "me/vit")
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
    assert "|  | top1 | macs |" in text
    assert "| dense | 72.5 | 1,260,000 |\n| pruned | 70 |  |" in text
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
