"""Where files that several runs use are kept between them."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_folder() -> Path:
    """$SEMSEG_CACHE, else `user_cache_folder`."""
    folder = os.environ.get("SEMSEG_CACHE")
    return Path(folder).expanduser() if folder else user_cache_folder()


def user_cache_folder() -> Path:
    """$XDG_CACHE_HOME/semseg, else ~/.cache/semseg."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "semseg"


def writable_cache_folder() -> Path:
    """$SEMSEG_CACHE, unless it is read-only, as one that many users share; else `user_cache_folder`."""
    folder = default_cache_folder()
    return user_cache_folder() if folder.is_dir() and not os.access(folder, os.W_OK) else folder
