"""A tiny data set and the command line, for runs on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from semseg.data.scenes import make_scenes
from semseg.launch import CONFIG_DIR

RUN = CONFIG_DIR.parent / "run.py"
TINY = [
    "data=scenes", "data.make.num_train=6", "data.make.num_val=7", "data.root=scenes", "data.batch_size=1",
    "data.short_edges=[32]", "data.max_long_edge=64", "data.num_workers=0", "data.steps_per_epoch=2",
    "model/encoder=resnet18", "model/decoder=c1", "eval.scales=[32]", "trainer.accelerator=cpu", "trainer.max_epochs=1",
]  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the data set."""
    folder = tmp_path_factory.mktemp("distributed")
    make_scenes(folder / "scenes", num_train=6, num_val=7, seed=304)
    return folder


@pytest.fixture
def start(folder: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a command line in the working directory, without waiting."""

    def start(*words: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
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
