"""Hands pixels from the workers of a loader to the process that uses them, through shared memory that is reused.

PyTorch allocates new shared memory for every tensor that a worker sends: page faults and a file descriptor per tensor,
which together take a third as long as reading the image. Slots are written again and again instead. They are anonymous
memory: they need no space in /dev/shm, and nothing remains however the processes end.

    worker process                                          process that uses the items
    --------------                                          ---------------------------
                                                            SharedSlots(...) allocates slots, then forks workers
    SharedSlots.attach_worker(number)
    write_tensor(tensor) copies it into a free slot
      `-- SlotAddress ------- queue of the DataLoader --->  read_tensor(address) copies it from the slot
    the slot is free again <- pipe of slot numbers -------    `-- slot number

`Batch` and `EvalSample` take this way when a multiprocessing queue pickles them (see the end of this file). Tensors
that do not fit, or find no free slot, are sent by PyTorch's own mechanism.
"""

from __future__ import annotations

import itertools
import math
import mmap
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg.data.batch import LABEL_TYPE, Batch, EvalSample


class SlotAddress(NamedTuple):
    """Location of a tensor that was written to a slot."""

    slots_id: int  # in the registry
    worker: int
    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8


def worker_start_method() -> str:
    """How workers are started: as multiprocessing.set_start_method says, or else by forking, where that works.

    On Linux, forkserver, the default of Python 3.14 and later, is not taken for a choice: slots need forks.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    default = "forkserver" if sys.version_info >= (3, 14) else "fork"
    if sys.platform == "linux" and chosen in (None, default):
        return "fork"
    return chosen or multiprocessing.get_context().get_start_method()


def slots_are_possible() -> bool:
    """Whether workers are forks of this process and so inherit its memory. If not, PyTorch's own mechanism is used."""
    return worker_start_method() == "fork"


