"""The memory of this machine and of this process, as far as the system reports it. Uses the standard library only."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from semseg.errors import OutOfMemoryError, SemsegError, first_line

try:
    import resource
except ImportError:  # Windows
    resource = None


# What messages say when memory cannot be allocated: by torch on a CPU, on GPUs, by C++ and by OpenCV.
ALLOCATION_FAILURES = ("DefaultCPUAllocator", "not enough memory", "out of memory", "bad_alloc", "Insufficient memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated, on the host or on a device; most libraries say so in the message alone.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    (True, True)
    """
    if isinstance(error, SemsegError):  # it says all already
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(text in str(error) for text in ALLOCATION_FAILURES)


@contextmanager
def report_out_of_memory_as(describe: Callable[[], str]) -> Iterator[None]:
    """Within this context, a lack of memory is an error with a message and what the library said.

    Args:
        describe: gives the message, which may take time.

    Raises:
        OutOfMemoryError: in place of the error of the library.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"{describe()} The allocation failed: {first_line(error)}") from None


def get_total_memory() -> int | None:
    """Bytes of memory of this machine; None if unknown."""
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(names):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def get_free_memory() -> int | None:
    """Bytes that this process can still allocate, by system, container and process limits; None if unknown."""
    limits = []
    with suppress(OSError, LookupError, ValueError):
        status = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(status["MemAvailable"].split()[0]))
    with suppress(OSError, ValueError):  # cgroup 2; the text "max" is not a number
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    with suppress(OSError, ValueError, LookupError):
        used = int(Path("/proc/self/statm").read_text().split()[0])
        if resource is not None and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
            limits.append(limit - used * resource.getpagesize())
    return max(0, min(limits)) if limits else None


def get_peak_memory() -> int | None:
    """The peak memory of this process so far, in bytes; None if unknown."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
