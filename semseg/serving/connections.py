"""Limit the connections of mode=serve: their number, and how long each may wait for its client.

uvicorn closes a connection that stays idle after a response. It waits without limit for the header of a request, for
the rest of a rejected body, and for a client that does not read its response; this module adds those deadlines. The
deadline of an upload is in server.py.
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

CLIENT_SECONDS = 10.0  # for a request's header, for the rest of a rejected body, and for a response to be read
MIN_BYTES_PER_SECOND = 2**15  # rate of an upload and of a response: slower clients are dropped
STALE_SECONDS = 1.0  # at the limit of connections, a client that has kept the server waiting longer is dropped first
MAX_CONNECTIONS = 512
RESERVED_DESCRIPTORS = 64  # file descriptors for everything but connections and their uploads


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection, with deadlines for the client and limits on connections."""

    _deadline: asyncio.TimerHandle | None = None
    _num_unsent = 0  # bytes of responses that the client had not read when the deadline was set
    waiting_since = math.inf  # time of the event loop; inf while the client waits for the server

    # ---- events, from the transport and from uvicorn

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._wait_for_client()
        limit = max_connections()
        connections = [each for each in self.connections if isinstance(each, Connection)]
        enforce_limit([each for each in connections if each.host == self.host], client_limit(limit, self.host))
        enforce_limit([each for each in connections if each in self.connections], limit)

    def handle_events(self) -> None:
        try:
            super().handle_events()
        except h11.LocalProtocolError:  # invalid data after a complete response cannot be answered
            self.drop()
        if not self._is_busy():
            return
        if self.transport.is_closing():  # rejected during a request, whose own response can no longer be sent
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        elif not self.transport.get_write_buffer_size():
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._wait_for_client()
        super().on_response_complete()

    def shutdown(self) -> None:
        if self._is_busy() and self.cycle.more_body:
            self.drop()  # do not wait for an incomplete upload
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    # ---- the deadline

    @property
    def host(self) -> str:
        """The client's address; empty if it is unknown."""
        return self.client[0] if self.client else ""

    def drop(self) -> None:
        """Close the connection at once, without sending the rest of a response."""
        self.connections.discard(self)
        self.transport.abort()

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_client(self) -> None:
        self._stop_waiting()
        self.waiting_since = self.loop.time()
        self._num_unsent = self.transport.get_write_buffer_size()
        self._deadline = self.loop.call_later(CLIENT_SECONDS, self._check_client)

    def _stop_waiting(self) -> None:
        self.waiting_since = math.inf
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _check_client(self) -> None:
        num_unsent = self.transport.get_write_buffer_size()
        if num_unsent and self._num_unsent - num_unsent >= CLIENT_SECONDS * MIN_BYTES_PER_SECOND:
            self._wait_for_client()  # the client is reading a long response
        elif num_unsent or not self._is_busy():
            self.drop()


def enforce_limit(connections: list[Connection], limit: int) -> None:
    """Drop a connection if there are more than `limit`: the stale one that waits longest, or else the newest."""
    if len(connections) <= limit:
        return
    now = connections[0].loop.time()
    oldest = min(connections, key=lambda each: each.waiting_since)
    newest = max((each for each in connections if each.waiting_since <= now), key=lambda each: each.waiting_since)
    (oldest if now - oldest.waiting_since > STALE_SECONDS else newest).drop()


def max_connections() -> int:
    """Return how many connections the file descriptors allow: each may need a second one for its upload.

    >>> 1 <= max_connections() <= MAX_CONNECTIONS
    True
    """
    if resource is None:
        return MAX_CONNECTIONS
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, (descriptors - RESERVED_DESCRIPTORS) // 2))


def client_limit(limit: int, host: str) -> int:
    """Return how much of `limit` one client may use: half, or all for clients on this machine, such as proxies.

    >>> client_limit(64, "203.0.113.9"), client_limit(64, "127.0.0.1")
    (32, 64)
    """
    try:
        is_remote = not ipaddress.ip_address(host).is_loopback
    except ValueError:  # a socket file has no address
        is_remote = False
    return max(1, limit // 2) if is_remote else limit
