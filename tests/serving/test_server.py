"""The page and the endpoint of mode=serve: by themselves, as a process of the real command line, and in a browser."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from helpers.browser import needs_browser, run_in_browser
from helpers.command_line import RUN, run
from helpers.fork_server import ForkedProgram
from helpers.in_process import configured
from helpers.memory import resident
from semseg.checkpoints.format import FORMAT_KEY, describe_network
from semseg.checkpoints.network import build_network
from semseg.config.schema import ServeConfig, config_to_plain
from semseg.data.classes import ClassTable
from semseg.data.label_map import LabelMap
from semseg.errors import ConfigError
from semseg.modes import serve
from semseg.serving import server
from semseg.serving.server import (
    SECURITY_HEADERS,
    ServedNetwork,
    build_app,
    is_loopback,
    listen,
    read_upload,
    socket_url,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

CLASSES = ClassTable(("dark", "bright", "<b>other"), ((0, 0, 255), (255, 0, 0), (0, 255, 0)))
SERVED = ServedNetwork("a network", CLASSES, LabelMap(3), lambda image: (image[..., 0] >= 128).astype(np.int64))
SMALL = ServeConfig(max_upload_mb=0.05, max_pixels=10_000)


def client(served: ServedNetwork = SERVED, config: ServeConfig = SMALL) -> TestClient:
    return TestClient(build_app(served, config, ["testserver"]))


def encoded(pixels: NDArray[np.uint8], kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def mask_of(answer: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer["mask"])))


def half_bright() -> NDArray[np.uint8]:
    """4 x 8 pixels, the right quarter white."""
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 6:] = 255
    return image


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def bomb() -> bytes:
    """A PNG of a few bytes whose header announces 50000 x 50000 pixels."""
    png = encoded(half_bright())
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


# ---- the response


def test_the_response_has_the_size_the_classes_and_a_mask_of_their_ids() -> None:
    answer = client().post("/predict", files={"image": ("a.png", encoded(half_bright()))}).json()
    assert (answer["height"], answer["width"]) == (4, 8)
    assert answer["classes"] == [
        {"id": 1, "name": "dark", "colour": "#0000ff", "share": 0.75},
        {"id": 2, "name": "bright", "colour": "#ff0000", "share": 0.25},
    ]
    mask = mask_of(answer)
    assert mask.mode == "L" and np.asarray(mask).tolist() == [[1] * 6 + [2] * 2] * 4


def test_ids_above_255_give_a_mask_of_16_bits() -> None:
    served = SERVED._replace(label_map=LabelMap(3, first_id=300))
    answer = client(served).post("/predict", files={"image": encoded(half_bright())}).json()
    assert np.unique(np.asarray(mask_of(answer))).tolist() == [300, 301]


def test_a_photo_is_predicted_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right by a quarter when shown
    photo = encoded(np.repeat(np.repeat(half_bright(), 8, 0), 8, 1), "JPEG", exif=exif)
    answer = client().post("/predict", files={"image": photo}).json()
    assert (answer["height"], answer["width"]) == (64, 32)
    assert np.asarray(mask_of(answer))[:, 0].tolist() == [1] * 48 + [2] * 16


def test_the_network_is_described_with_all_its_classes_and_the_limits() -> None:
    answer = client().get("/network").json()
    assert answer["name"] == "a network"
    assert [one["id"] for one in answer["classes"]] == [1, 2, 3]
    assert answer["classes"][2]["name"] == "<b>other"
    assert (answer["max_upload_bytes"], answer["max_pixels"]) == (52428, 10_000)


def test_the_openapi_description_names_the_form_and_no_page_loads_it_from_elsewhere() -> None:
    with client() as asking:
        form = asking.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]
        assert list(form["multipart/form-data"]["schema"]["properties"]) == ["image"]
        assert asking.get("/docs").status_code == asking.get("/redoc").status_code == 404


# ---- errors


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("upload", "status", "part"),
    [
        (b"", 400, "a.jpg: "),
        (b"<html>not an image</html>", 400, "a.jpg: "),
        (encoded(noise(40, 40), "JPEG")[:900], 400, "truncated"),
        (encoded(noise(40, 40))[:900], 400, "PNG"),
        (bomb(), 400, "50000 x 50000"),
        (encoded(np.zeros((101, 100, 3), np.uint8)), 400, "serve.max_pixels=10000"),
        (bytes(60_000), 413, "serve.max_upload_mb"),
    ],
    ids=["empty", "html", "truncated JPEG", "truncated PNG", "bomb", "too many pixels", "too many bytes"],
)
def test_g8_a_bad_upload_is_rejected_in_one_sentence(upload: bytes, status: int, part: str) -> None:
    answer = client().post("/predict", files={"image": ("a.jpg", upload)})
    assert answer.status_code == status
    assert part in answer.json()["detail"] and "\n" not in answer.json()["detail"]


@pytest.mark.parametrize(
    ("content", "status", "part"),
    [
        ({"files": {"photo": b"x"}}, 422, "no file in the field 'image'"),
        ({"files": {"image": (None, "text")}}, 422, "no file in the field 'image'"),
        ({"data": {"image": "text"}}, 415, "Send a form (multipart/form-data)"),
        ({}, 415, "Send a form (multipart/form-data)"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "boundary"),
        ({"files": [("image", b"x"), ("image", b"x")]}, 400, "Too many files"),
    ],
)
def test_a_request_without_the_form_is_rejected_in_one_sentence(content: Any, status: int, part: str) -> None:
    answer = client().post("/predict", **content)
    assert (answer.status_code, part in answer.json()["detail"]) == (status, True), answer.json()


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_another_method_is_rejected(method: str) -> None:
    answer = client().request(method, "/predict")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert answer.json()["detail"] == f"/predict accepts POST, not {method}."


def test_a_long_file_name_is_truncated_in_the_response() -> None:
    answer = client().post("/predict", files={"image": ("x" * 5000, b"y")})
    assert len(answer.json()["detail"]) < 200


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_an_image_that_does_not_fit_into_memory_is_rejected(error: Exception) -> None:
    def predict(image: NDArray[np.uint8]) -> NDArray[np.int64]:
        raise error

    answer = client(SERVED._replace(predict=predict)).post("/predict", files={"image": encoded(half_bright())})
    assert (answer.status_code, answer.json()["detail"]) == (
        413,
        "The image does not fit into the memory of the device: send a smaller one.",
    )


def form_request(receive: Callable[[], Any]) -> Request:
    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    return Request({"type": "http", "method": "POST", "path": "/predict", "headers": headers, "app": None}, receive)


@pytest.mark.reliability
def test_g8_an_upload_that_never_ends_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing_more() -> Message:
        await asyncio.sleep(60)
        raise AssertionError("was waited for")

    monkeypatch.setattr(server, "UPLOAD_SECONDS", 0.05)
    with pytest.raises(HTTPException, match="not complete") as caught:
        asyncio.run(read_upload(form_request(nothing_more), 1000))
    assert caught.value.status_code == 408


@pytest.mark.reliability
def test_g8_an_upload_is_read_no_further_than_the_limit() -> None:
    given = 0

    async def endless() -> Message:
        nonlocal given
        given += 100
        start = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' if given == 100 else b""
        return {"type": "http.request", "body": start.ljust(100, b"y"), "more_body": True}

    with pytest.raises(HTTPException, match="larger than") as caught:
        asyncio.run(read_upload(form_request(endless), 1000))
    assert (caught.value.status_code, given) == (413, 1100)


# ---- the queue


def test_requests_beyond_the_queue_are_rejected_with_retry_after() -> None:
    may_continue = threading.Event()

    def predict(image: NDArray[np.uint8]) -> NDArray[np.int64]:
        assert may_continue.wait(30)
        return np.zeros(image.shape[:2], np.int64)

    config = ServeConfig(queue=2)
    with client(SERVED._replace(predict=predict), config) as asking, ThreadPoolExecutor(3) as threads:
        files = {"image": encoded(half_bright())}
        waiting = [threads.submit(asking.post, "/predict", files=files) for _ in range(3)]
        first = next(as_completed(waiting))  # whichever came in last: the others wait for the event
        rejected = first.result()
        assert rejected.status_code == 503
        assert rejected.headers["Retry-After"] == "5"
        assert rejected.json()["detail"].startswith("2 images")
        assert asking.get("/network").status_code == 200
        may_continue.set()
        assert [one.result().status_code for one in waiting if one is not first] == [200, 200]
        assert asking.post("/predict", files=files).status_code == 200


# ---- access


@pytest.mark.parametrize("address", ["/", "/serve.js", "/network", "/nothing", "/predict"])
def test_every_response_has_the_security_headers_and_no_cors(address: str) -> None:
    answer = client().get(address, headers={"Origin": "http://elsewhere.example"})
    assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    assert "unsafe" not in SECURITY_HEADERS["Content-Security-Policy"]
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_another_host_name_is_rejected() -> None:
    assert client().get("/", headers={"Host": "rebound.example"}).status_code == 400


def test_a_missing_extra_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(ValueError, match=r'^mode=serve needs uvicorn: pip install --editable "\.\[demo\]"$'):
        serve.require_demo_extra()


# ---- as a process


class Process(NamedTuple):
    """A running `python run.py mode=serve`."""

    program: ForkedProgram
    greeting: str  # its output up to the line with its address
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def post(self, image: bytes) -> tuple[int, dict[str, Any]]:
        """Status and content of the response of /predict."""
        start = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        connection.request("POST", "/predict", start + image + b"\r\n--x--\r\n", headers)
        answer = connection.getresponse()
        status, content = answer.status, json.loads(answer.read())
        connection.close()
        return status, content

    def peak_memory(self) -> float:
        """The largest resident memory so far, MB."""
        return resident(self.program.pid, "VmHWM") / 2**20


def start_server(folder: Path, *words: str) -> Process:
    command = [str(RUN), "mode=serve", "ckpt=net.ckpt", "trainer.accelerator=cpu", *words, "serve.port=0"]
    program = ForkedProgram(command, folder, os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (found := re.search(r"at http://([\d.]+):(\d+)", program.read())):
        assert program.poll() is None and time.monotonic() < deadline, program.read()
        time.sleep(0.02)
    return Process(program, program.read(), found[1], int(found[2]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `net.ckpt`, a network of three classes, and `photo.png`, 60 x 90 pixels."""
    folder = tmp_path_factory.mktemp("serve")
    words = ["data=scenes", "model/encoder=resnet18", "model.encoder.weights=none", "model/decoder=c1"]
    config = configured(*words, "eval.scales=[64]", "data.max_long_edge=128")
    torch.manual_seed(0)
    net = build_network(config.model, 3)
    entry = {FORMAT_KEY: describe_network(config_to_plain(config), CLASSES, net.convention)}
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 1, "global_step": 1} | entry, folder / "net.ckpt")
    Image.fromarray(noise(60, 90)).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[Process]:
    process = start_server(folder, "run_dir=served", "serve.max_upload_mb=2")
    yield process
    process.program.send_signal(signal.SIGTERM)
    process.program.wait(60)


