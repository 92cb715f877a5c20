"""Reads what workers send without waiting for ever for one that was stopped in the middle of it.

A DataLoader waits for the beginning of an item with a time limit. It reads the rest without one, and so it fetches the
memory of the tensors, which PyTorch does not send: the worker hands out a file descriptor for it on request, over a
socket. Here, both ask every WAIT_S seconds whether to wait any longer.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from multiprocessing import process, reduction, resource_sharer
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

WAIT_S = 0.5

# In threads that read ahead it is not set; there, others limit the time.
_check: ContextVar[Callable[[], None] | None] = ContextVar("_check", default=None)


@contextmanager
def checking_while_waiting(check: Callable[[], None]) -> Iterator[None]:
    """Inside, `check` is called each time that nothing has come for WAIT_S seconds; it raises to end the waiting."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def read_in_time(descriptor: int, size: int) -> bytes:
    """os.read that raises what the check raises."""
    wait_for_data(descriptor)
    return os.read(descriptor, size)


def wait_for_data(descriptor: int) -> None:
    """Return when there is something to read, which may be the end; raises what the check raises."""
    check = _check.get()
    if check is None:
        return
    poll = select.poll()  # a twentieth of the time of multiprocessing.connection.wait
    poll.register(descriptor, select.POLLIN)
    while not poll.poll(1000 * WAIT_S):
        check()


def limit_reads(connection: Connection) -> None:
    """Make a connection read with `read_in_time`; one of Windows, which has no file descriptor, waits without limit."""
    if not hasattr(connection, "_recv"):
        return
    connection._recv = partial(connection._recv, read=read_in_time)  # pyright: ignore[reportAttributeAccessIssue]


class WorkerDescriptor:
    """In the process that reads: a file descriptor in a worker.

    Args:
        identity: (address, key) in the worker's resource sharer.
    """

    def __init__(self, identity: tuple[str, int]) -> None:
        self.identity = identity

    def detach(self) -> int:
        """Fetch it, as multiprocessing.resource_sharer.DupFd does; call it once."""
        address, key = self.identity
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address)
            connection = Connection(client.detach())
        limit_reads(connection)
        with connection:
            secret = process.current_process().authkey
            answer_challenge(connection, secret)
            deliver_challenge(connection, secret)
            connection.send((key, os.getpid()))
            wait_for_data(connection.fileno())
            return reduction.recv_handle(connection)


def send_descriptors_as_ours() -> None:
    """In a worker: file descriptors arrive as WorkerDescriptor."""

    def reduce_descriptor(shared: Any) -> tuple[type[WorkerDescriptor], tuple[Any]]:
        return WorkerDescriptor, (shared._id,)

    if hasattr(resource_sharer, "DupFd"):
        reduction.ForkingPickler.register(resource_sharer.DupFd, reduce_descriptor)
