"""Worker processes of a loader: how they start, how their deaths and errors are noticed, and how they are stopped."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from types import FrameType
from typing import Any

from torch._utils import ExceptionWrapper
from torch.utils.data._utils import signal_handling

from semseg.data.shared_slots import SharedSlots, worker_start_method
from semseg.data.waiting import limit_reads, send_descriptors_as_ours
from semseg.errors import SemsegError
from semseg.system.process import SIGCHLD, end_with_parent, ignore_stop_signals, kill_this_process

GRACE_S = 2.0  # seconds that workers get to leave by themselves
MAX_PAUSE_S = 5.0  # between two checks of an item that is waited for


# ---- starting


class WorkerSetup:
    """The first function that each worker calls (`worker_init_fn`).

    `slots` and `parent` are set before the workers of an iteration are started.
    """

    def __init__(self) -> None:
        self.slots: SharedSlots | None = None
        self.parent: int | None = None  # process id

    def __call__(self, worker: int) -> None:
        ignore_stop_signals(worker)
        if self.parent is not None:
            end_with_parent(self.parent)
        else:  # the parent is a fork server, which lives as long as its workers
            threading.Thread(target=end_with_trainer, daemon=True).start()
        Queue._on_queue_feeder_error = send_error  # pyright: ignore[reportAttributeAccessIssue] - Python's hook
        send_descriptors_as_ours()
        if self.slots is not None:
            self.slots.attach_worker(worker)


def parent_of_workers() -> int | None:
    """This process, if workers can end with it. On Linux they end with the thread that starts them: the main one."""
    is_direct_parent = worker_start_method() != "forkserver"
    is_main_thread = threading.current_thread() is threading.main_thread()
    return os.getpid() if is_direct_parent and is_main_thread else None


def end_with_trainer() -> None:
    """In a worker: wait for the end of the process that uses its items, then end as well."""
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        kill_this_process()


def send_error(queue: Queue[Any], error: Exception, item: Any) -> None:
    """In a worker: send the error instead of an item that cannot be pickled, for example because /dev/shm is full.

    Python would print the error and drop the item, and the process that trains would wait for it for ever.
    """
    number, _ = item
    queue.put((number, ExceptionWrapper(where="in a DataLoader worker process")))


# ---- errors


class LoaderFailure(Enum):
    """What an exception from the iteration of a DataLoader means."""

    RAISED = "a worker raised it"
    TIMED_OUT = "no item arrived within the timeout of the DataLoader"
    DIED = "a worker ended"


def classify_failure(error: BaseException) -> LoaderFailure | None:
    """The kind of failure behind an exception; None if no worker caused it.

    PyTorch shows this only in its messages, which tests/data/test_workers.py checks for the installed version.
    """
    message = str(error)
    if re.match(r"Caught \w+ in ", message):
        return LoaderFailure.RAISED
    if isinstance(error, RuntimeError) and message.startswith("DataLoader timed out"):
        return LoaderFailure.TIMED_OUT
    if isinstance(error, RuntimeError) and message.startswith("DataLoader worker"):
        return LoaderFailure.DIED
    return None


def original_message(error: Exception) -> str:
    """The message of an exception in the worker that raised it; `error` is PyTorch's copy, which has the traceback.

    The message of a `SemsegError` is returned alone, any other is preceded by the name of its type.
    """
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    _, separator, message = str(error).rpartition(f"\n{name}: ")
    if not separator:  # PyTorch raises a RuntimeError where it cannot construct the type, and some messages are empty
        return str(error).strip().splitlines()[-1]
    return message.strip() if isinstance(error, SemsegError) else f"{name}: {message.strip()}"


# ---- deaths

_awaited_stream: Iterator[Any] | None = None  # the iteration whose next item the main thread waits for


@contextmanager
def raising_for_dead_workers(stream: Iterator[Any]) -> Iterator[None]:
    """Inside, the death of a worker of `stream` raises, including one that has died before.

    Raises:
        RuntimeError: "DataLoader worker ...", like PyTorch.
    """
    global _awaited_stream  # noqa: PLW0603 - the signal handler needs it
    if threading.current_thread() is threading.main_thread():
        _awaited_stream = stream
    try:
        raise_if_dead(stream)
        yield
    finally:
        _awaited_stream = None


def raise_if_dead(stream: Iterator[Any]) -> None:
    """Raise if a worker of an iteration has ended; see `raising_for_dead_workers`."""
    death = None if getattr(stream, "_shutdown", False) else describe_death(stream)
    if death is not None:
        raise RuntimeError(death)


def describe_death(stream: Iterator[Any]) -> str | None:
    """How a worker of an iteration has ended; None if all are alive."""
    for worker in workers_of(stream):
        if not worker.is_alive():
            code = worker.exitcode or 0
            how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else "exited unexpectedly"
            return f"DataLoader worker (process {worker.pid}) {how}"
    return None


def install_death_handler(previous: Any) -> None:
    """Replace PyTorch's handler, which raises for a dead worker wherever the main thread is.

    In the middle of a step it is unknown which file the worker was reading; the next item is requested soon enough.

    Args:
        previous: the handler before PyTorch's, which is called as well.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if SIGCHLD is None or not is_main_thread or getattr(previous, "checks_workers", False):
        return
    if getattr(previous, "__module__", None) == signal_handling.__name__:
        previous = None  # PyTorch's own, from an earlier loader

    def check_workers(number: int, frame: FrameType | None) -> None:
        if callable(previous):
            previous(number, frame)
        if _awaited_stream is not None:  # perhaps in the middle of a message that will never be complete
            raise_if_dead(_awaited_stream)

    check_workers.checks_workers = True  # pyright: ignore[reportFunctionMemberAccess]
    signal.signal(SIGCHLD, check_workers)


