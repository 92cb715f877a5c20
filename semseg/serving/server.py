"""The local web page of a network and its JSON endpoint, for mode=serve. Needs the extra semseg[demo].

An upload passes in this order: does it come from a page of another site; how large does it say it is; is there room in
the queue; its bytes, counted and timed while they come; its header; its pixels; the network. Whatever is wrong with it
is reported in one sentence and costs no more than the steps before. Uploads arrive side by side and wait on disk, so
that slow clients keep nobody waiting; one thread does all the work, so that fifty requests need no more memory than a
few.
"""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from semseg.config.schema import ServeConfig
from semseg.data.classes import ClassTable
from semseg.data.images import decode_image
from semseg.data.label_map import LabelMap
from semseg.errors import ConfigError, SemsegError
from semseg.reports.draw import Pixels, class_shares
from semseg.reports.templates import format_css_colour
from semseg.serving.connections import MIN_BYTES_PER_SECOND, STALE_SECONDS, Connection, share_of_client

FIELD = "image"  # of the form that is uploaded
UPLOAD_SECONDS = 60.0  # for one upload to arrive in full
STALL_SECONDS = 10.0  # by which an upload may lag behind MIN_BYTES_PER_SECOND
UPLOAD_IN_MEMORY = 2**16  # bytes of an upload that wait in memory; the rest waits in a temporary file
IDLE_SECONDS = 5  # for the next request on a connection
MAX_HEADER_BYTES = 2**15
RETRY_SECONDS = 5
SHUTDOWN_SECONDS = 5  # for requests under way, after Ctrl-C
NAME_LENGTH = 80  # characters of an uploaded file's name that an answer repeats
MEGABYTE = 2**20

# The page loads its own files and shows pictures that it has in memory; nothing else, from nowhere else.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
PACKAGE = Path(__file__).resolve().parents[1]
# Everything that is served besides the endpoints, by its address: read once, at the start.
FILES = {
    "/": ("serving/web/index.html", "text/html"),
    "/serve.css": ("serving/web/serve.css", "text/css"),
    "/serve.js": ("serving/web/serve.js", "text/javascript"),
    "/icon.svg": ("serving/web/icon.svg", "image/svg+xml"),
    "/page.css": ("reports/templates/page.css", "text/css"),
    "/page.js": ("reports/templates/page.js", "text/javascript"),
}
UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {FIELD: {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # they make the network do nothing
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "no image, or a broken one, or one of too many pixels"},
    403: {"description": "sent by a page of another site"},
    408: {"description": "the upload took too long"},
    413: {"description": "too many bytes, or more pixels than the device has memory for"},
    415: {"description": "not a form"},
    422: {"description": "a form without the image"},
    503: {"description": "too many requests at once, or no room for the upload on the server's disk"},
}


class Served(NamedTuple):
    """The network behind the page."""

    name: str
    classes: ClassTable
    label_map: LabelMap  # which number stands for a class in the mask
    predict: Callable[[Pixels], NDArray[np.integer]]  # (H, W, 3) uint8 RGB -> (H, W) class indices


class Upload(NamedTuple):
    """A file as it came."""

    name: str
    file: BinaryIO


class NetworkClass(BaseModel):
    """A class as the mask, the names and the colours know it."""

    id: int = Field(description="its number in the mask, as in the label files of the data set")
    name: str
    colour: str = Field(description="#rrggbb")


class NetworkAnswer(BaseModel):
    """What is served, and its limits."""

    name: str
    classes: list[NetworkClass]
    max_upload_bytes: int = Field(description="of a request")
    max_pixels: int = Field(description="of an image")


class PresentClass(NetworkClass):
    """A class that the network sees in the image."""

    share: float = Field(description="of all pixels, 0 to 1")


class PredictAnswer(BaseModel):
    """What the network sees in an image, on the grid of the image as its EXIF orientation turns it."""

    height: int = Field(description="pixels")
    width: int = Field(description="pixels")
    classes: list[PresentClass] = Field(description="those present, largest first")
    mask: str = Field(description="base64 of a PNG, one channel of 8 bits (16 where an id needs them): the class ids")


