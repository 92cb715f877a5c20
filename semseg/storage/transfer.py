"""Download one file over HTTP and resume where an earlier attempt was cut. No torch.

An incomplete file is <name>.part; <name>.part.json beside it records which file of which server its bytes belong to.
Lengths are checked here, digests in download.py.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from semseg.storage.ranks import is_first_rank, print_once

BLOCK_BYTES = 1 << 16
MAX_DELAY_S = 60.0  # between two attempts
LINE_INTERVAL_S = 15.0  # between two lines of progress without a terminal
PAGE_SUFFIXES = (".htm", ".html", ".svg", ".xml")  # files that may begin with "<"
TRANSIENT_CODES = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)  # and all from 500


class RefusedError(Exception):
    """This address does not provide the file; another one may."""


class TransientError(Exception):
    """This attempt failed; a retry may succeed, after at least `wait_s` seconds."""

    def __init__(self, message: str, wait_s: float = 0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class PartSource(NamedTuple):
    """The file that the bytes of a part file belong to."""

    url: str  # without secrets
    validator: str  # ETag or date that identifies this version of the file; empty: the server gave none
    total: int | None  # bytes of the whole file; None: unknown


def source_path(part: Path) -> Path:
    """The file that records the PartSource of `part`."""
    return part.with_name(f"{part.name}.json")


def file_size(path: Path) -> int:
    """Bytes; 0 if there is no such file."""
    return path.stat().st_size if path.exists() else 0


def download_file(url: str, part: Path, *, timeout_s: float, retries: int, delay_s: float) -> None:
    """Download all of `url` into `part`, in as many connections as it takes.

    Raises:
        RefusedError: if the server refuses, or `retries` retries in a row added no byte.
        OSError: if `part` cannot be written.
    """
    furthest, failures = file_size(part), 0
    while True:
        try:
            return receive_rest(url, part, timeout_s)
        except TransientError as error:
            size = file_size(part)
            failures = 1 if size > furthest else failures + 1
            furthest = max(furthest, size)
            if failures > retries:
                raise RefusedError(f"{error} (attempt {failures}, the last)") from error
            wait_s = min(max(delay_s * 2 ** (failures - 1), error.wait_s), MAX_DELAY_S)
            print_once(f"{hide_secrets(url)}: {error}; retrying in {wait_s:g} s")
            time.sleep(wait_s)


def receive_rest(url: str, part: Path, timeout_s: float) -> None:
    """Fetch the bytes of `url` that `part` lacks, in one connection.

    Raises:
        TransientError, RefusedError: if `part` is not complete afterwards.
        OSError: if `part` cannot be written.
    """
    start, source = find_resume_point(part, url)
    with open_response(url, start, source.validator, timeout_s) as response:
        start, total = locate_body(response, start, source, part)
        blocks = read_blocks(response, start, total)
        first = next(blocks, b"")
        if not first and not start:
            raise RefusedError("the server sent an empty file")
        refuse_web_page(response, b"" if start else first, part)
        with part.open("r+b" if start else "wb") as file, show_progress(part.stem, start, total) as advance:
            if start == 0:
                source = PartSource(hide_secrets(url), read_validator(response), total)
                source_path(part).write_text(json.dumps(source._asdict()), encoding="utf-8")
            file.seek(start)
            file.truncate()
            for block in chain([first], blocks):
                file.write(block)
                advance(len(block))


def find_resume_point(part: Path, url: str) -> tuple[int, PartSource]:
    """The number of bytes of `part` that can be kept, and where they came from."""
    nothing = PartSource(hide_secrets(url), "", None)
    try:
        source = PartSource(**json.loads(source_path(part).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return 0, nothing
    size = file_size(part)
    # Without a validator, the rest could be that of another version of the file.
    if source.url != nothing.url or not source.validator or size == 0:
        return 0, nothing
    # A complete part requests its last byte again: the server then says whether the file is still the same.
    return (size if source.total is None else min(size, source.total - 1)), source


def locate_body(response: requests.Response, start: int, source: PartSource, part: Path) -> tuple[int, int | None]:
    """The position of the body in the file, and the size of the file (None: the body marks its own end).

    Raises:
        TransientError: if the server sends another range than requested; `part` is removed.
        RefusedError: if the end of the body cannot be recognised.
    """
    if response.status_code == HTTPStatus.PARTIAL_CONTENT:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        position, total = (int(match[1]), int(match[2])) if match else (-1, -1)
        if position == start and source.total in (None, total):
            return start, total
    if response.status_code in (HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
        part.unlink(missing_ok=True)
        raise TransientError("the server sent another range than requested")
    length = response.headers.get("Content-Length", "")
    if "chunked" in response.headers.get("Transfer-Encoding", "").lower():
        return 0, None
    if not length.isdecimal():
        raise RefusedError("the server does not announce the length of the file, so a cut would go unnoticed")
    return 0, int(length)


def read_validator(response: requests.Response) -> str:
    """What identifies this version of the file; a weak ETag does not (RFC 9110)."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def read_blocks(response: requests.Response, position: int, total: int | None) -> Iterator[bytes]:
    """The body as the server sent it, in blocks.

    Raises:
        TransientError: if it ends early.
    """
    try:
        # Not decoded: a server may label an archive that it stores compressed as Content-Encoding: gzip.
        for block in response.raw.stream(BLOCK_BYTES, decode_content=False):
            yield block
            position += len(block)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        size = f"{position:,}" if total is None else f"{position:,} of {total:,}"
        raise TransientError(f"the connection was cut after {size} bytes ({type(error).__name__})") from error


