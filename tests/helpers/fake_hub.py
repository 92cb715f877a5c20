"""A hub of networks on this machine, with the addresses and headers of the real one; and folders of its cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from helpers.local_server import serving

COMMIT, CONVERTED_COMMIT = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"
CARD = b"---\nlicense: other\nlicense_name: tiny-license\n---\n# a card\n"


def add_to_cache(cache: Path, name: str, files: dict[str, bytes], commit: str = COMMIT, revision: str = "main") -> Path:
    """Put a network into a cache folder, as the hub's library does; returns its folder."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for file, content in files.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (folder / file).symlink_to(blob)
    ref = repository / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    return folder


class FakeHub(ThreadingHTTPServer):
    """Networks by `<owner>/<name>` and revision: their files. Other answers by name: an error code of the hub."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.networks: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refusals: dict[str, tuple[int, str]] = {}  # by the name of a network, or by its file
        self.requests: dict[str, list[dict[str, Any]]] = {}  # pull requests
        self.cuts: dict[str, int] = {}  # by file: the connection ends at this byte, once
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, files: dict[str, bytes], revision: str = "main", commit: str = COMMIT) -> None:
        revisions = self.networks.setdefault(name, {})
        revisions[revision] = revisions[commit] = {"": commit.encode(), **files}

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of the test."""


class HubHandler(BaseHTTPRequestHandler):
    server: FakeHub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            name, _, rest = path.removeprefix("/api/models/").partition("/revision/")
            name = name.removesuffix("/discussions")
            if path.endswith("/discussions"):
                found = self.server.requests.get(name, [])
                return self.send_json({"count": len(found), "start": 0, "discussions": found})
            files = self.find(name, rest)
            if files is not None:
                siblings = [{"rfilename": file} for file in files if file]
                self.send_json({"id": name, "sha": files[""].decode(), "siblings": siblings, "tags": []})
            return None
        name, _, rest = path.strip("/").partition("/resolve/")
        revision, _, file = rest.rpartition("/")
        files = self.find(name, revision)
        if files is None:
            return None
        if file in self.server.refusals:
            return self.refuse(*self.server.refusals[file])
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        return self.send_file(file, files[file], files[""].decode(), with_body)

    def find(self, name: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision; None if the answer has been given."""
        if name in self.server.refusals:
            self.refuse(*self.server.refusals[name])
        elif name not in self.server.networks:
            self.refuse(404, "RepoNotFound")
        elif revision not in self.server.networks[name]:
            self.refuse(404, "RevisionNotFound")
        else:
            return self.server.networks[name][revision]
        return None

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, file: str, content: bytes, commit: str, with_body: bool) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") :].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if with_body:
            self.wfile.write(content[start : self.server.cuts.pop(file, None)])

    def log_message(self, format: str, *args: object) -> None:
        """Nothing, so that the output of a test is that of what it tests."""


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    server = FakeHub()
    with serving(server):
        yield server


def use_hub(monkeypatch: pytest.MonkeyPatch, cache: Path, address: str, *, is_offline: bool = False) -> None:
    """Let the hub's library work with this cache and this server, whatever the environment says."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    for name in ("HF_TOKEN", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
