"""A web server on this machine that answers as a test configures it: completely, in pieces, wrongly, or not at all."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Asked(NamedTuple):
    """One request."""

    path: str
    range: str | None
    authorization: str | None


class LocalServer(ThreadingHTTPServer):
    """Gives `files` by path, with ETag and Range, where `answers` has nothing else to say about the next request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[Asked] = []
        self.num_bytes = 0  # length of all bodies sent so far

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of the test."""


class Handler(BaseHTTPRequestHandler):
    server: LocalServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.asked.append(Asked(self.path, self.headers["Range"], self.headers["Authorization"]))
        queue = self.server.answers.get(self.path)
        answer = queue.pop(0) if queue else whole
        answer(self)

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.server.num_bytes += len(body)
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing, so that the output of a test is that of what it tests."""


Answer = Callable[[Handler], None]


@contextmanager
def local_server() -> Iterator[LocalServer]:
    server = LocalServer()
    with serving(server):
        yield server


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    """Within it, `server` answers from a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def whole(handler: Handler) -> None:
    """The file, or the requested range if the file has not changed since."""
    until(None)(handler)


def until(stop: int | None) -> Answer:
    """As `whole`, but the connection ends at byte `stop` of the file."""

    def answer(handler: Handler) -> None:
        content = handler.server.files.get(handler.path)
        if content is None:
            handler.send(404, {"Content-Length": "0"}, b"")
            return
        etag = f'"{hashlib.sha256(content).hexdigest()[:8]}"'
        piece = re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"] or "")
        start = int(piece[1]) if piece and handler.headers.get("If-Range", etag) == etag else 0
        headers = {"ETag": etag, "Content-Length": str(len(content) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.send(206 if start else 200, headers, content[start:stop])

    return answer


def status(code: int, **headers: str) -> Answer:
    """An HTTP status without a body; `_` in the name of a header becomes `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.send(code, {"Content-Length": "0", **named}, b"")


def body(content: bytes, **headers: str) -> Answer:
    """This body and these headers, with 200, whatever was asked for."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.send(200, {"Content-Length": str(len(content)), **named}, content)
