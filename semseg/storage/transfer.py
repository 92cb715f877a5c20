"""The downloader that pooch calls: over HTTP, resuming where an earlier attempt was cut. No torch.

An incomplete file is <name>.part; <name>.part.json beside it records which file of which server its bytes belong to.
Lengths are checked here, digests in download.py.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from itertools import chain
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from semseg.storage.ranks import is_first_rank, print_once

BLOCK_BYTES = 1 << 16
MAX_DELAY_S = 60.0  # between two attempts
LINE_INTERVAL_S = 15.0  # between two lines of progress without a terminal
PAGE_SUFFIXES = (".htm", ".html", ".svg", ".xml")  # files that may begin with "<"
BODY_CODES = (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
TRANSIENT_CODES = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)  # and all from 500


class RefusedError(Exception):
    """This address does not provide the file; another one may."""


class TransientError(Exception):
    """This attempt failed; a retry may succeed, after at least `wait_s` seconds."""

    def __init__(self, message: str, wait_s: float = 0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def source_path(part: Path) -> Path:
    """The file that records where the bytes of `part` come from: address and validator (`read_validator`)."""
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
    start, validator = find_resume_point(part, url)
    with open_response(url, start, validator, timeout_s) as response:
        start, total = locate_body(response, start, part)
        blocks = read_blocks(response, start, total)
        first = next(blocks, b"")
        if not first:
            raise RefusedError("the server sent an empty file")
        refuse_web_page(response, b"" if start else first, part)
        if start == 0:
            source = {"url": hide_secrets(url), "validator": read_validator(response)}
            source_path(part).write_text(json.dumps(source), encoding="utf-8")
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.truncate()
            for block in show_progress(chain([first], blocks), part.stem, start, total):
                file.write(block)
            os.fsync(file.fileno())  # a power cut must not leave half a file under the final name


def find_resume_point(part: Path, url: str) -> tuple[int, str]:
    """The number of bytes of `part` that can be kept, and the validator of the file that they belong to."""
    try:
        source = json.loads(source_path(part).read_text(encoding="utf-8"))
        validator = source["validator"] if source["url"] == hide_secrets(url) else ""
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        validator = ""
    # Without a validator, the rest could be that of another version of the file. The last byte is requested again, so
    # that the server answers for a complete part as for any other.
    return (max(file_size(part) - 1, 0) if validator else 0), validator


def locate_body(response: requests.Response, start: int, part: Path) -> tuple[int, int | None]:
    """The position of the body in the file, and the size of the file (None: the body marks its own end).

    Raises:
        TransientError: if the server sends another range than requested; `part` is removed.
        RefusedError: if the end of the body cannot be recognised.
    """
    if response.status_code == HTTPStatus.OK:
        length = response.headers.get("Content-Length", "")
        if "chunked" in response.headers.get("Transfer-Encoding", "").lower():
            return 0, None
        if not length.isdecimal():
            raise RefusedError("the server does not announce the length of the file, so a cut would go unnoticed")
        return 0, int(length)
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    if match is None or (int(match[1]), int(match[2])) != (start, int(match[3]) - 1):
        part.unlink(missing_ok=True)
        raise TransientError("the server sent another range than requested")
    return start, int(match[3])


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
            code = response.status_code
            text = f"HTTP {code} {response.reason}".replace("\n", " ")
            if code >= HTTPStatus.INTERNAL_SERVER_ERROR or code in TRANSIENT_CODES:
                seconds = response.headers.get("Retry-After", "")
                raise TransientError(text, wait_s=float(seconds) if seconds.isdecimal() else 0)
            if code not in BODY_CODES:
                raise RefusedError(text)
            yield response


def classify_error(error: Exception, timeout_s: float) -> Exception:
    """Whether a failure before any answer is transient. Messages leave out the library's text, which has the URL."""
    cause: BaseException = error
    while (earlier := cause.__cause__ or cause.__context__) is not None:
        cause = earlier
    if isinstance(cause, ssl.SSLCertVerificationError):
        return RefusedError(f"its TLS certificate is not valid ({cause})")
    if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
        return RefusedError("there is no such host")
    if isinstance(error, requests.Timeout):
        return TransientError(f"no answer within {timeout_s:g} s")
    if isinstance(error, requests.TooManyRedirects):
        return RefusedError("too many redirects")
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return TransientError(f"no connection ({getattr(cause, 'strerror', None) or type(cause).__name__})")
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


def show_progress(blocks: Iterable[bytes], name: str, position: int, total: int | None) -> Iterator[bytes]:
    """The blocks of a file, with a bar on a terminal, or with a line now and then elsewhere."""
    is_terminal = is_first_rank() and sys.stdout.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    next_line = time.monotonic() + LINE_INTERVAL_S
    with Progress(*columns, TimeRemainingColumn(), transient=True, disable=not is_terminal) as bars:
        bar = bars.add_task(name, total=total, completed=position)
        for block in blocks:
            yield block
            position += len(block)
            bars.advance(bar, len(block))
            if not is_terminal and time.monotonic() >= next_line:
                print_once(f"{name}: {position:,} of {'?' if total is None else f'{total:,}'} bytes")
                next_line = time.monotonic() + LINE_INTERVAL_S
