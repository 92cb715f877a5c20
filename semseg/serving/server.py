"""Serve the web page of a network and its JSON endpoint, for mode=serve. Needs the extra semseg[demo].

An upload is checked in this order: the site that sent it; its announced size; the length of the queue; its bytes, which
are counted and timed as they arrive; its image header; its pixels. Then the network predicts it. An error is reported
in one sentence, and later steps do not run. Uploads arrive in parallel and wait on disk, so that slow clients do not
delay others. One thread runs the network, so that fifty requests need no more memory than a few.
"""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import socket
import tempfile
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

from semseg.config.preprocessing import RGB
from semseg.config.schema import ServeConfig
from semseg.data.band_images import decode_bands
from semseg.data.bands import BandOptions
from semseg.data.classes import ClassTable
from semseg.data.images import decode_image
from semseg.data.label_map import LabelMap, ignore_missing
from semseg.data.raster_layout import has_geo_tags
from semseg.errors import ConfigError, DataError, OutOfMemoryError, SemsegError
from semseg.prediction.geotiff import read_whole_mask
from semseg.reports.draw import class_shares
from semseg.reports.templates import format_css_colour
from semseg.serving.connections import MIN_BYTES_PER_SECOND, STALE_SECONDS, Connection, client_limit
from semseg.system.memory import report_out_of_memory_as

# The starts of JPEG, PNG, GIF, BMP and WebP files, which all browsers show.
BROWSER_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF")
FORM_FIELD = "image"  # name of the file in the uploaded form
UPLOAD_SECONDS = 60.0  # for an upload to arrive in full
STALL_SECONDS = 10.0  # that an upload may be behind MIN_BYTES_PER_SECOND
MAX_UPLOAD_IN_MEMORY = 2**16  # bytes; larger uploads are stored in a temporary file
IDLE_SECONDS = 5  # for the next request on a connection
MAX_HEADER_BYTES = 2**15
RETRY_SECONDS = 5
SHUTDOWN_SECONDS = 5  # for requests in progress, after Ctrl-C
MAX_NAME_LENGTH = 80  # characters of an uploaded file's name in a response
MAX_PICTURE_EDGE = 1600  # pixels of the picture in a response, as of the overlay of the page
MEBIBYTE = 2**20
SEND_OTHER_BANDS = "Send an image with these bands, in one file and in this order."

