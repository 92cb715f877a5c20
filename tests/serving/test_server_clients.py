"""mode=serve among clients that stall, break off, flood, or come from another site: everybody else is served."""

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
from test_server import SERVED, client, encoded, half_bright

from semseg.config.schema import ServeConfig
from semseg.serving import connections, server
from semseg.serving.connections import client_limit, max_connections
from semseg.serving.server import RequestGate, build_app, listen, run_server

pytestmark = pytest.mark.reliability

START = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
FORM = START + encoded(half_bright()) + b"\r\n--x--\r\n"
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"


class Running(NamedTuple):
    """A server in a thread of this process."""

    port: int

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def post(self, _: int = 0) -> int:
        """The status of a good request; 0 if the connection was refused or closed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("POST", "/predict", FORM, {"Content-Type": "multipart/form-data; boundary=x"})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        except (ConnectionError, http.client.RemoteDisconnected):
            return 0
        finally:
            connection.close()

    def stalled(self, stack: ExitStack, count: int, start: bytes) -> list[socket.socket]:
        """Connections that send `start` and nothing more."""
        opened = [stack.enter_context(self.connect()) for _ in range(count)]
        for one in opened:
            one.sendall(start)
        return opened


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
            yield Running(listener.getsockname()[1])
        finally:
            servers[0].should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed a connection, after what it has sent is read."""
    try:
        while connection.recv(2**16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


# ---- G11: stalled uploads


@pytest.mark.parametrize("count", [4, 8])
def test_g11_uploads_that_stall_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(server, "STALE_SECONDS", 0.1)
    with running(monkeypatch) as here, ExitStack() as stack:
        here.stalled(stack, count, HEAD + b"Content-Length: 1000\r\n\r\n" + START)
        time.sleep(0.3)
        began = time.monotonic()
        assert [here.post() for _ in range(3)] == [200] * 3  # also when they take all 8 places of the queue
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("drip", [b"", b"y", b"1\r\ny\r\n"])  # nothing, byte by byte, chunk by chunk
def test_g11_an_upload_that_comes_too_slowly_is_ended(monkeypatch: pytest.MonkeyPatch, drip: bytes) -> None:
    monkeypatch.setattr(server, "STALL_SECONDS", 0.4)
    start = b"Content-Length: 1000\r\n\r\n" + START
    if b"\r" in drip:
        start = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(START), START)
    with running(monkeypatch) as here, here.connect() as connection:
        connection.sendall(HEAD + start)
        connection.settimeout(0.1)
        answer, began = b"", time.monotonic()
        while not answer and time.monotonic() - began < 10:
            connection.sendall(drip)
            try:
                answer = connection.recv(4096)
            except TimeoutError:
                continue
        connection.settimeout(5)
        while b"}" not in answer:
            answer += connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"it was too slow" in answer
        assert here.post() == HTTPStatus.OK


def test_g11_an_upload_that_keeps_the_pace_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(server, "MIN_BYTES_PER_SECOND", len(FORM) / 4)
    with running(monkeypatch) as here, here.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(FORM))
        for part in range(10):  # in one second, twice the time that a stalled one has
            connection.sendall(FORM[part * len(FORM) // 10 : (part + 1) * len(FORM) // 10])
            time.sleep(0.1)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_g11_a_refused_body_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CLIENT_SECONDS", 0.5)
    with running(monkeypatch) as here, here.connect() as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 404 ")
        with pytest.raises(ConnectionError):
            for _ in range(100):
                connection.sendall(b"1\r\ny\r\n")
                time.sleep(0.05)


# ---- G12: connections


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n", HEAD])
def test_g12_a_request_whose_header_is_not_complete_is_dropped(monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(connections, "CLIENT_SECONDS", 0.5)
    with running(monkeypatch) as here, here.connect() as silent, here.connect() as dripping:
        for one in (silent, dripping):
            one.sendall(start)
        with pytest.raises(ConnectionError):
            for _ in range(100):
                dripping.sendall(b"x")
                time.sleep(0.05)
        assert is_closed(silent)


def test_g12_half_open_connections_give_way_to_good_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 20)
    monkeypatch.setattr(connections, "STALE_SECONDS", 0.2)
    with running(monkeypatch) as here, ExitStack() as stack:
        opened = here.stalled(stack, 20, b"GET / HT")
        assert here.post() == 0  # no place, and nobody has kept the server waiting for long
        time.sleep(0.5)
        assert [here.post() for _ in range(5)] == [200] * 5
        opened[0].settimeout(1)
        assert is_closed(opened[0])  # the oldest gave way
        opened[-1].sendall(b"TP/1.1\r\nHost: localhost\r\n\r\n")
        assert opened[-1].recv(4096).startswith(b"HTTP/1.1 200 ")  # the newest is complete and served


def test_g12_a_client_that_does_not_read_its_answer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CLIENT_SECONDS", 0.5)
    with running(monkeypatch) as here, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", here.port))
        with pytest.raises(ConnectionError):
            for _ in range(200):  # pipelined, 13 KB each
                connection.sendall(b"GET /serve.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
                time.sleep(0.05)
        assert here.post() == HTTPStatus.OK


def test_g12_a_long_header_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch) as here, here.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 40_000)
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_g12_connections_fit_into_the_descriptors_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connections.resource is not None
    for descriptors, expected in ((256, 96), (65, 1), (10**6, 512), (connections.resource.RLIM_INFINITY, 512)):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _, soft=descriptors: (soft, soft))
        assert max_connections() == expected


def test_g12_one_client_of_another_machine_gets_half_of_the_places() -> None:
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
                except HTTPException as refusal:
                    assert refusal.status_code == HTTPStatus.SERVICE_UNAVAILABLE
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
def test_g13_a_form_of_another_site_is_refused(headers: dict[str, str]) -> None:
    def predict(image: NDArray[np.uint8]) -> NDArray[np.int64]:
        raise AssertionError("the network ran")

    asked = client(SERVED._replace(predict=predict))
    answer = asked.post("/predict", files={"image": encoded(half_bright())}, headers=headers)
    assert (answer.status_code, answer.json()) == (403, {"detail": "Pages of other sites may not use this server."})
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


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


def test_g14_the_network_does_not_run_for_clients_that_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
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
        waiting = thread.submit(here.post)
        time.sleep(0.3)
        for one in leaving:  # one of them while the network runs
            one.close()
        time.sleep(0.3)
        may_end.set()
        assert waiting.result() == HTTPStatus.OK
        assert len(num_runs) == 2  # for the first, who left meanwhile, and for the one that waited


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
def test_g14_malformed_requests_are_refused_and_print_nothing(
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
    with ExitStack() as stack:
        with running(monkeypatch) as here:
            here.stalled(stack, 2, HEAD + b"Content-Length: 1000\r\n\r\n" + START)
            here.stalled(stack, 2, b"GET")
            assert here.post() == HTTPStatus.OK
            began = time.monotonic()
        assert time.monotonic() - began < 3
    assert "".join(capsys.readouterr()) == ""


def test_g14_many_good_requests_are_all_served(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch, queue=40) as here, ThreadPoolExecutor(40) as threads:
        assert set(threads.map(here.post, range(200))) == {200}


def test_g14_uploads_wait_on_disk_and_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("starlette.formparsers.SpooledTemporaryFile", no_room)
    answer = client().post("/predict", files={"image": encoded(half_bright())})
    assert answer.status_code == 503
    assert answer.json()["detail"] == "The upload cannot be stored (No space left on device): try again later."
