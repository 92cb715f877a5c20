"""Tensors from the workers of a loader to the process that uses them, through memory that both have from the start.

PyTorch makes new shared memory for every tensor that a worker sends: page faults all over it and a file descriptor to
fetch, which together take a third as long as reading the image. The slots here are written to again and again; a tensor
is copied out of its slot, which is then free. They are anonymous memory: no room in /dev/shm is needed, and nothing
stays behind, however the processes end.
"""

from __future__ import annotations

import itertools
import math
import mmap
import multiprocessing
import sys
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Slot(NamedTuple):
    """Where a tensor lies that was sent."""

    exchange: int
    worker: int
    number: int
    shape: tuple[int, ...]


def start_method() -> str:
    """How workers are started: as multiprocessing.set_start_method says, else as forks where that is Python's way.

    On Linux the default of Python 3.14 and later, forkserver, counts as no choice: forks are what slots need.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    default = "forkserver" if sys.version_info >= (3, 14) else "fork"
    if sys.platform == "linux" and chosen in (None, default):
        return "fork"
    return chosen or multiprocessing.get_context().get_start_method()


def is_possible() -> bool:
    """Whether workers are forks of this process and so inherit its memory; if not, PyTorch's own way is taken."""
    return start_method() == "fork"


def why_no_workers() -> str | None:
    """What keeps this system from starting workers; None: nothing. Locks need a /dev/shm that can be written to."""
    try:
        multiprocessing.get_context(start_method()).Lock()
    except (OSError, ImportError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


class Exchange:
    """The slots of one iteration of a loader.

    Args:
        workers: number of processes.
        slots: of each worker: the tensors that it may have sent and nobody received.
        slot_bytes: the largest tensor that goes this way.

    Raises:
        OSError: if there is not so much memory.
    """

    def __init__(self, workers: int, slots: int, slot_bytes: int) -> None:
        memory = mmap.mmap(-1, workers * slots * slot_bytes)  # taken from the system when it is written to
        # An array: a tensor made in PyTorch's inference mode can be written to in that mode alone.
        self._slots = np.frombuffer(memory, np.uint8).reshape(workers, slots, slot_bytes)
        self._freed = [multiprocessing.Pipe(duplex=False) for _ in range(workers)]  # numbers of slots, to the worker
        self._number = next(_numbers)
        _exchanges[self._number] = self

    def join(self, worker: int) -> None:
        """In worker number `worker`, before it sends anything."""
        global _sender  # noqa: PLW0603 - what a process is pickled for is not told to __reduce__
        _sender = Sender(self, worker, list(range(self._slots.shape[1])))

    def put(self, tensor: Tensor, worker: int, free: list[int]) -> Slot | None:
        """Copy `tensor` to one of the `free` slots, which are brought up to date; None if it does not fit."""
        freed, _ = self._freed[worker]
        while freed.poll():
            free.append(freed.recv())
        if not free or tensor.dtype != torch.uint8 or tensor.numel() > self._slots.shape[2]:
            return None
        slot = Slot(self._number, worker, free.pop(), tuple(tensor.shape))
        np.copyto(self._content(slot), tensor.numpy())
        return slot

    def take(self, slot: Slot) -> Tensor:
        """A copy of what lies in a slot, which is given back."""
        tensor = torch.from_numpy(self._content(slot).copy())
        _, freed = self._freed[slot.worker]
        freed.send(slot.number)
        return tensor

    def _content(self, slot: Slot) -> NDArray[np.uint8]:
        return self._slots[slot.worker, slot.number, : math.prod(slot.shape)].reshape(slot.shape)


class Sender(NamedTuple):
    """What a worker knows of its exchange."""

    exchange: Exchange
    worker: int
    free: list[int]


_numbers = itertools.count()
_exchanges: WeakValueDictionary[int, Exchange] = WeakValueDictionary()
_sender: Sender | None = None


def sent(tensor: Tensor) -> Tensor | Slot:
    """What to pickle for a tensor: where it lies, if it is uint8 and a slot is free; else itself."""
    slot = None if _sender is None else _sender.exchange.put(tensor, _sender.worker, _sender.free)
    return tensor if slot is None else slot


def received(parcel: Tensor | Slot) -> Tensor:
    """The tensor that was sent. Once for each slot."""
    return _exchanges[parcel.exchange].take(parcel) if isinstance(parcel, Slot) else parcel
