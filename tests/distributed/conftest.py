"""A tiny data set, and processes that run the command line on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.fork_server import FORK_CHILDREN, ForkedProgram
from helpers.tiny_program import PROGRAM
from semseg.data.scenes import make_scenes


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the data set."""
    folder = tmp_path_factory.mktemp("distributed")
    make_scenes(folder / "scenes", num_train=6, num_val=7, seed=304)
    return folder


@pytest.fixture(scope="session")
def start(folder: Path) -> Callable[..., ForkedProgram]:
    """Start a command line of the tiny network in the working directory, without waiting."""

    def start(*words: str, launcher: tuple[str, ...] = (), variables: dict[str, str] | None = None) -> ForkedProgram:
        environment = os.environ | {"OMP_NUM_THREADS": "1", FORK_CHILDREN: "1"} | (variables or {})
        return ForkedProgram([*launcher, str(PROGRAM), *words], folder, environment)

    return start


@pytest.fixture(scope="session")
def run(start: Callable[..., ForkedProgram]) -> Callable[..., str]:
    """Run a command line to its end and return what it printed."""

    def run(*words: str, launcher: tuple[str, ...] = (), code: int = 0) -> str:
        process = start(*words, launcher=launcher)
        assert process.wait(timeout=300) == code, process.read()
        return process.read()

    return run
