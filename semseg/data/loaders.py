"""DataLoaders that watch their workers: what they wait for, what a worker raised, and that every worker ends."""

from __future__ import annotations

import atexit
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from types import FrameType
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from semseg.data import shared_slots
from semseg.data.batch import Batch
from semseg.data.datasets import TrainDataset
from semseg.data.plan import RankSequence, TrainPlan
from semseg.data.shared_slots import Exchange
from semseg.errors import DataError, SemsegError
from semseg.system.process import end_with_parent, ignore_stop_signals

Item = TypeVar("Item")
LOOK_S = 2.0  # seconds
GRACE_S = 2.0  # seconds in which workers that are asked to leave may do so
TELL_S = 60.0  # seconds without an item, after which it is told what is waited for
AHEAD = 2  # sub-batches that every worker keeps ready, DataLoader's prefetch_factor


class WatchedLoader(DataLoader[Item]):
    """A DataLoader that says what it was waiting for when a worker dies, or gives nothing for too long.

    Args:
        images_of: the images that make up item number n of an iteration.
        patience_s: seconds to wait for an item; 0: for ever.
        tensors: how many an item has at most, and the bytes of the largest; they go through an `Exchange` if that is
            possible. None: PyTorch's own way.
    """

    def __init__(
        self,
        dataset: Dataset[Item],
        images_of: Callable[[int], list[str]],
        patience_s: float,
        tensors: tuple[int, int] | None = None,
        **options: Any,
    ) -> None:
        reason = shared_slots.why_no_workers() if options["num_workers"] else None
        if reason is not None:
            rank_zero_warn(
                f"images are read without workers, since the system has no locks for them: {reason} (/dev/shm)."
            )
            options["num_workers"] = 0
        if options["num_workers"]:
            # DataLoader looks after its workers each time that it has waited so long.
            options |= {"timeout": LOOK_S, "multiprocessing_context": shared_slots.start_method()}
        super().__init__(dataset, **options)
        self._images_of, self.patience_s, self._tensors = images_of, patience_s or math.inf, tensors

    def __iter__(self) -> Iterator[Item]:  # pyright: ignore[reportIncompatibleMethodOverride]
        items = self._items()
        _going_on.add(items)
        return items

    def _items(self) -> Generator[Item, None, None]:
        self.worker_init_fn = partial(begin, self._exchange(), self._parent())  # a new one for each set of workers
        before = signal.getsignal(signal.SIGCHLD)
        stream = super().__iter__()
        take_deaths_of_workers(before)
        try:
            for number in itertools.count():
                try:
                    item = self._next(stream, number)
                except StopIteration:
                    return
                except Exception as error:
                    explained = self._explain(error, number, stream)
                    if explained is None:
                        raise
                    raise explained from error
                yield item
        finally:
            # However the iteration ends: the traceback of an error keeps the workers referenced, and so alive.
            stop_workers(stream)

    def _parent(self) -> int | None:
        """The process id of the workers' parent, if they are to end with it: it is this thread that Linux means."""
        is_direct = (
            shared_slots.start_method() != "forkserver" and threading.current_thread() is threading.main_thread()
        )
        return os.getpid() if self.num_workers and is_direct else None

    def _explain(self, error: Exception, number: int, stream: Iterator[Item]) -> SemsegError | None:
        """The error for users behind one that came from a worker; None if it came from this process."""
        text = str(error)
        if re.match(r"Caught \w+ in ", text):
            message = last_message(error)
            if isinstance(error, SemsegError):
                return type(error)(message)
            images = ", ".join(self._images_of(number))
            return DataError(f"{images}: a data-loading worker failed: {message} (data.num_workers=0 shows where).")
        if isinstance(error, RuntimeError) and text.startswith("DataLoader"):
            reason = text.splitlines()[0].rstrip(". ")
        elif isinstance(error, OSError | EOFError) and wait(
            [worker.sentinel for worker in workers_of(stream)], GRACE_S
        ):
            reason = "DataLoader worker exited unexpectedly"  # while it was handing over an item, which is lost
        else:
            return None
        return DataError(
            f"waiting for {self._in_work(number, reason)}: {reason}. Look whether the file can be read "
            "and the memory suffices; data.num_workers=0 shows more, data.worker_timeout_s is how long to wait."
        )

    def _in_work(self, number: int, reason: str) -> str:
        """The images that a worker may have been at when it ended; those of item `number` if it only takes long."""
        is_dead = "timed out" not in reason
        # Items that a worker had done may be lost with it, so that any of those under way can be what ended it.
        last = min(len(self), number + AHEAD * self.num_workers) if is_dead else number + 1
        return ", ".join(image for item in range(number, last) for image in self._images_of(item))

    def _exchange(self) -> Exchange | None:
        """Slots for what the workers keep ready, the items that they are at among them."""
        if self._tensors is None or not self.num_workers or not shared_slots.is_possible():
            return None
        count, size = self._tensors
        try:
            return Exchange(self.num_workers, AHEAD * count, size)
        except OSError:  # a system that grants no memory in advance
            return None

    def _next(self, stream: Iterator[Item], number: int) -> Item:
        """The next item.

        Raises:
            RuntimeError: "DataLoader ..." if a worker is dead, or the patience is over.
        """
        started, is_told = time.monotonic(), False
        while True:
            try:
                with waiting_for(stream):
                    return next(stream)
            except RuntimeError as error:
                waited = time.monotonic() - started
                if not str(error).startswith("DataLoader timed out") or waited > self.patience_s:
                    raise
                if waited > TELL_S and not is_told:
                    is_told = True
                    images = ", ".join(self._images_of(number))
                    warnings.warn(f"waiting for {images} since {waited:.0f} s. Is the disk slow?", stacklevel=1)