@pytest.mark.slow
def test_fifty_requests_at_once_all_succeed_in_the_memory_of_a_few(page: Process) -> None:
    photo = encoded(noise(450, 600), "BMP")  # 0.8 MB, and cheap to decode
    for _ in range(4):
        assert page.post(photo)[0] == 200
    before = page.peak_memory()
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(page.post, [photo] * 50))
        after = page.peak_memory()
        answers += list(threads.map(page.post, [photo] * 10))
    assert [status for status, _ in answers] == [200] * 60
    assert len({answer["mask"] for _, answer in answers}) == 1
    assert after - before < 60  # MB; fifty uploads are 40, fifty decoded images another 40, their logits much more
    assert page.peak_memory() - after < 25  # further requests need no more


@pytest.mark.slow
def test_the_process_responds_with_the_prediction_of_the_network(page: Process, folder: Path) -> None:
    status, answer = page.post((folder / "photo.png").read_bytes())
    ids = np.asarray(mask_of(answer))
    assert (status, ids.shape) == (200, (60, 90))
    assert sum(one["share"] for one in answer["classes"]) == pytest.approx(1)
    for one in answer["classes"]:
        assert one["share"] == pytest.approx((ids == one["id"]).mean())
    run(folder, "mode=predict", "ckpt=net.ckpt", "input=photo.png", "run_dir=predicted", "trainer.accelerator=cpu")
    assert np.array_equal(ids, np.asarray(Image.open(folder / "predicted" / "photo_ids.png")))


