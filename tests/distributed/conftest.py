"""A tiny data set, and processes that run the command line on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.command_line import RUN
from semseg.data.scenes import make_scenes


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the data set."""
    folder = tmp_path_factory.mktemp("distributed")
    make_scenes(folder / "scenes", num_train=6, num_val=7, seed=304)
    return folder


@pytest.fixture
def start(folder: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a command line in the working directory, without waiting."""

    def start(
        *words: str, launcher: tuple[str, ...] = (sys.executable,), variables: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})}
        return subprocess.Popen(
            [*launcher, str(RUN), *words],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.fixture
def run(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Run a command line to its end and return what it printed."""

    def run(*words: str, launcher: tuple[str, ...] = (sys.executable,), code: int = 0) -> str:
        process = start(*words, launcher=launcher)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == code, output + errors
        return output + errors

    return run
