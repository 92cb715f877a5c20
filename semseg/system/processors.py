"""How many processors this process may use. Uses the standard library only."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # Linux; containers and batch systems limit processes here
OWN_CGROUPS = Path("/proc/self/cgroup")
MAX_WORKERS = 4  # more seldom help one rank, and each needs memory


def choose_num_workers(given: int | None, num_ranks: int) -> int:
    """The number of data-loading workers of each rank.

    Args:
        given: data.num_workers; None: as many as there are processors for each rank, from 1 to MAX_WORKERS.
        num_ranks: processes of this run on this machine.
    """
    return min(max(count_processors() // num_ranks, 1), MAX_WORKERS) if given is None else given


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