def refuse_web_page(response: requests.Response, beginning: bytes, part: Path) -> None:
    """Raises RefusedError if the body is a web page although `part` is another kind of file."""
    kind = response.headers.get("Content-Type", "no content type")
    is_page = kind.startswith("text/html") or beginning.lstrip().startswith(b"<")
    if is_page and not part.stem.lower().endswith(PAGE_SUFFIXES):
        raise RefusedError(f"HTTP {response.status_code}, but the server sent a web page instead of the file ({kind})")


# ---- the connection


class SafeSession(requests.Session):
    """Follows redirects to http and https only, and never from https to http."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        url = urljoin(resp.url, target or "")
        if target and (not is_http(url) or (resp.url.startswith("https:") and not url.startswith("https:"))):
            raise RefusedError(f"HTTP {resp.status_code}, an unsafe redirect to {hide_secrets(url)}")
        return target


@contextmanager
def open_response(url: str, start: int, validator: str, timeout_s: float) -> Iterator[requests.Response]:
    """Request `url` from byte `start`, or all of it if it is no longer the file that `validator` identifies.

    Raises:
        TransientError, RefusedError: if no body comes.
    """
    if not is_http(url):
        raise RefusedError("only http:// and https:// addresses can be downloaded")
    headers = {"User-Agent": "semseg", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    with SafeSession() as session:
        try:
            response = session.get(url, headers=headers, stream=True, timeout=timeout_s)
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            raise classify_error(error, timeout_s) from error
        with response:
            check_status(response)
            yield response


def check_status(response: requests.Response) -> None:
    """Raises TransientError or RefusedError unless a body, or another range, can be expected."""
    code = response.status_code
    if code in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
        return
    text = f"HTTP {code} {response.reason}".replace("\n", " ")
    if code >= HTTPStatus.INTERNAL_SERVER_ERROR or code in TRANSIENT_CODES:
        seconds = response.headers.get("Retry-After", "")
        raise TransientError(text, wait_s=float(seconds) if seconds.isdecimal() else 0)
    raise RefusedError(text)


def classify_error(error: Exception, timeout_s: float) -> Exception:
    """Whether a failure before any answer is transient. Messages leave out the library's text, which has the URL."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RefusedError(f"its TLS certificate is not valid ({cause})")
        if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
            return RefusedError("there is no such host")
    if isinstance(error, requests.Timeout):
        return TransientError(f"no answer within {timeout_s:g} s")
    if isinstance(error, requests.TooManyRedirects):
        return RefusedError("too many redirects")
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return TransientError(f"no connection ({getattr(causes[-1], 'strerror', None) or type(causes[-1]).__name__})")
    return RefusedError("this is not a valid address")


def is_http(url: str) -> bool:
    """Whether `url` is a complete http or https address."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


def hide_secrets(url: str) -> str:
    """`url` for messages and files: without user, password and query, which may be secret.

    >>> hide_secrets("https://me:secret@example.org/a.pth?token=secret")
    'https://example.org/a.pth?...'
    """
    return re.sub(r"\?.*", "?...", re.sub(r"(?<=//)[^/?#]*@", "", url))


# ---- progress


@contextmanager
def show_progress(name: str, start: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line now and then elsewhere; yields the function to call with each number of bytes."""
    if is_first_rank() and sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), transient=True) as bars:
            yield partial(bars.advance, bars.add_task(name, total=total, completed=start))
    else:
        yield DownloadLines(name, start, total).advance


class DownloadLines:
    """Prints a line of progress every LINE_INTERVAL_S seconds."""

    def __init__(self, name: str, start: int, total: int | None) -> None:
        self.name, self.position = name, start
        self.total = "?" if total is None else f"{total:,}"
        self.next_line = time.monotonic() + LINE_INTERVAL_S

    def advance(self, num_bytes: int) -> None:
        self.position += num_bytes
        if time.monotonic() >= self.next_line:
            print_once(f"{self.name}: {self.position:,} of {self.total} bytes")
            self.next_line = time.monotonic() + LINE_INTERVAL_S
