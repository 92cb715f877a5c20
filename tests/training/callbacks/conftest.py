"""What the tests of callbacks share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for drawn scenes, for all tests of a file."""
    return tmp_path_factory.mktemp("data") / "scenes"