class Gate:
    """Admits `queue` requests at once, a share of them from one client, and lets one at a time use the network."""

    def __init__(self, queue: int) -> None:
        self._queue = queue
        self._inside: Counter[str] = Counter()  # requests by client
        self._arriving: dict[asyncio.Timeout, str] = {}  # deadlines of uploads that are not complete, and their clients
        self.turn = asyncio.Lock()  # first come, first served

    @asynccontextmanager
    async def place(self, client: str) -> AsyncIterator[None]:
        """Take a place in the queue; where all are taken, that of an upload that does not get ahead.

        Raises:
            HTTPException: 503 if the queue is full.
        """
        share = share_of_client(self._queue, client)
        is_room = self._inside[client] < share or self._end_slowest([client])
        if not (is_room and (self._inside.total() < self._queue or self._end_slowest([*self._inside]))):
            raise HTTPException(
                503,
                f"{self._inside.total()} images are waiting already: try again in a few seconds.",
                {"Retry-After": str(RETRY_SECONDS)},
            )
        self._inside[client] += 1
        try:
            yield
        finally:
            self._inside[client] -= 1
            self._inside += Counter()  # forgets clients that have left

    @asynccontextmanager
    async def arrival(self, client: str) -> AsyncIterator[asyncio.Timeout]:
        """The deadline of an upload that comes in; TimeoutError when it is over."""
        async with asyncio.timeout(min(STALL_SECONDS, UPLOAD_SECONDS)) as deadline:
            self._arriving[deadline] = client
            try:
                yield deadline
            finally:
                self._arriving.pop(deadline, None)

    def _end_slowest(self, clients: list[str]) -> bool:
        """End the upload that lags furthest behind, if there is one of these clients that lags behind at all."""
        ends = {deadline: deadline.when() or 0.0 for deadline, client in self._arriving.items() if client in clients}
        slowest = min(ends, key=ends.__getitem__, default=None)
        now = asyncio.get_running_loop().time()
        if slowest is None or ends[slowest] > now + STALL_SECONDS - STALE_SECONDS:
            return False
        del self._arriving[slowest]
        slowest.reschedule(now)
        return True


class SameSite:
    """Refuses what pages of other sites send, as browsers report it; programs that report nothing are served."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS and is_cross_site(Headers(scope=scope)):
            refusal = JSONResponse({"detail": "Pages of other sites may not use this server."}, 403)
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def is_cross_site(headers: Headers) -> bool:
    """Whether a browser says that a page of another origin sent the request.

    Sec-Fetch-Site is believed before Origin: a proxy that renames the host leaves it true.

    >>> is_cross_site(Headers({"host": "localhost:8000", "origin": "http://localhost:3000"}))
    True
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin", headers.get("referer"))
    if origin is None:
        return False
    host = origin.partition("://")[2].partition("/")[0]
    return host.lower() != headers.get("host", "").lower()


class WithHeaders:
    """Adds HEADERS to every answer of `app`, errors included."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)


def build_app(served: Served, config: ServeConfig, hosts: list[str]) -> ASGIApp:
    """The page at /, what it needs, and the endpoints /network and /predict.

    Args:
        hosts: names and addresses that a request may call this server by; ["*"] for any.
    """
    worker = ThreadPoolExecutor(1, "network")
    gate = Gate(config.queue)
    max_bytes = int(config.max_upload_mb * MEGABYTE)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.shutdown(wait=False, cancel_futures=True)

    # Its pages of documentation load scripts from elsewhere; /openapi.json does not.
    app = FastAPI(title="semseg", summary=served.name, docs_url=None, redoc_url=None, lifespan=lifespan)
    # Against pages of other sites that have their own name point to this machine (DNS rebinding).
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.add_middleware(SameSite)
    app.add_exception_handler(SemsegError, explain_error)
    app.add_exception_handler(torch.OutOfMemoryError, explain_memory)
    app.add_exception_handler(405, explain_method)
    for address, (file, media_type) in FILES.items():
        app.add_api_route(address, sender(PACKAGE / file, media_type), include_in_schema=False)

    @app.get("/network")
    async def network() -> NetworkAnswer:
        """The classes, their numbers and their colours; the limits."""
        described = [describe(served, index) for index in range(served.classes.num_classes)]
        return NetworkAnswer(
            name=served.name, classes=described, max_upload_bytes=max_bytes, max_pixels=config.max_pixels
        )

    @app.post("/predict", openapi_extra=UPLOAD_FORM, responses=REFUSALS)
    async def predict(request: Request) -> PredictAnswer:
        """The classes of an image (form field `image`), their shares, and the mask."""
        refuse_by_headers(request, max_bytes)
        async with gate.place(client_of(request)):
            upload = await read_upload(request, max_bytes, gate)
            with upload.file:
                async with gate.turn:
                    if await request.is_disconnected():
                        raise client_has_left()
                    loop = asyncio.get_running_loop()
                    try:
                        return await loop.run_in_executor(worker, segment, served, upload, config.max_pixels)
                    except asyncio.CancelledError:  # SHUTDOWN_SECONDS are over
                        raise HTTPException(503, "The server stops.") from None

    return WithHeaders(app)


def sender(path: Path, media_type: str) -> Callable[[], Awaitable[Response]]:
    """A route that answers with the content that `path` has now."""
    content = path.read_bytes()

    async def send() -> Response:
        return Response(content, media_type=media_type)

    return send


# ---- an upload


def refuse_by_headers(request: Request, max_bytes: int) -> None:
    """Refuse what is wrong before a byte is read: no form, or announced as too large.

    Raises:
        HTTPException: 413 or 415.
    """
    if int(request.headers.get("Content-Length", 0)) > max_bytes:
        raise too_large(max_bytes)
    if not request.headers.get("Content-Type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, f"Send a form (multipart/form-data) with the image as a file in the field {FIELD!r}.")


class UploadParser(MultiPartParser):
    """Starlette's, which keeps what is larger in a temporary file."""

    spool_max_size = UPLOAD_IN_MEMORY


