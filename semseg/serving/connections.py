"""The connections of mode=serve: how many there may be, and how long each may wait for its client.

uvicorn closes a connection that stays idle after an answer. It waits without limit for the header of a request, for the
rest of a body that was refused, and for a client that does not read its answer; those deadlines are here. The deadline
of an upload is in server.py, where it is read.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None

CLIENT_SECONDS = 10.0  # for a request's header, for the rest of a refused body, and for an answer to be read
MIN_BYTES_PER_SECOND = 2**15  # of an upload, and of an answer: slower clients are dropped
STALE_SECONDS = 1.0  # a client that has kept the server waiting longer gives way to others when all places are taken
MAX_CONNECTIONS = 512
RESERVED_DESCRIPTORS = 64  # for everything but connections and their uploads


class Connection(H11Protocol):
    """HTTP/1.1 as uvicorn implements it, with deadlines for the client and limits on connections."""

    _deadline: asyncio.TimerHandle | None = None
    _unsent = 0  # bytes of answers that the client had not taken when the deadline was set
    waiting_since = math.inf  # time of the event loop; inf while the client waits for the server

    # ---- events, from the transport and from uvicorn

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._wait_for_client()
        limit = max_connections()
        peers = [one for one in self.connections if isinstance(one, Connection) and one.host == self.host]
        make_room(peers, share_of_client(limit, self.host))
        make_room([one for one in self.connections if isinstance(one, Connection)], limit)

    def handle_events(self) -> None:
        try:
            super().handle_events()
        except h11.LocalProtocolError:  # nonsense after an answer is complete cannot be answered
            self.drop()
        if not self._is_busy():
            return
        if self.transport.is_closing():  # refused in the middle of a request, whose own answer can no longer be sent
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        elif not self.transport.get_write_buffer_size():
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._wait_for_client()
        super().on_response_complete()

    def shutdown(self) -> None:
        if self._is_busy() and self.cycle.more_body:
            self.drop()  # an upload that is not complete is not waited for
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    # ---- the deadline

    @property
    def host(self) -> str:
        """The client's address; empty if it is not known."""
        return self.client[0] if self.client else ""

    def drop(self) -> None:
        """Close the connection at once, whatever is still unsent."""
        self.connections.discard(self)
        self.transport.abort()

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_client(self) -> None:
        self._stop_waiting()
        self.waiting_since = self.loop.time()
        self._unsent = self.transport.get_write_buffer_size()
        self._deadline = self.loop.call_later(CLIENT_SECONDS, self._check_client)

    def _stop_waiting(self) -> None:
        self.waiting_since = math.inf
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _check_client(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent and self._unsent - unsent >= CLIENT_SECONDS * MIN_BYTES_PER_SECOND:
            self._wait_for_client()  # it reads a long answer
        elif unsent or not self._is_busy():
            self.drop()


def make_room(connections: list[Connection], limit: int) -> None:
    """Drop a connection if there are more than `limit`: the one that waits longest for its client, else the newest."""
    if len(connections) <= limit:
        return
    now = connections[0].loop.time()
    oldest = min(connections, key=lambda one: one.waiting_since)
    newest = max((one for one in connections if one.waiting_since <= now), key=lambda one: one.waiting_since)
    (oldest if now - oldest.waiting_since > STALE_SECONDS else newest).drop()


def max_connections() -> int:
    """How many connections fit into the descriptors of this process: each may need a second one for its upload.

    >>> 1 <= max_connections() <= MAX_CONNECTIONS
    True
    """
    if resource is None:
        return MAX_CONNECTIONS
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, (descriptors - RESERVED_DESCRIPTORS) // 2))


def share_of_client(limit: int, host: str) -> int:
    """How much of `limit` one client may take: half; all from this machine, where tunnels and proxies are clients.

    >>> share_of_client(64, "203.0.113.9"), share_of_client(64, "127.0.0.1")
    (32, 64)
    """
    try:
        is_remote = not ipaddress.ip_address(host).is_loopback
    except ValueError:  # no address, as of a socket file
        is_remote = False
    return max(1, limit // 2) if is_remote else limit
