"""One connection: fetch a file, or the rest of one, and say whether another attempt may do better. No torch.

A file that is not whole yet is <name>.part; <name>.part.json beside it says where its bytes come from. Lengths are
checked here, digests are not (see download.py).
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

BLOCK = 1 << 18  # bytes
PLAIN_LINE_S = 15.0  # between two lines of progress where there is no terminal
PAGE_SUFFIXES = (".htm", ".html", ".svg", ".xml")  # of files that may well begin with "<"
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # environment variables that number the processes of a run


class RefusedError(Exception):
    """This address will not give the file; another may."""


class PassingError(Exception):
    """This attempt failed; the same address may give the file, or the rest of it, a little later."""

    def __init__(self, message: str, *, wait_s: float = 0, start_over: bool = False) -> None:
        super().__init__(message)
        self.wait_s = wait_s  # at least, before the next attempt
        self.start_over = start_over  # the bytes received so far are of no use


def size_of(path: Path) -> int:
    """Bytes; 0 if there is no such file."""
    return path.stat().st_size if path.exists() else 0


class Source(NamedTuple):
    """Where the bytes of a part file come from."""

    url: str  # as `shown`
    validator: str  # ETag or date by which the server tells whether the file is still the same; empty: none
    total: int | None  # bytes of the whole file; None: not known


def source_of(part: Path) -> Path:
    """The file that holds the Source of `part`."""
    return part.with_name(f"{part.name}.json")


def resumable(part: Path, url: str) -> tuple[int, Source]:
    """How many bytes of `part` can be kept if the others come from `url`, and where they are from."""
    nothing = Source(shown(url), "", None)
    try:
        source = Source(**json.loads(source_of(part).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return 0, nothing
    size = size_of(part)
    if source.url != nothing.url or size == 0:
        return 0, nothing
    # Where all bytes are there, the last one is asked for again: the server then says whether they are still right.
    return (size if source.total is None else min(size, source.total - 1)), source


def receive(part: Path, url: str, timeout_s: float) -> bool:
    """One connection: fetch the rest of `url`, or all of it, into `part`; returns whether it was the rest.

    Raises:
        PassingError, RefusedError: if `part` is not whole afterwards.
        OSError: if `part` cannot be written.
    """
    asked, source = resumable(part, url)
    with connect(url, asked, source.validator, timeout_s) as response:
        start, total = extent(response, asked, source)
        refuse_page(response.headers.get_content_type() == "text/html", part, response)
        # The announced length is checked here: http.client would not notice a longer body.
        response.length = None
        first = read_block(response, total, start)
        if not first and not total:
            raise RefusedError("an empty file came back")
        refuse_page(start == 0 and first.lstrip().startswith(b"<"), part, response)
        with part.open("r+b" if start else "wb") as file, progress(part.stem, start, total) as advance:
            if start == 0:
                write_source(part, Source(shown(url), validator_of(response), total))
            file.seek(start)
            file.truncate()
            pour(first, response, file, total, advance)
    return start > 0


def pour(
    block: bytes, response: HTTPResponse, file: IO[bytes], total: int | None, advance: Callable[[int], None]
) -> None:
    """Write `block` and the rest of the body; `file` is open at the place where they belong.

    Raises:
        PassingError: if the whole file, `total` bytes, does not end where the body ends.
        OSError: if `file` cannot be written.
    """
    while block:
        file.write(block)
        advance(len(block))
        block = read_block(response, total, file.tell())
    if total is None:
        return
    if file.tell() < total:
        raise PassingError(f"the connection was cut after {file.tell():,} of {total:,} bytes")
    if has_more(response):
        raise PassingError(f"more came than the {total:,} bytes that were announced", start_over=True)


def write_source(part: Path, source: Source) -> None:
    """Note where the bytes of `part`, which is empty, will come from."""
    source_of(part).write_text(json.dumps(source._asdict()), encoding="utf-8")


def refuse_page(is_page: bool, part: Path, response: HTTPResponse) -> None:
    """Raises RefusedError if what comes is a web page, but `part` is the beginning of another kind of file."""
    if is_page and not part.stem.lower().endswith(PAGE_SUFFIXES):
        kind = response.headers.get_content_type()
        raise RefusedError(f"HTTP {response.status}, but a web page came back instead of the file ({kind})")


def extent(response: HTTPResponse, asked: int, source: Source) -> tuple[int, int | None]:
    """Where the body begins in the whole file, and how long the whole file is (None: its end is marked in the body).

    Raises:
        PassingError: if it is another piece than the one that begins at `asked`.
        RefusedError: if it is nothing of use.
    """
    is_chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        numbers = tuple(int(number) for number in content_range.groups()) if content_range else ()
        if len(numbers) != 2 or numbers[0] != asked or numbers[1] != (source.total or numbers[1]):
            raise PassingError("another piece of the file came back than was asked for", start_over=True)
        return asked, numbers[1]
    if response.status != http.HTTPStatus.OK:
        raise RefusedError(f"HTTP {response.status} {response.reason}")
    if response.length is None and not is_chunked:
        raise RefusedError("the server does not say how long the file is, so that a cut could not be told")
    return 0, response.length


def validator_of(response: HTTPResponse) -> str:
    """By what the server can tell whether the file is still the same; a weak ETag is no use for that (RFC 9110)."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def read_block(response: HTTPResponse, total: int | None, position: int) -> bytes:
    """The next bytes of the body as they arrive, none of them beyond `total`; empty at its end."""
    size = BLOCK if total is None else min(BLOCK, total - position)
    try:
        return response.read1(size) if size else b""
    except TimeoutError:
        raise PassingError(f"nothing more came after {position:,} bytes") from None
    except (OSError, http.client.HTTPException) as error:
        raise PassingError(f"the connection was cut after {position:,} bytes ({type(error).__name__})") from error