def find_worker_obstacle() -> str | None:
    """What prevents this system from starting workers; None if nothing does. Locks need a writable /dev/shm."""
    try:
        multiprocessing.get_context(worker_start_method()).Lock()
    except (OSError, ImportError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


class SharedSlots:
    """The slots of one iteration of a loader.

    Args:
        num_workers: number of processes that write.
        slots_per_worker: tensors that one worker may have sent and nobody has read yet.
        slot_bytes: size of the largest tensor that fits.

    Raises:
        OSError: if there is not enough memory.
    """

    def __init__(self, num_workers: int, slots_per_worker: int, slot_bytes: int) -> None:
        # The system allocates pages when they are first written.
        memory = mmap.mmap(-1, num_workers * slots_per_worker * slot_bytes)
        # An array: a tensor that is created in PyTorch's inference mode can be written only in that mode.
        self._slots = np.frombuffer(memory, np.uint8).reshape(num_workers, slots_per_worker, slot_bytes)
        self._freed = [multiprocessing.Pipe(duplex=False) for _ in range(num_workers)]  # slot numbers, to the worker
        self._worker = 0  # in a worker: its number
        self._free: list[int] = []  # in a worker: slots that are free, as far as it knows
        self._id = _registry.add(self)

    def attach_worker(self, worker: int) -> None:
        """Make `write_tensor` in this process, which is worker number `worker`, use these slots."""
        self._worker, self._free = worker, list(range(self._slots.shape[1]))
        _registry.writer = self

    def write(self, tensor: Tensor) -> SlotAddress | None:
        """Copy a tensor into a free slot; None if it does not fit, or no slot is free."""
        freed, _ = self._freed[self._worker]
        while freed.poll():
            self._free.append(freed.recv())
        if not self._free or tensor.nbytes > self._slots.shape[2]:
            return None
        address = SlotAddress(self._id, self._worker, self._free.pop(), tuple(tensor.shape), tensor.dtype)
        np.copyto(self._content(address), tensor.numpy())
        return address

    def read(self, address: SlotAddress) -> Tensor:
        """A copy of the tensor in a slot, which is free afterwards."""
        tensor = torch.empty(address.shape, dtype=address.dtype)
        if tensor.numel():  # an empty array of NumPy may have strides of 0, of which torch makes no view
            tensor.numpy()[:] = self._content(address)
        _, freed = self._freed[address.worker]
        freed.send(address.number)
        return tensor

    def _content(self, address: SlotAddress) -> NDArray:
        num_bytes = math.prod(address.shape) * address.dtype.itemsize
        slot = self._slots[address.worker, address.number, :num_bytes]
        return slot.view(str(address.dtype).removeprefix("torch.")).reshape(address.shape)


class _Registry:
    """All slots of this process. Pickled items find theirs here: pickling passes on no context."""

    def __init__(self) -> None:
        self.writer: SharedSlots | None = None  # in a worker: the slots that it writes to
        self._ids = itertools.count()
        self._slots: WeakValueDictionary[int, SharedSlots] = WeakValueDictionary()

    def add(self, slots: SharedSlots) -> int:
        number = next(self._ids)
        self._slots[number] = slots
        return number

    def __getitem__(self, number: int) -> SharedSlots:
        return self._slots[number]


_registry = _Registry()


def write_tensor(tensor: Tensor) -> Tensor | SlotAddress:
    """Write a tensor to a slot; the tensor itself if that is not possible."""
    address = None if _registry.writer is None else _registry.writer.write(tensor)
    return tensor if address is None else address


def read_tensor(written: Tensor | SlotAddress) -> Tensor:
    """The tensor that `write_tensor` wrote. Call it once for each address."""
    return _registry[written.slots_id].read(written) if isinstance(written, SlotAddress) else written


# ---- pickling: pixels go through slots, everything else as bytes

Reduced = tuple[Callable[..., Any], tuple[Any, ...]]


def _reduce_batch(batch: Batch) -> Reduced:
    label = batch.label.cpu().to(LABEL_TYPE).numpy()  # as it was read: class indices fit
    fields = (write_tensor(batch.image), label, batch.label.dtype, batch.size.tolist(), batch.paths, batch.bad)
    return _restore_batch, fields


def _restore_batch(  # noqa: PLR0917 - the fields, as pickled
    image: Tensor | SlotAddress,
    label: NDArray[np.int16],
    label_type: torch.dtype,
    size: list[list[int]],
    paths: list[str],
    bad: tuple[str, ...],
) -> Batch:
    return Batch(read_tensor(image), torch.from_numpy(label).to(label_type), torch.tensor(size), paths, bad)


def _reduce_eval_sample(sample: EvalSample) -> Reduced:
    label = sample.label.to(LABEL_TYPE).view(torch.uint8)
    scales = [scale.flatten().view(torch.uint8) for scale in sample.scales]
    pixels = torch.cat([label.flatten(), *scales])  # one tensor, one slot
    scale_sizes = [tuple(scale.shape) for scale in sample.scales]
    pixel_type = sample.scales[0].dtype if sample.scales else torch.uint8
    arguments = (write_tensor(pixels), tuple(sample.label.shape), scale_sizes, pixel_type, sample.size.tolist())
    rest = (sample.label.dtype, sample.path, sample.position, sample.bad, sample.is_by_window)
    return _restore_eval_sample, (*arguments, *rest)


def _restore_eval_sample(  # noqa: PLR0917 - the fields, as pickled
    written: Tensor | SlotAddress,
    label_size: tuple[int, ...],
    scale_sizes: list[tuple[int, ...]],
    pixel_type: torch.dtype,
    original_size: list[int],
    label_type: torch.dtype,
    path: str,
    position: int,
    bad: str,
    is_by_window: bool,
) -> EvalSample:
    pixels = read_tensor(written)
    label_bytes = math.prod(label_size) * LABEL_TYPE.itemsize
    label = pixels[:label_bytes].view(LABEL_TYPE).view(label_size).to(label_type)
    parts = pixels[label_bytes:].split([math.prod(size) * pixel_type.itemsize for size in scale_sizes])
    # Each in memory of its own if a view cannot begin there: a label may end at any even byte.
    aligned = (part if part.storage_offset() % pixel_type.itemsize == 0 else part.clone() for part in parts)
    scales = [part.view(pixel_type).view(size) for part, size in zip(aligned, scale_sizes, strict=True)]
    return EvalSample(scales, label, torch.tensor(original_size), path, position, bad, is_by_window)


ForkingPickler.register(Batch, _reduce_batch)
ForkingPickler.register(EvalSample, _reduce_eval_sample)