@pytest.mark.reliability
def test_g8_an_endless_upload_is_rejected_while_it_arrives(page: Process) -> None:
    with socket.create_connection((page.host, page.port), timeout=20) as connection:
        head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode())
        start = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        connection.sendall(b"%x\r\n%b\r\n" % (len(start), start))
        for _ in range(40):  # 64 KB each: 2.5 MB, and the limit is 2 MB
            connection.sendall(b"10000\r\n%b\r\n" % bytes(2**16))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection((page.host, page.port), timeout=20) as connection:
        announced = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n"
        connection.sendall(announced.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")  # with no byte of it sent


@pytest.mark.reliability
@pytest.mark.parametrize(
    "path",
    ["/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/web/index.html", "/serve.js/../net.ckpt",
     "/..%5c..%5cnet.ckpt", "/net.ckpt", "/server.py", "/.hydra/config.yaml", "/%00", "/static/"],
)  # fmt: skip
def test_g8_only_the_paths_of_the_page_are_served(page: Process, path: str) -> None:
    connection = http.client.HTTPConnection(page.host, page.port, timeout=20)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", f"{page.host}:{page.port}")
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (404, b'{"detail":"Not Found"}')


@pytest.mark.reliability
def test_g8_only_this_machine_reaches_the_page_by_default(page: Process) -> None:
    assert page.host == "127.0.0.1" and "without a password" not in page.greeting
    listening = Path("/proc/net/tcp").read_text()
    assert re.findall(rf"(\w+):{page.port:04X} 00000000:0000 0A", listening) == ["0100007F"]  # 127.0.0.1


def test_an_error_names_a_port_that_is_taken_and_a_foreign_host() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"serve.port={port}: cannot bind to this address \(Address already in use\)"
        ):
            listen("127.0.0.1", port)
    with pytest.raises(
        ConfigError, match=r"^serve.host=192.0.2.1 serve.port=0: cannot bind .* address of this machine"
    ):
        listen("192.0.2.1", 0)
    with pytest.raises(ConfigError, match=r"^serve.host=a..b serve.port=0: cannot bind to this address"):
        listen("a..b", 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0"])
def test_the_printed_url_is_that_of_the_socket(host: str) -> None:
    with listen(host, 0) as listener:
        assert is_loopback(listener) == (host != "0.0.0.0")
        address = urlsplit(socket_url(listener))
        socket.create_connection((str(address.hostname), address.port or 0), timeout=5).close()


@pytest.mark.slow
def test_serving_other_hosts_prints_a_warning_and_ctrl_c_stops_the_server(folder: Path) -> None:
    page = start_server(folder, "run_dir=open", "serve.host=0.0.0.0")
    assert "0.0.0.0" in page.greeting and "without a password" in page.greeting.splitlines()[0]
    assert page.post((folder / "photo.png").read_bytes())[0] == 200
    page.program.send_signal(signal.SIGINT)
    assert page.program.wait(60) == 0
    assert page.program.read() == f"{page.greeting}stopped.\n"


# ---- in a browser


def choose(page: Page, image: Path) -> None:
    """Choose an image in the page's file field and wait for its result."""
    page.set_input_files("#file", image)
    page.wait_for_function(
        "start => byId('status').textContent.startsWith(start)", arg=f"{image.name}: 90 \u00d7 60 pixels"
    )


@pytest.mark.slow
@needs_browser
def test_in_the_page_an_image_gets_its_overlay_legend_names_and_mask(page: Process, folder: Path) -> None:
    _, answer = page.post((folder / "photo.png").read_bytes())
    ids, names = np.asarray(mask_of(answer)), {one["id"]: one["name"] for one in answer["classes"]}
    positions = [(0.5, 0.5), (0.1, 0.9)]  # fractions of width and height

    def work(tab: Page) -> dict[str, Any]:
        tab.goto(page.url)
        assert tab.locator("#result").is_hidden()
        choose(tab, folder / "photo.png")
        pixels = tab.evaluate("[...byId('overlay').getContext('2d').getImageData(0, 0, 90, 60).data]")
        legend = [row.split() for row in tab.locator("#legend tbody tr").all_inner_texts()]
        box = tab.locator("#view").bounding_box()
        assert box is not None
        named = []
        for across, down in positions:
            tab.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
            tab.locator("#tip").wait_for(state="visible")
            named.append((tab.locator("#tip").inner_text(), tab.locator("#legend .highlighted th").inner_text()))
        tab.locator("#opacity").fill("25")
        opacity = tab.evaluate("byId('overlay').style.opacity")
        with tab.expect_download() as download:
            tab.click("#download")
        download.value.save_as(folder / download.value.suggested_filename)
        return {"pixels": pixels, "legend": legend, "named": named, "opacity": opacity}

    seen = run_in_browser(work)
    overlay = np.array(seen["pixels"]).reshape(60, 90, 4)
    palette = np.vstack([np.zeros((1, 3), int), CLASSES.colours()])
    is_inside = (overlay[..., :3] == palette[ids]).all(-1)  # not darkened as a border
    assert is_inside.mean() > 0.5 and (overlay[..., 3] == 255).all()
    assert (overlay[~is_inside][:, :3].max(-1) == 89).all()  # 0.35 of 255
    assert seen["legend"] == [[one["name"], f"{100 * one['share']:.1f}"] for one in answer["classes"]]
    expected = [names[int(ids[int(down * 60), int(across * 90)])] for across, down in positions]
    assert seen["named"] == [(name, name) for name in expected]
    assert seen["opacity"] == "0.25"
    assert np.array_equal(np.asarray(Image.open(folder / "photo_ids.png")), ids)


@needs_browser
def test_the_page_requests_only_its_own_server_and_fits_a_phone(page: Process, folder: Path) -> None:
    def work(tab: Page) -> tuple[list[str], list[int]]:
        requests: list[str] = []
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.url)
        widths = [tab.evaluate("document.documentElement.scrollWidth")]
        choose(tab, folder / "photo.png")
        return requests, [*widths, tab.evaluate("document.documentElement.scrollWidth")]

    requests, widths = run_in_browser(work, width=390)
    assert f"{page.url}/predict" in requests
    assert all(url.startswith((f"{page.url}/", f"blob:{page.url}/", "about:")) for url in requests), requests
    assert widths == [390, 390]


@pytest.mark.slow
@needs_browser
def test_the_page_shows_why_an_upload_was_rejected(page: Process, folder: Path) -> None:
    (folder / "notes.png").write_text("no image")
    (folder / "large.png").write_bytes(bytes(3_000_000))
    parts = {"notes.png": "notes.png: ", "large.png": "limit of 2 MB"}

    def work(tab: Page) -> None:
        tab.goto(page.url)
        for name, part in parts.items():
            tab.set_input_files("#file", folder / name)
            tab.wait_for_function("part => byId('status').textContent.includes(part)", arg=part)
            assert tab.locator("#status").get_attribute("class") == "wrong"

    run_in_browser(work, expected_errors=("400",))