def has_more(response: HTTPResponse) -> bool:
    """Whether bytes follow the announced end of the body. A server that keeps the connection open sends none."""
    try:
        return bool(response.read1(1))
    except (OSError, http.client.HTTPException):
        return False


# ---- the connection


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from a protected connection to one that is not, nor to other protocols."""

    inf_msg = "redirects without end: "

    def redirect_request(  # noqa: PLR0917 - the base class's
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        is_downgrade = req.full_url.startswith("https:") and not newurl.startswith("https:")
        if is_downgrade or not is_http(newurl):
            raise RefusedError(f"HTTP {code}, a redirect to {shown(newurl)}, which is not safe to follow")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def connect(url: str, start: int, validator: str, timeout_s: float) -> HTTPResponse:
    """Ask for `url` from byte `start` on, or for all of it if it is not the file that `validator` stands for.

    Raises:
        PassingError, RefusedError: if no body comes.
    """
    if not is_http(url):
        raise RefusedError("only addresses that begin with http:// or https:// can be downloaded")
    request = urllib.request.Request(without_userinfo(url), headers={"User-Agent": "semseg"})  # noqa: S310 - just checked
    userinfo = urlsplit(url).netloc.rpartition("@")[0]
    if userinfo:  # not sent on to where a redirect leads
        token = base64.b64encode(unquote(userinfo).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    if start:
        request.add_header("Range", f"bytes={start}-")
    if start and validator:
        request.add_header("If-Range", validator)
    try:
        return urllib.request.build_opener(Redirects).open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            raise refusal(error) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise no_connection(error, timeout_s) from error


def without_userinfo(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def refusal(error: urllib.error.HTTPError) -> Exception:
    """What an HTTP status other than success means."""
    text = f"HTTP {error.code} {error.reason}".replace("\n", " ")
    if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return PassingError(text, start_over=True)
    if error.code >= 500 or error.code in (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS):
        seconds = error.headers.get("Retry-After", "")
        return PassingError(text, wait_s=float(seconds) if seconds.isdecimal() else 0)
    return RefusedError(text)


def no_connection(error: Exception, timeout_s: float) -> Exception:
    """What a failure before any answer means."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return RefusedError(f"its TLS certificate is not valid ({reason})")
    if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
        return RefusedError("there is no such host")
    if isinstance(reason, TimeoutError):
        return PassingError(f"no answer within {timeout_s:g} s")
    if isinstance(reason, OSError):
        return PassingError(f"no connection ({reason.strerror or type(reason).__name__})")
    if isinstance(reason, http.client.InvalidURL | ValueError):
        return RefusedError("this is not a valid address")
    return PassingError(f"no answer that makes sense ({type(reason).__name__})")


def is_http(url: str) -> bool:
    """Whether `url` is a complete http or https address."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


def shown(url: str) -> str:
    """`url` as it may be printed and stored: without user, password and query, which may hold secrets.

    >>> shown("https://me:secret@example.org/a.pth?token=secret")
    'https://example.org/a.pth?...'
    """
    bare = re.sub(r"(?<=//)[^/?#]*@", "", url)
    return re.sub(r"\?.*", "?...", bare)


# ---- what the user sees


def is_first_rank() -> bool:
    """Whether this process may talk: false for all but one of the processes of a run."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


@contextmanager
def progress(name: str, start: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line now and then elsewhere; gives the function to call with each number of bytes."""
    if not is_first_rank():
        yield lambda num_bytes: None
    elif not sys.stdout.isatty():
        yield PlainProgress(name, start, total).advance
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), transient=True) as bars:
            task = bars.add_task(name, total=total, completed=start)
            yield lambda num_bytes: bars.advance(task, num_bytes)


class PlainProgress:
    """A line of progress every PLAIN_LINE_S seconds."""

    def __init__(self, name: str, start: int, total: int | None) -> None:
        self.name = name
        self.position = start
        self.total = "?" if total is None else f"{total:,}"
        self.next_line = time.monotonic() + PLAIN_LINE_S

    def advance(self, num_bytes: int) -> None:
        self.position += num_bytes
        if time.monotonic() >= self.next_line:
            print(f"{self.name}: {self.position:,} of {self.total} bytes", flush=True)
            self.next_line = time.monotonic() + PLAIN_LINE_S
