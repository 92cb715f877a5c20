"""Room in /dev/shm, which containers make small. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, not written


def get_free_shared_memory() -> int | None:
    """Bytes; None where it is no folder."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None
