"""How many processors this process may use. Uses the standard library only."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # Linux; containers and batch systems limit processes here
OWN_CGROUPS = Path("/proc/self/cgroup")
TOLERATED_WAITING = 0.05  # fraction of the time that training may wait for images
MAX_WORKERS = 4  # more seldom help one rank, and each needs memory


def choose_num_workers(given: int | str | None, num_ranks: int) -> int:
    """The number of data-loading workers of each rank.

    Args:
        given: data.num_workers; None, and auto before a run has corrected it: as many as there are processors for each
            rank, from 1 to MAX_WORKERS.
        num_ranks: processes of this run on this machine.
    """
    return given if isinstance(given, int) else min(max(count_processors() // num_ranks, 1), MAX_WORKERS)


def correct_num_workers(num_workers: int, waiting: float, num_processors: int) -> int:
    """The number of workers with which a loader would have kept up, as far as there are processors; never fewer.

    n workers made a sub-batch in the time of a step and of the wait for it, so that n / (1 - waiting) of them make one
    in the time of the step alone.

    Args:
        num_workers: of a rank, with which `waiting` was measured.
        waiting: the fraction of the time that the rank waited for images; up to TOLERATED_WAITING nothing changes.
        num_processors: those of the rank.

    >>> correct_num_workers(4, 0.5, 16), correct_num_workers(4, 0.5, 6), correct_num_workers(4, 0.03, 16)
    (8, 6, 4)
    """
    if waiting <= TOLERATED_WAITING:
        return num_workers
    needed = math.ceil(max(num_workers, 1) / (1 - min(waiting, 0.99)) - 1e-9)
    return max(num_workers, min(needed, num_processors))


def count_processors() -> int:
    """The processors of this process's affinity mask, and no more than the quotas of its cgroups allow; at least 1."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min([available, *(int(quota) for quota in find_quotas())]), 1)


def find_quotas() -> list[float]:
    """The limits of this process's cgroups, each in processors; none where there are no limits or no cgroups."""
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    # A line is "0::/path" for version 2, and "4:cpu,cpuacct:/path" for version 1. In a container the path may be that
    # of the host, but the group of the container itself is mounted at the top.
    quotas = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        top = CGROUPS / "cpu" if "cpu" in controllers.split(",") else CGROUPS
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top):
                quotas.append(read_quota(folder))
    return [quota for quota in quotas if quota is not None]


def read_quota(folder: Path) -> float | None:
    """The limit of one cgroup in processors; None if it has none."""
    try:
        if (folder / "cpu.max").is_file():  # version 2
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no limit
        return None