# ---- workers that die

_waited_for: Iterator[Any] | None = None  # the iteration of a DataLoader whose next item the main thread waits for


@contextmanager
def waiting_for(stream: Iterator[Any]) -> Iterator[None]:
    """Inside, the death of a worker of `stream` raises, also of one that has died before.

    Raises:
        RuntimeError: "DataLoader worker ...", as PyTorch does.
    """
    global _waited_for  # noqa: PLW0603 - what a signal's handler has to know
    if threading.current_thread() is threading.main_thread():
        _waited_for = stream
    try:
        raise_if_dead(stream)
        yield
    finally:
        _waited_for = None


def raise_if_dead(stream: Iterator[Any]) -> None:
    """See `waiting_for`."""
    for worker in workers_of(stream):
        if not worker.is_alive() and not getattr(stream, "_shutdown", False):
            code = worker.exitcode or 0
            how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else "exited unexpectedly"
            raise RuntimeError(f"DataLoader worker (process {worker.pid}) {how}")


def take_deaths_of_workers(before: Any) -> None:
    """Take the place of PyTorch's handler, which raises for a dead worker wherever the main thread is.

    In the middle of a step nobody knows what the worker was reading; the next item is asked for soon enough.

    Args:
        before: the handler before PyTorch's, which is called as well.
    """
    if threading.current_thread() is not threading.main_thread() or getattr(before, "looks_at_workers", False):
        return
    if getattr(before, "__module__", None) == signal_handling.__name__:
        before = None  # PyTorch's own, of a loader before

    def look(number: int, frame: FrameType | None) -> None:
        if callable(before):
            before(number, frame)
        if _waited_for is not None:  # perhaps in the middle of a message that will never be complete
            raise_if_dead(_waited_for)

    look.looks_at_workers = True  # pyright: ignore[reportFunctionMemberAccess]
    signal.signal(signal.SIGCHLD, look)


def last_message(error: Exception) -> str:
    """What an exception said in the worker that raised it; `error` is PyTorch's copy, which holds the traceback.

    The message of a `SemsegError` stands alone, any other is preceded by the name of its type.
    """
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    _, found, message = str(error).rpartition(f"\n{name}: ")
    if not found:  # PyTorch raises a RuntimeError where it cannot construct the type, and some messages are empty
        return str(error).strip().splitlines()[-1]
    return message.strip() if isinstance(error, SemsegError) else f"{name}: {message.strip()}"


def workers_of(stream: Iterator[Any]) -> list[BaseProcess]:
    """The worker processes of an iteration of a DataLoader."""
    return getattr(stream, "_workers", [])


