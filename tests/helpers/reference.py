"""Numbers made with the original code, and where the real images lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SHARED = Path(__file__).resolve().parents[3] / "shared"


def golden(name: str) -> Any:
    """A JSON file of tests/golden."""
    return json.loads((GOLDEN / name).read_text())
