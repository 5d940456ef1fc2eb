"""A stand-in for the Hugging Face hub on this machine: what an upload and a download ask for, no more."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest


class Hub:
    """What the hub knows: repositories, the commits of each, the files of each commit."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.closed = False

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """Return the files of a branch or commit."""
        commits = self.repositories[repository]
        if revision == "main":
            return commits[-1] if commits else {}
        place = [self.digest(number) for number in range(1, len(commits) + 1)].index(revision)
        return commits[place]

    def digest(self, number: int) -> str:
        """Return the name of a commit."""
        return f"{number:040x}"


class Answers(BaseHTTPRequestHandler):
    """The few addresses of the hub that a download and a commit ask for."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    @property
    def address(self) -> str:
        """Return the address of the stand-in."""
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
        """Return the repository of an address, or answer that there is none."""
        name = "/".join(parts)
        if name in self.hub.repositories:
            return name
        self.answer(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository Not Found")
        return None

    def do_GET(self) -> None:
        """Describe a repository, list its files, or give one."""
        self.hub.requests.append(self.path)
        path, parts = self.path.partition("?")[0], self.path.partition("?")[0].strip("/").split("/")
        if path == "/api/whoami-v2":
            self.whoami()
            return
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

    def whoami(self) -> None:
        """Say whose token it is, and what it may do."""
        roles = {"hf_writer": "write", "hf_reader": "read", "hf_fine": "fineGrained"}
        role = roles.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if role is None:
            self.answer(401, b"{}", X_Error_Message="Invalid username or password.")
            return
        self.json({"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": role}}})

    def do_HEAD(self) -> None:
        """Answer without content."""
        self.do_GET()

    def do_POST(self) -> None:
        """Make a repository, say how files are to be sent, or take a commit."""
        self.hub.requests.append(self.path)
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.closed or self.headers.get("Authorization") != "Bearer hf_writer":
            self.answer(403 if self.hub.closed else 401, b"{}", X_Error_Message="Invalid username or password.")
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


@contextmanager
def served(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
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
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield known
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()
