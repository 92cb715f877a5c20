"""mode=serve with clients that stall, disconnect, flood it, or come from another site: all others are served."""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager
from http import HTTPStatus
from typing import NamedTuple

import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.types import Message
from test_server import SERVED, client, encoded, form_request, half_bright

from semseg.config.schema import ServeConfig
from semseg.serving import connections, server
from semseg.serving.connections import client_limit, max_connections
from semseg.serving.server import RequestGate, build_app, listen, run_server

pytestmark = pytest.mark.reliability

FOREVER = 1000.0  # seconds
START = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
FORM = START + encoded(half_bright()) + b"\r\n--x--\r\n"
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"


class Running(NamedTuple):
    """A server in a thread of this process."""

    port: int
    server: uvicorn.Server

    def wait_for_connections(self, count: int) -> None:
        """Wait until the server has `count` connections."""
        deadline = time.monotonic() + 60
        while len(self.server.server_state.connections) != count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def post(self, _: int = 0) -> int:
        """The status of a good request; 0 if the connection was closed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("POST", "/predict", FORM, {"Content-Type": "multipart/form-data; boundary=x"})
            response = connection.getresponse()
            response.read()
            return response.status
        except (ConnectionError, http.client.RemoteDisconnected):
            return 0
        finally:
            connection.close()

    def stalled(self, stack: ExitStack, count: int, start: bytes) -> list[socket.socket]:
        """Connections that send `start` and nothing more."""
        connections = [stack.enter_context(self.connect()) for _ in range(count)]
        for each in connections:
            each.sendall(start)
        return connections


@contextmanager
def running(
    monkeypatch: pytest.MonkeyPatch, predict: Callable[..., NDArray[np.integer]] = SERVED.predict, queue: int = 8
) -> Iterator[Running]:
    servers: list[uvicorn.Server] = []

    class Kept(uvicorn.Server):
        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(uvicorn, "Server", Kept)
    config = ServeConfig(port=0, queue=queue, max_upload_mb=1)
    with listen(config.host, config.port) as listener:
        app = build_app(SERVED._replace(predict=predict), config, ["*"])
        thread = threading.Thread(target=run_server, args=(app, listener))
        thread.start()
        try:
            while not servers:
                time.sleep(0.01)
            yield Running(listener.getsockname()[1], servers[0])
        finally:
            servers[0].should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def is_closed(connection: socket.socket) -> bool:
    """Whether the server closes a connection, after reading all that it sent."""
    try:
        while connection.recv(2**16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def send_until_closed(connection: socket.socket, data: bytes) -> None:
    """Send `data` again and again until the server closes the connection."""
    deadline = time.monotonic() + 60
    with pytest.raises(ConnectionError):
        while time.monotonic() < deadline:
            connection.sendall(data)
            time.sleep(0.05)


# ---- G11: stalled uploads


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 8])
def test_g11_uploads_that_stall_do_not_delay_others(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(server, "STALL_SECONDS", FOREVER)
    monkeypatch.setattr(server, "UPLOAD_SECONDS", FOREVER)
    monkeypatch.setattr(server, "STALE_SECONDS", -1.0)  # an upload counts as stale at once
    with running(monkeypatch) as here, ExitStack() as stack:
        here.stalled(stack, count, HEAD + b"Content-Length: 1000\r\n\r\n" + START)
        here.wait_for_connections(count)
        assert [here.post() for _ in range(3)] == [200] * 3  # even if they fill the queue of 8


@pytest.mark.slow
@pytest.mark.parametrize("drip", [b"", pytest.param(b"y", marks=pytest.mark.long), b"1\r\ny\r\n"])
def test_g11_an_upload_that_is_too_slow_is_ended(monkeypatch: pytest.MonkeyPatch, drip: bytes) -> None:
    """Nothing, byte by byte, chunk by chunk."""
    monkeypatch.setattr(server, "STALL_SECONDS", 0.4)
    start = b"Content-Length: 1000\r\n\r\n" + START
    if b"\r" in drip:
        start = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(START), START)
    with running(monkeypatch) as here, here.connect() as connection:
        connection.sendall(HEAD + start)
        connection.settimeout(0.1)
        response, deadline = b"", time.monotonic() + 60
        while not response and time.monotonic() < deadline:
            connection.sendall(drip)
            try:
                response = connection.recv(4096)
            except TimeoutError:
                continue
        connection.settimeout(20)
        while b"}" not in response:
            response += connection.recv(4096)
        assert response.startswith(b"HTTP/1.1 408 ") and b"too slow" in response
        assert here.post() == HTTPStatus.OK


class ManualClock(asyncio.SelectorEventLoop):
    """An event loop whose time passes when a test says so."""

    now = 0.0

    def time(self) -> float:
        return self.now


@pytest.mark.parametrize(("bytes_per_second", "is_complete"), [(110, True), (90, False)])
def test_g11_an_upload_that_keeps_the_pace_is_not_ended(
    monkeypatch: pytest.MonkeyPatch, bytes_per_second: int, is_complete: bool
) -> None:
    monkeypatch.setattr(server, "STALL_SECONDS", 2.0)
    monkeypatch.setattr(server, "MIN_BYTES_PER_SECOND", 100)
    body = START + bytes(5000) + b"\r\n--x--\r\n"

    async def upload() -> int:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ManualClock)
        num_sent = 0

        async def receive() -> Message:
            nonlocal num_sent
            loop.now += 1.0
            await asyncio.sleep(0)  # a deadline that has passed takes effect
            await asyncio.sleep(0)
            part = body[num_sent : num_sent + bytes_per_second]
            num_sent += len(part)
            return {"type": "http.request", "body": part, "more_body": num_sent < len(body)}

        received = await server.read_upload(form_request(receive), 10_000)
        return len(received.file.read())

    with asyncio.Runner(loop_factory=ManualClock) as runner:
        if is_complete:
            assert runner.run(upload()) == 5000
        else:
            with pytest.raises(HTTPException, match="too slow") as caught:
                runner.run(upload())
            assert caught.value.status_code == HTTPStatus.REQUEST_TIMEOUT


@pytest.mark.slow
def test_g11_a_rejected_body_is_not_read_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CLIENT_SECONDS", 0.5)
    with running(monkeypatch) as here, here.connect() as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 404 ")
        send_until_closed(connection, b"1\r\ny\r\n")


# ---- G12: connections


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", [pytest.param(b"", marks=pytest.mark.long), b"GET / HTTP/1.1\r\nHost: localhost\r\n", HEAD]
)
def test_g12_a_request_whose_header_is_not_complete_is_dropped(monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(connections, "CLIENT_SECONDS", 0.5)
    with running(monkeypatch) as here, here.connect() as silent, here.connect() as dripping:
        for each in (silent, dripping):
            each.sendall(start)
        send_until_closed(dripping, b"x")
        assert is_closed(silent)


def test_g12_half_open_connections_are_dropped_for_good_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 20)
    monkeypatch.setattr(connections, "CLIENT_SECONDS", FOREVER)
    monkeypatch.setattr(connections, "STALE_SECONDS", FOREVER)
    with running(monkeypatch) as here, ExitStack() as stack:
        stalled = here.stalled(stack, 20, b"GET / HT")
        here.wait_for_connections(20)
        assert here.post() == 0  # at the limit, and no connection is stale
        monkeypatch.setattr(connections, "STALE_SECONDS", 0.0)
        assert [here.post() for _ in range(5)] == [200] * 5
        assert is_closed(stalled[0])  # the oldest was dropped
        stalled[-1].sendall(b"TP/1.1\r\nHost: localhost\r\n\r\n")
        assert stalled[-1].recv(4096).startswith(b"HTTP/1.1 200 ")  # the newest is complete and served


@pytest.mark.slow
def test_g12_a_client_that_does_not_read_its_response_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CLIENT_SECONDS", 0.5)
    with running(monkeypatch) as here, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", here.port))
        send_until_closed(connection, b"GET /serve.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)  # pipelined
        assert here.post() == HTTPStatus.OK


def test_g12_a_long_header_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch) as here, here.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 40_000)
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_g12_connections_fit_into_the_descriptors_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connections.resource is not None
    for descriptors, expected in ((256, 96), (65, 1), (10**6, 512), (connections.resource.RLIM_INFINITY, 512)):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _, soft=descriptors: (soft, soft))
        assert max_connections() == expected


def test_g12_a_client_on_another_machine_may_use_half_of_the_queue() -> None:
    assert [client_limit(64, host) for host in ("203.0.113.9", "2001:db8::1", "127.0.0.1", "::1", "")] == [
        32, 32, 64, 64, 64,
    ]  # fmt: skip

    async def admitted(host: str) -> int:
        gate = RequestGate(6)
        async with AsyncExitStack() as admissions:
            await admissions.enter_async_context(gate.admit("198.51.100.1"))
            for count in range(10):
                try:
                    await admissions.enter_async_context(gate.admit(host))
                except HTTPException as error:
                    assert error.status_code == HTTPStatus.SERVICE_UNAVAILABLE
                    return count
        raise AssertionError("no limit")

    assert asyncio.run(admitted("203.0.113.9")) == 3
    assert asyncio.run(admitted("127.0.0.1")) == 5


# ---- G13: requests of other sites


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Origin": "https://elsewhere.example"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://testserver:3000"},
        {"Sec-Fetch-Site": "nonsense"},
        {"Origin": "https://elsewhere.example"},
        {"Origin": "http://testserver.elsewhere.example"},
        {"Origin": "http://testserver:3000"},
        {"Origin": "http://user@testserver"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": ""},
        {"Referer": "https://elsewhere.example/testserver"},
    ],
)
def test_g13_a_form_of_another_site_is_rejected(headers: dict[str, str]) -> None:
    def predict(image: NDArray[np.uint8]) -> NDArray[np.int64]:
        raise AssertionError("the network ran")

    caller = client(SERVED._replace(predict=predict))
    response = caller.post("/predict", files={"image": encoded(half_bright())}, headers=headers)
    assert response.status_code == HTTPStatus.FORBIDDEN and "other sites" in response.json()["detail"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "headers",
    [
        {},  # curl, Python
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://testserver"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"},
        {"Origin": "http://testserver"},
        {"Origin": "HTTP://TestServer"},
        {"Referer": "http://testserver/"},
    ],
)
def test_g13_the_page_itself_and_programs_are_served(headers: dict[str, str]) -> None:
    assert client().post("/predict", files={"image": encoded(half_bright())}, headers=headers).status_code == 200


def test_g13_a_link_of_another_site_leads_to_the_page() -> None:
    assert client().get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


# ---- G14: requests that break off, and many at once


def test_g14_the_network_does_not_run_for_clients_that_have_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    is_running, may_end, num_runs = threading.Event(), threading.Event(), []

    def predict(image: NDArray[np.uint8]) -> NDArray[np.int64]:
        num_runs.append(1)
        is_running.set()
        assert may_end.wait(20)
        return np.zeros(image.shape[:2], np.int64)

    with running(monkeypatch, predict) as here, ExitStack() as stack, ThreadPoolExecutor(1) as thread:
        request = HEAD + b"Content-Length: %d\r\n\r\n" % len(FORM) + FORM
        leaving = here.stalled(stack, 5, request)
        assert is_running.wait(20)
        here.wait_for_connections(5)
        waiting = thread.submit(here.post)
        here.wait_for_connections(6)
        for each in leaving:  # one of them while the network runs for it
            each.close()
        here.wait_for_connections(1)
        may_end.set()
        assert waiting.result() == HTTPStatus.OK
        assert len(num_runs) == 2  # for the first client, which left meanwhile, and for the one that waited


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (HEAD + b"Content-Length: 10\r\n\r\n" + FORM, b"422"),  # shorter than the form
        (HEAD + b"Content-Length: -1\r\n\r\n" + FORM, b"400"),
        (HEAD + b"Content-Length: 1e3\r\n\r\n" + FORM, b"400"),
        (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 99999999999\r\n\r\n", b"413"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", b"400"),
        (b"\x16\x03\x01 TLS", b"400"),
        (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3, b"200"),  # pipelined
    ],
)
def test_g14_malformed_requests_are_rejected_and_print_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request_bytes: bytes, status: bytes
) -> None:
    with running(monkeypatch) as here, here.connect() as connection:
        connection.sendall(request_bytes)
        assert connection.recv(4096).split()[1] == status
        connection.close()
        assert here.post() == HTTPStatus.OK
        assert "".join(capsys.readouterr()) == ""


def test_g14_uploads_that_stall_do_not_delay_the_end_of_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, name in ((server, "STALL_SECONDS"), (server, "SHUTDOWN_SECONDS"), (connections, "CLIENT_SECONDS")):
        monkeypatch.setattr(module, name, FOREVER)  # `running` waits a minute for its server to end
    with ExitStack() as stack, running(monkeypatch) as here:
        here.stalled(stack, 2, HEAD + b"Content-Length: 1000\r\n\r\n" + START)
        here.stalled(stack, 2, b"GET")
        assert here.post() == HTTPStatus.OK
    assert "".join(capsys.readouterr()) == ""


@pytest.mark.slow
def test_requests_that_wait_when_the_server_stops_are_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "SHUTDOWN_SECONDS", 1)
    started, may_end = threading.Event(), threading.Event()

    def predict(image: NDArray[np.uint8]) -> NDArray[np.int64]:
        started.set()
        assert may_end.wait(60)
        return np.zeros(image.shape[:2], np.int64)

    with ThreadPoolExecutor(3) as threads, running(monkeypatch, predict) as here:
        answers = [threads.submit(here.post) for _ in range(3)]
        assert started.wait(60)
        here.wait_for_connections(3)
        here.server.should_exit = True
        statuses = [answer.result(60) for answer in answers]
        may_end.set()
    assert statuses == [HTTPStatus.SERVICE_UNAVAILABLE] * 3
    assert "Traceback" not in "".join(capsys.readouterr())


def test_g14_many_good_requests_are_all_served(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch, queue=40) as here, ThreadPoolExecutor(40) as threads:
        assert set(threads.map(here.post, range(100))) == {200}


def test_g14_uploads_wait_on_disk_and_a_full_disk_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("starlette.formparsers.SpooledTemporaryFile", no_room)
    response = client().post("/predict", files={"image": encoded(half_bright())})
    assert response.status_code == HTTPStatus.SERVICE_UNAVAILABLE
    assert "No space left on device" in response.json()["detail"]