def stop_workers(stream: Iterator[Any]) -> None:
    """End the workers of an iteration of a DataLoader, those that are busy, stopped or hanging included.

    They ignore the signal by which PyTorch and Python end them, so that both would wait for ever for one that does not
    leave by itself.
    """
    workers = workers_of(stream)
    if not workers or getattr(stream, "_shutdown", False):
        return  # no workers, or PyTorch has ended them: the iteration was complete
    on_main_thread = threading.current_thread() is threading.main_thread()
    # PyTorch's handler raises for every worker that is killed.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if on_main_thread else None
    # In a thread: it can block where a worker was killed that held a lock.
    leave = threading.Thread(
        target=stream._shutdown_workers,  # pyright: ignore[reportAttributeAccessIssue]
        daemon=True,
    )
    leave.start()
    leave.join(GRACE_S)
    kill(workers)
    leave.join(GRACE_S)
    if on_main_thread:
        signal.signal(signal.SIGCHLD, before)


def kill(processes: Iterable[BaseProcess]) -> None:
    """End child processes that are still alive, without asking them."""
    for process in processes:
        if process.is_alive():
            process.kill()


_going_on: WeakSet[Generator[Any, None, None]] = WeakSet()  # iterations whose workers may be alive


@atexit.register
def end() -> None:
    """Stop the workers of iterations that were left half done; see `stop_workers`."""
    for items in list(_going_on):
        items.close()


def begin(exchange: Exchange | None, parent: int | None, worker: int) -> None:
    """The first thing that a worker does."""
    ignore_stop_signals(worker)
    if parent is not None:
        end_with_parent(parent)
    else:  # a fork server started it, which lives as long as its workers
        threading.Thread(target=end_with_trainer, daemon=True).start()
    Queue._on_queue_feeder_error = send_error  # pyright: ignore[reportAttributeAccessIssue] - Python's hook for this
    if exchange is not None:
        exchange.join(worker)


def end_with_trainer() -> None:
    """In a worker: wait for the end of the process that uses its items, then end too."""
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os.kill(os.getpid(), signal.SIGKILL)


def send_error(queue: Queue[Any], error: Exception, item: Any) -> None:
    """In a worker: send the error in the place of an item that cannot be pickled, as where /dev/shm is full.

    Python prints the error and drops the item, for which the process that trains would wait for ever.
    """
    number, _ = item
    queue.put((number, ExceptionWrapper(where="in a DataLoader worker process")))


class SubBatchLoader:
    """This rank's share of the endless sequence of sub-batches, cut into epochs of equal length.

    Its whole state is one number, the count of sub-batches that all ranks together have taken. Workers
    live on from epoch to epoch, and a resumed run starts them at the very next sub-batch.
    """

    def __init__(
        self,
        dataset: TrainDataset,
        plan: TrainPlan,
        *,
        rank: int,
        world_size: int,
        steps: int,
        num_workers: int,
        patience_s: float = 0,
        largest: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        self.rank = rank
        self.world_size = world_size
        self.steps = steps
        self.num_workers, self.patience_s, self.largest = num_workers, patience_s, largest
        self.taken = 0  # sub-batches of all ranks since the run began
        self._stream: Iterator[Batch] | None = None

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        """The next epoch."""
        if self._stream is None:
            self._stream = iter(self.loader_from(self.taken))
        for _ in range(self.steps):
            batch = next(self._stream)
            # Counted here, where batches are used: workers run ahead of it.
            self.taken += self.world_size
            yield batch

    def loader_from(self, taken: int) -> DataLoader[Batch]:
        """All sub-batches of this rank after the first `taken` ones of the plan."""
        sequence = RankSequence(
            self.plan, rank=self.rank, world_size=self.world_size, start=0, num_steps=sys.maxsize, first=taken
        )

        def images_of(number: int) -> list[str]:
            return [self.dataset.records[index].image for index in sequence[number].records]

        return WatchedLoader(
            self.dataset,  # pyright: ignore[reportArgumentType] - indexed by sub-batches, not numbers
            images_of,
            self.patience_s,
            None if self.largest is None else (1, self.largest),
            batch_size=None,
            sampler=sequence,  # pyright: ignore[reportArgumentType]
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def close(self) -> None:
        """Stop the workers."""
        self._stream = None

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = sub_batches_taken(state, self.world_size)
        self.close()


def sub_batches_taken(state: dict[str, Any], world_size: int) -> int:
    """The sub-batches that all ranks have taken, by a saved state; the first release saved the steps instead."""
    return int(state["taken"]) if "taken" in state else int(state["position"]) * world_size