# The page may load its own files and show pictures from its memory, and nothing else.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
PACKAGE_ROOT = Path(__file__).resolve().parents[1]
# The files that are served, by their path in the URL; they are read once, at the start.
STATIC_FILES = {
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
                    "required": [FORM_FIELD],
                    "properties": {FORM_FIELD: {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # do not run the network
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"description": "not an image, a broken image, or an image with too many pixels"},
    403: {"description": "sent by a page of another site"},
    408: {"description": "the upload took too long"},
    413: {"description": "too many bytes, or too many pixels for the memory of the device"},
    415: {"description": "not a form"},
    422: {"description": "a form without the image"},
    503: {"description": "too many requests at once, or the disk of the server is full"},
}


class ServedNetwork(NamedTuple):
    """The network behind the page."""

    name: str
    classes: ClassTable
    label_map: LabelMap  # maps class indices to the ids in the mask
    predict: Callable[[NDArray], NDArray[np.integer]]  # (H, W, 3) uint8 RGB, or bands -> (H, W) class indices
    bands: BandOptions | None = None  # of an upload, all in one file; None: it is 8-bit RGB
    draw: Callable[[NDArray], NDArray[np.uint8]] = lambda image: image  # what `predict` takes -> (H, W, 3) RGB


class Upload(NamedTuple):
    """An uploaded file."""

    name: str
    file: BinaryIO


class NetworkClass(BaseModel):
    """A class with its id, its name and its colour."""

    id: int = Field(description="id in the mask, as in the label files of the data set")
    name: str
    colour: str = Field(description="#rrggbb")


class NetworkResponse(BaseModel):
    """The served network and the limits of an upload."""

    name: str
    classes: list[NetworkClass]
    max_upload_bytes: int = Field(description="largest size of a request, in bytes")
    max_pixels: int = Field(description="largest size of an image, in pixels")
    bands: list[str | None] = Field(description="the bands of an image, in the order of its file; null: not used")


class PresentClass(NetworkClass):
    """A class that was predicted in the image."""

    share: float = Field(description="fraction of all pixels, 0 to 1")


class PredictResponse(BaseModel):
    """The prediction for an image, on its pixel grid after its EXIF orientation is applied."""

    height: int = Field(description="pixels")
    width: int = Field(description="pixels")
    classes: list[PresentClass] = Field(description="the classes present, the largest first")
    mask: str = Field(description="class ids as a base64 PNG, one channel of 8 bits (16 if an id is above 255)")
    picture: str | None = Field(
        description="the image as a base64 JPEG, where browsers cannot show it: TIFF, and bands; else null"
    )


class RequestGate:
    """Admits `max_requests` requests at once, some of them per client, and lets one at a time use the network."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._num_admitted: Counter[str] = Counter()  # by client
        self._uploads: dict[asyncio.Timeout, str] = {}  # deadlines of incomplete uploads, and their clients
        self.network_lock = asyncio.Lock()  # first come, first served

    @asynccontextmanager
    async def admit(self, client: str) -> AsyncIterator[None]:
        """Admit a request; if the queue is full, an upload that makes no progress is ended for it.

        Raises:
            HTTPException: 503 if the queue is full.
        """
        limit = client_limit(self._max_requests, client)
        has_room = self._num_admitted[client] < limit or self._end_slowest_upload([client])
        is_queue_open = has_room and (
            self._num_admitted.total() < self._max_requests or self._end_slowest_upload([*self._num_admitted])
        )
        if not is_queue_open:
            raise HTTPException(
                503,
                f"{self._num_admitted.total()} images are already waiting: try again in a few seconds.",
                {"Retry-After": str(RETRY_SECONDS)},
            )
        self._num_admitted[client] += 1
        try:
            yield
        finally:
            self._num_admitted[client] -= 1
            self._num_admitted += Counter()  # removes clients without requests

    @asynccontextmanager
    async def upload_deadline(self, client: str) -> AsyncIterator[asyncio.Timeout]:
        """Yield the deadline of an upload; raises TimeoutError when it has passed."""
        async with asyncio.timeout(min(STALL_SECONDS, UPLOAD_SECONDS)) as deadline:
            self._uploads[deadline] = client
            try:
                yield deadline
            finally:
                self._uploads.pop(deadline, None)

    def _end_slowest_upload(self, clients: list[str]) -> bool:
        """End the upload of these clients that is furthest behind, if one is behind at all."""
        ends = {deadline: deadline.when() or 0.0 for deadline, client in self._uploads.items() if client in clients}
        slowest = min(ends, key=ends.__getitem__, default=None)
        now = asyncio.get_running_loop().time()
        if slowest is None or ends[slowest] > now + STALL_SECONDS - STALE_SECONDS:
            return False
        del self._uploads[slowest]
        slowest.reschedule(now)
        return True


class SameSiteOnly:
    """Rejects requests that browsers send for pages of other sites; requests without that information are served."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS and is_cross_site(Headers(scope=scope)):
            rejection = JSONResponse({"detail": "Pages of other sites may not use this server."}, 403)
            await rejection(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def is_cross_site(headers: Headers) -> bool:
    """Whether a browser reports that a page of another origin sent the request.

    Sec-Fetch-Site takes precedence over Origin: it stays correct behind a proxy that renames the host.

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


class AddHeaders:
    """Adds SECURITY_HEADERS to every response of `app`, including errors."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)


def build_app(served: ServedNetwork, config: ServeConfig, hosts: list[str]) -> ASGIApp:
    """Build the app: the page at /, its files, and the endpoints /network and /predict.

    Args:
        hosts: accepted values of the Host header; ["*"] for any.
    """
    worker = ThreadPoolExecutor(1, "network")
    gate = RequestGate(config.queue)
    max_bytes = int(config.max_upload_mb * MEBIBYTE)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.shutdown(wait=False, cancel_futures=True)

    # FastAPI's documentation pages load scripts from other servers; /openapi.json does not.
    app = FastAPI(title="semseg", summary=served.name, docs_url=None, redoc_url=None, lifespan=lifespan)
    # Protects against other sites whose host name points to this machine (DNS rebinding).
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.add_middleware(SameSiteOnly)
    app.add_exception_handler(SemsegError, answer_user_error)
    app.add_exception_handler(OutOfMemoryError, answer_out_of_memory)
    app.add_exception_handler(405, answer_wrong_method)
    for address, (file, media_type) in STATIC_FILES.items():
        app.add_api_route(address, make_file_route(PACKAGE_ROOT / file, media_type), include_in_schema=False)

    @app.get("/network")
    async def network() -> NetworkResponse:
        """Return the classes with their ids and colours, and the limits."""
        classes = [describe_class(served, index) for index in range(served.classes.num_classes)]
        return NetworkResponse(
            name=served.name,
            classes=classes,
            max_upload_bytes=max_bytes,
            max_pixels=config.max_pixels,
            bands=list(RGB if served.bands is None else served.bands.files[0].names),
        )

    @app.post("/predict", openapi_extra=UPLOAD_FORM, responses=ERROR_RESPONSES)
    async def predict(request: Request) -> PredictResponse:
        """Return the classes of an image (form field `image`), their fractions of its pixels, and the mask."""
        check_headers(request, max_bytes)
        try:
            async with gate.admit(client_address(request)):
                upload = await read_upload(request, max_bytes, gate)
                with upload.file:
                    async with gate.network_lock:
                        if await request.is_disconnected():
                            raise client_left_error()
                        loop = asyncio.get_running_loop()
                        return await loop.run_in_executor(worker, predict_in_memory, served, upload, config.max_pixels)
        except asyncio.CancelledError:  # after SHUTDOWN_SECONDS, whatever the request waits for
            raise HTTPException(503, "The server is shutting down.") from None

    return AddHeaders(app)


def make_file_route(path: Path, media_type: str) -> Callable[[], Awaitable[Response]]:
    """Return a route that responds with the current content of `path`."""
    content = path.read_bytes()

    async def respond() -> Response:
        return Response(content, media_type=media_type)

    return respond


# ---- read an upload


def check_headers(request: Request, max_bytes: int) -> None:
    """Reject a request before its body is read: one that is not a form, or is announced as too large.

    Raises:
        HTTPException: 413 or 415.
    """
    if int(request.headers.get("Content-Length", 0)) > max_bytes:
        raise too_large_error(max_bytes)
    if not request.headers.get("Content-Type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(
            415, f"Send a form (multipart/form-data) with the image as a file in the field {FORM_FIELD!r}."
        )


class UploadParser(MultiPartParser):
    """Starlette's parser, which stores large uploads in a temporary file."""

    spool_max_size = MAX_UPLOAD_IN_MEMORY


async def read_upload(request: Request, max_bytes: int, gate: RequestGate | None = None) -> Upload:
    """Read the file in the form's field `image`; it is open at its start.

    Args:
        gate: may end the upload to admit another one.

    Raises:
        HTTPException: 408, 413, 422, 503, or 400 for a form that cannot be parsed.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    try:
        async with (gate or RequestGate(1)).upload_deadline(client_address(request)) as deadline:

            def extend_deadline(num_bytes: int) -> None:
                deadline.reschedule(start + min(UPLOAD_SECONDS, STALL_SECONDS + num_bytes / MIN_BYTES_PER_SECOND))

            limited = Request(request.scope, limit_body(request.receive, max_bytes, extend_deadline))
            form = await UploadParser(request.headers, limited.stream(), max_files=1, max_fields=8).parse()
    except TimeoutError:
        seconds = f"{loop.time() - start:.0f} seconds"
        raise HTTPException(408, f"The upload was not complete after {seconds}: it was too slow.") from None
    except ClientDisconnect:
        raise client_left_error() from None
    except MultiPartException as error:
        raise HTTPException(400, error.message) from None
    except OSError as error:
        raise HTTPException(503, f"The upload cannot be stored ({error.strerror}): try again later.") from None
    file = form.get(FORM_FIELD)
    if not isinstance(file, UploadFile):
        await form.close()
        raise HTTPException(422, f"The form has no file in the field {FORM_FIELD!r}.")
    return Upload((file.filename or "upload")[:MAX_NAME_LENGTH], file.file)


def limit_body(receive: Receive, max_bytes: int, report: Callable[[int], None]) -> Receive:
    """Wrap `receive`: it raises after more than `max_bytes` of a body, whose length need not be announced.

    Args:
        report: is called with the number of bytes so far.

    Raises:
        HTTPException: 413 from the wrapped function.
    """
    num_bytes = 0

    async def receive_limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise too_large_error(max_bytes)
        report(num_bytes)
        return message

    return receive_limited


def client_address(request: Request) -> str:
    """Return the address that a request comes from; empty if it is unknown."""
    return request.client.host if request.client else ""


def client_left_error() -> HTTPException:
    return HTTPException(400, "The client closed the connection.")


def too_large_error(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"The upload is larger than {max_bytes / MEBIBYTE:.3g} MB (serve.max_upload_mb).")


# ---- respond to it


def predict_in_memory(served: ServedNetwork, upload: Upload, max_pixels: int) -> PredictResponse:
    """As `predict_upload`.

    Raises:
        OutOfMemoryError: if it does not fit into memory.
    """
    with report_out_of_memory_as(lambda: f"{upload.name}: out of memory."):
        return predict_upload(served, upload, max_pixels)


def predict_upload(served: ServedNetwork, upload: Upload, max_pixels: int) -> PredictResponse:
    """Decode an upload and predict it.

    Raises:
        DataError: if the upload is not an image, is broken, or has more than `max_pixels`.
    """
    data, key = upload.file.read(), "serve.max_pixels"
    if served.bands is None:
        image = decode_image(data, upload.name, upright=True, max_pixels=max_pixels, key=key)
        is_valid = read_uploaded_mask(data, upload.name)
    else:
        read = decode_bands(data, upload.name, served.bands, max_pixels, key=key, naming=SEND_OTHER_BANDS)
        image, is_valid, *_ = read.turn_upright()
    is_shown_by_browsers = served.bands is None and data.startswith(BROWSER_STARTS)
    picture = None if is_shown_by_browsers else encode_picture(served.draw(image))
    ids = served.predict(image)
    ignore_missing(ids, is_valid)
    present = [
        PresentClass(share=share.share, **describe_class(served, share.class_index).model_dump())
        for share in class_shares(ids, served.classes)
    ]
    mask = base64.b64encode(encode_mask(ids, served.label_map)).decode()
    return PredictResponse(height=ids.shape[0], width=ids.shape[1], classes=present, mask=mask, picture=picture)


def read_uploaded_mask(data: bytes, name: str) -> NDArray[np.bool_] | None:
    """(H, W) where an uploaded picture has values, if it is a GeoTIFF; None: everywhere.

    Args:
        name: of the upload, for errors.

    Raises:
        DataError: if GDAL cannot read the mask.
    """
    if not has_geo_tags(io.BytesIO(data)):
        return None
    with tempfile.TemporaryDirectory() as folder:  # GDAL reads files
        file = Path(folder, "upload.tif")
        file.write_bytes(data)
        try:
            return read_whole_mask(file)
        except DataError as error:
            raise DataError(str(error).replace(str(file), name)) from None


def describe_class(served: ServedNetwork, index: int) -> NetworkClass:
    """Describe the class of this index."""
    return NetworkClass(
        id=served.label_map.class_ids[index],
        name=served.classes.names[index],
        colour=format_css_colour(served.classes.palette[index]),
    )


def encode_mask(ids: NDArray[np.integer], label_map: LabelMap) -> bytes:
    """Encode class indices (H, W) as a PNG of the ids in the data set's label files."""
    raw = label_map.to_raw(ids)
    stream = io.BytesIO()
    Image.fromarray(raw.astype(np.uint8) if raw.max(initial=0) < 256 else raw).save(stream, "PNG")
    return stream.getvalue()


def encode_picture(pixels: NDArray[np.uint8]) -> str:
    """Encode a picture (H, W, 3) RGB as a JPEG in base64, at most MAX_PICTURE_EDGE pixels high and wide."""
    picture, stream = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((MAX_PICTURE_EDGE, MAX_PICTURE_EDGE))
    picture.save(stream, "JPEG", quality=90)
    return base64.b64encode(stream.getvalue()).decode()


async def answer_user_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 400)


async def answer_out_of_memory(request: Request, error: Exception) -> Response:
    torch.cuda.empty_cache()
    return JSONResponse({"detail": "The image does not fit into the memory of the device: send a smaller one."}, 413)


async def answer_wrong_method(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "another method")
    detail = f"{request.url.path} accepts {allowed}, not {request.method}."
    return JSONResponse({"detail": detail}, 405, error.headers)


# ---- the socket


def listen(host: str, port: int) -> socket.socket:
    """Bind a listening socket to serve.host and serve.port; from now on it accepts connections.

    Raises:
        ConfigError: if this machine does not have the address, or the port is taken or needs privileges.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:  # the second for a..b, which is no name of a machine
        reason = str(error.strerror if isinstance(error, OSError) else error).partition(" (")[0]
        raise ConfigError(
            f"serve.host={host} serve.port={port}: cannot bind to this address ({reason}). Set "
            "serve.host to an address of this machine, and serve.port to a free port (0 chooses one)."
        ) from error


def is_loopback(listener: socket.socket) -> bool:
    """Whether the socket can be reached from this machine only."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def socket_url(listener: socket.socket) -> str:
    """Return the URL of the socket.

    >>> socket_url(socket.create_server(("127.0.0.1", 0))).startswith("http://127.0.0.1:")
    True
    """
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(app: ASGIApp, listener: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; requests in progress have a few seconds to finish.

    Raises:
        KeyboardInterrupt: after Ctrl-C, if Python's own handler is installed.
    """
    options = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=IDLE_SECONDS,
        log_level="error",  # errors of clients are in their responses
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    uvicorn.Server(options).run(sockets=[listener])
