"""Where files that several runs use are kept between them."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_folder() -> Path:
    """$SEMSEG_CACHE, else $XDG_CACHE_HOME/semseg, else ~/.cache/semseg."""
    folder = os.environ.get("SEMSEG_CACHE")
    return Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "semseg").expanduser()
