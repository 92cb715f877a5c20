"""How much memory a piece of work takes. Measured in forks, which spare the seconds that imports take."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.fork_server import run_python

FORK = multiprocessing.get_context("fork")
MEGABYTE = 2**20
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system does not report peak memory"
)


def in_child(work: Callable[[], Any]) -> Any:
    """The answer of `work`, done in a fork of this process."""

    def run(sender: Connection) -> None:
        torch.set_num_threads(1)  # the parent's pool of threads does not survive the fork
        sender.send(work())

    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=run, args=(sender,))
    child.start()
    sender.close()
    answer = receiver.recv()
    child.join()
    return answer


def run_in_fork(code: str, folder: Path) -> str:
    """What a program prints where nothing was done but imports: what other tests left in the heap does not count.

    Args:
        folder: whose modules the program may import.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    program = run_python("-c", f"import torch; torch.set_num_threads(1); {code}", cwd=folder, env=environment)
    assert program.returncode == 0, program.stdout
    return program.stdout


def resident(process: int | str = "self", field: str = "VmRSS") -> int:
    """Bytes of memory that a process holds now, or with the field VmHWM has held at most."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(re.findall(rf"{field}:\s+(\d+)", status)[0])


def peak_growth(work: Callable[[], Any]) -> int:
    """Bytes by which the peak of this process's memory grows over what it holds before `work`."""
    # What lies about free, or is collected meanwhile, would be used before the process grows.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident(field="VmHWM")
    work()
    return resident(field="VmHWM") - before