# ---- waiting


class ItemWait:
    """The time for which an item has been waited for.

    Args:
        timeout_s: seconds to wait at most.
        warn: called once, with the seconds, when it is more than `slow_s`.
    """

    def __init__(self, timeout_s: float, slow_s: float, warn: Callable[[float], None]) -> None:
        self.timeout_s, self.slow_s, self.warn = timeout_s, slow_s, warn
        self.waited_s = 0.0
        self._is_reported = False
        self._checked = time.monotonic()

    def check(self) -> None:
        """To be called every few seconds while nothing comes.

        Raises:
            RuntimeError: "DataLoader timed out ...", like PyTorch, when the patience is over.
        """
        now = time.monotonic()
        # A longer pause is one of this process, for example stopped with Ctrl-Z, and its workers may have had it too.
        self.waited_s += min(now - self._checked, MAX_PAUSE_S)
        self._checked = now
        if self.waited_s > self.timeout_s:
            raise RuntimeError(f"DataLoader timed out after {self.waited_s:.0f} s")
        if self.waited_s > self.slow_s and not self._is_reported:
            self._is_reported = True
            self.warn(self.waited_s)


def limit_waiting(stream: Iterator[Any]) -> None:
    """Read the items of an iteration in such a way that `checking_while_waiting` limits all of it."""
    queue = getattr(stream, "_worker_result_queue", None)
    if queue is not None:
        limit_reads(queue._reader)


# ---- stopping


def workers_of(stream: Iterator[Any]) -> list[BaseProcess]:
    """The worker processes of an iteration of a DataLoader."""
    return getattr(stream, "_workers", [])


def stop_workers(stream: Iterator[Any]) -> None:
    """End the workers of an iteration of a DataLoader, including busy, stopped and hanging ones.

    They ignore the signals with which PyTorch and Python end them, so that both would wait for ever for a worker that
    does not leave by itself.
    """
    workers = workers_of(stream)
    if not workers or getattr(stream, "_shutdown", False):
        return  # no workers, or PyTorch has ended them because the iteration was complete
    is_main_thread = threading.current_thread() is threading.main_thread()
    # PyTorch's handler would raise for every worker that is killed.
    previous = signal.signal(SIGCHLD, signal.SIG_DFL) if SIGCHLD is not None and is_main_thread else None
    # In a thread: it can block if a worker was killed while it held a lock.
    shutdown = threading.Thread(
        target=stream._shutdown_workers,  # pyright: ignore[reportAttributeAccessIssue]
        daemon=True,
    )
    shutdown.start()
    shutdown.join(GRACE_S)
    kill_processes(workers)
    shutdown.join(GRACE_S)
    if SIGCHLD is not None and is_main_thread:
        signal.signal(SIGCHLD, previous)


def kill_processes(processes: Iterable[BaseProcess]) -> None:
    """Kill the child processes that are still alive."""
    for process in processes:
        if process.is_alive():
            process.kill()
