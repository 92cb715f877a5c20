"""Free space in /dev/shm, which is small in containers. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only its size is read


def get_free_shared_memory() -> int | None:
    """Free bytes of shared memory; None if the system has no such folder."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None
