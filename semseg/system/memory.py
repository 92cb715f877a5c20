"""The memory of this machine and of this process, as far as the system reports it. Uses the standard library only."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None


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