async def read_upload(request: Request, max_bytes: int, gate: Gate | None = None) -> Upload:
    """The file in the form's field `image`, open at its start.

    Args:
        gate: may end the upload to make room for another.

    Raises:
        HTTPException: 408, 413, 422, 503, or 400 for a form that cannot be read.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        async with (gate or Gate(1)).arrival(client_of(request)) as deadline:

            def keep_pace(num_bytes: int) -> None:
                deadline.reschedule(began + min(UPLOAD_SECONDS, STALL_SECONDS + num_bytes / MIN_BYTES_PER_SECOND))

            counted = Request(request.scope, at_most(request.receive, max_bytes, keep_pace))
            form = await UploadParser(request.headers, counted.stream(), max_files=1, max_fields=8).parse()
    except TimeoutError:
        seconds = f"{loop.time() - began:.0f} seconds"
        raise HTTPException(408, f"The upload was not complete after {seconds}: it came too slowly.") from None
    except ClientDisconnect:
        raise client_has_left() from None
    except MultiPartException as error:
        raise HTTPException(400, error.message) from None
    except OSError as error:
        raise HTTPException(503, f"The upload cannot be kept ({error.strerror}): try again later.") from None
    file = form.get(FIELD)
    if not isinstance(file, UploadFile):
        await form.close()
        raise HTTPException(422, f"The form has no file in the field {FIELD!r}.")
    return Upload((file.filename or "upload")[:NAME_LENGTH], file.file)


def at_most(receive: Receive, max_bytes: int, report: Callable[[int], None]) -> Receive:
    """`receive`, until it has given more than `max_bytes` of a body; a body need not say how long it is.

    Args:
        report: is called with the bytes so far.

    Raises:
        HTTPException: 413, then.
    """
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > max_bytes:
            raise too_large(max_bytes)
        report(total)
        return message

    return counted


def client_of(request: Request) -> str:
    """The address that a request comes from; empty if it is not known."""
    return request.client.host if request.client else ""


def client_has_left() -> HTTPException:
    return HTTPException(400, "The client closed the connection.")


def too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"The upload is larger than {max_bytes / MEGABYTE:.3g} MB (serve.max_upload_mb).")


# ---- its answer


def segment(served: Served, upload: Upload, max_pixels: int) -> PredictAnswer:
    """Decode an upload, run the network on it, and describe what it sees.

    Raises:
        DataError: if the upload is no image, a broken one, or has more than `max_pixels`.
    """
    image = decode_image(upload.file.read(), upload.name, upright=True, max_pixels=max_pixels, key="serve.max_pixels")
    ids = served.predict(image)
    present = [
        PresentClass(share=share.share, **describe(served, share.class_index).model_dump())
        for share in class_shares(ids, served.classes)
    ]
    mask = base64.b64encode(mask_png(ids, served.label_map)).decode()
    return PredictAnswer(height=ids.shape[0], width=ids.shape[1], classes=present, mask=mask)


def describe(served: Served, index: int) -> NetworkClass:
    """The class of this index."""
    return NetworkClass(
        id=served.label_map.class_ids[index],
        name=served.classes.names[index],
        colour=format_css_colour(served.classes.palette[index]),
    )


def mask_png(ids: NDArray[np.integer], label_map: LabelMap) -> bytes:
    """Class indices (H, W) as a PNG file of the ids that the label files of the data set have."""
    raw = label_map.to_raw(ids)
    stream = io.BytesIO()
    Image.fromarray(raw.astype(np.uint8) if raw.max(initial=0) < 256 else raw).save(stream, "PNG")
    return stream.getvalue()


async def explain_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 400)


async def explain_memory(request: Request, error: Exception) -> Response:
    torch.cuda.empty_cache()
    return JSONResponse({"detail": "The image does not fit into the memory of the device: send a smaller one."}, 413)


async def explain_method(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "another method")
    return JSONResponse({"detail": f"{request.url.path} takes {allowed}, not {request.method}."}, 405, error.headers)


# ---- the door


def listen(config: ServeConfig) -> socket.socket:
    """A socket at serve.host and serve.port that connections can already wait at.

    Raises:
        ConfigError: if there is no such address here, or the port is taken or not for everyone.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise ConfigError(
            f"serve.host={config.host} serve.port={config.port}: cannot be listened at ({reason}). Set serve.host to "
            "an address of this machine, and serve.port to one that is free (0: any)."
        ) from error


def is_loopback(door: socket.socket) -> bool:
    """Whether only this machine reaches the socket."""
    return ipaddress.ip_address(door.getsockname()[0]).is_loopback


def address_of(door: socket.socket) -> str:
    """Where a browser finds the socket.

    >>> address_of(socket.create_server(("127.0.0.1", 0))).startswith("http://127.0.0.1:")
    True
    """
    host, port = door.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(app: ASGIApp, door: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM, and let requests under way finish for a few seconds.

    Raises:
        KeyboardInterrupt: after Ctrl-C, where Python's own handler is installed.
    """
    options = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=IDLE_SECONDS,
        log_level="error",  # what clients do wrong is answered to them
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    uvicorn.Server(options).run(sockets=[door])
