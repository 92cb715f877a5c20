"""Errors in the workers of a loader: whatever is raised, and whenever, ends the iteration and every worker."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from helpers.command_line import run_script
from semseg.data.loaders import WatchedLoader, close_iterations
from semseg.data.waiting import limit_reads
from semseg.data.workers import LoaderFailure, classify_failure, stop_workers
from semseg.errors import ConfigError, DataError, SemsegError

pytestmark = pytest.mark.reliability


class TwoArgumentsError(Exception):
    """PyTorch cannot construct its like from a message alone."""

    def __init__(self, a: str, b: str) -> None:
        super().__init__(f"{a} and {b}")


class NoRoom:
    """What a full /dev/shm does to an item on its way to the main process."""

    def __reduce__(self) -> tuple[Any, ...]:
        raise OSError(28, "No space left on device")


def leave() -> None:
    sys.exit(3)


def fail(error: BaseException) -> None:
    raise error


FAULTS = {
    "user": (lambda: fail(ConfigError("first line\nsecond line")), ConfigError, r"^first line\nsecond line$"),
    "defect": (lambda: 1 / 0, DataError, r"5\.jpg: a data-loading worker failed: ZeroDivisionError: division by zero"),
    "arguments": (lambda: fail(TwoArgumentsError("x", "y")), DataError, r"5\.jpg: .*TwoArgumentsError: x and y"),
    "empty": (lambda: fail(ValueError()), DataError, r"5\.jpg: .*failed: ValueError \("),
    "memory": (lambda: fail(MemoryError()), DataError, r"5\.jpg: .*failed: MemoryError"),
    "pickle": (NoRoom, DataError, r"5\.jpg: .*No space left on device"),
    "exit": (leave, DataError, r"waiting for (\d\.jpg, )*5\.jpg.*: DataLoader worker .*exited unexpectedly"),
    "interrupt": (lambda: fail(KeyboardInterrupt()), DataError, r"waiting for (\d\.jpg, )*5\.jpg.*exited unexpectedly"),
}  # fmt: skip


class Faulty(Dataset[Any]):
    """Item `at` does what a fault of FAULTS does; those after it take a minute if `is_slow`."""

    def __init__(self, fault: str, at: int = 5, *, is_slow: bool = False) -> None:
        self.fault, self.at, self.is_slow = fault, at, is_slow

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if index == self.at:
            return FAULTS[self.fault][0]()
        if index > self.at and self.is_slow:
            time.sleep(60)
        return torch.tensor(index)


def loader_of(dataset: Dataset[Any], **options: Any) -> WatchedLoader[Any]:
    return WatchedLoader(dataset, lambda number: [f"{number}.jpg"], 250.0, batch_size=None, num_workers=2, **options)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_c28_every_error_of_a_worker_ends_the_iteration_and_both_workers(fault: str) -> None:
    _, kind, message = FAULTS[fault]
    with pytest.raises(SemsegError, match=message) as raised:
        list(loader_of(Faulty(fault)))
    assert type(raised.value) is kind
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_c28_an_error_does_not_wait_for_the_worker_that_is_busy() -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError):
        list(loader_of(Faulty("user", is_slow=True)))
    assert time.monotonic() - started < 15
    assert not multiprocessing.active_children()


def test_c28_without_workers_an_error_keeps_its_type() -> None:
    loader = WatchedLoader(Faulty("defect"), lambda number: [f"{number}.jpg"], 60.0, batch_size=None, num_workers=0)
    with pytest.raises(ZeroDivisionError):
        list(loader)


def test_c28_an_iteration_that_is_left_half_done_ends_with_the_program() -> None:
    items = iter(loader_of(Faulty("user", is_slow=True)))
    next(items)
    assert len(multiprocessing.active_children()) == 2
    close_iterations()
    assert not multiprocessing.active_children()


class Failing(Dataset[int]):
    """Each item raises, waits or ends its process."""

    def __init__(self, failure: LoaderFailure) -> None:
        self.failure = failure

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        if self.failure is LoaderFailure.DIED:
            os._exit(1)
        if self.failure is LoaderFailure.TIMED_OUT:
            time.sleep(600)
        raise ValueError("message")


@pytest.mark.long
@pytest.mark.parametrize("failure", LoaderFailure)
def test_failures_are_recognised_by_the_messages_of_the_installed_pytorch(failure: LoaderFailure) -> None:
    is_timeout = failure is LoaderFailure.TIMED_OUT
    items = iter(DataLoader(Failing(failure), num_workers=1, timeout=1 if is_timeout else 0))
    try:
        with pytest.raises((RuntimeError, ValueError)) as raised:
            next(items)
    finally:
        stop_workers(items)
    assert classify_failure(raised.value) is failure
    assert classify_failure(ValueError("message")) is None


@pytest.mark.long
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_c28_the_program_ends_under_every_start_method(method: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing\n"
        "from test_workers import Faulty, loader_of\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_start_method('{method}')\n"
        "    list(loader_of(Faulty('user', at=1)))\n"
    )
    code, output = run_script(program, cwd=Path(__file__).parent)
    assert code == 1
    assert output.endswith("semseg.errors.ConfigError: first line\nsecond line\n")


def test_a_connection_of_windows_is_read_without_a_limit_of_time() -> None:
    """It has no file descriptor that could be waited for."""
    connection: Any = SimpleNamespace(recv_bytes=bytes)
    limit_reads(connection)
    assert vars(connection) == {"recv_bytes": bytes}
