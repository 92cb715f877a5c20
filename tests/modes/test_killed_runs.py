"""Runs that are killed, damaged or refused, through the real command line: the same command resumes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from helpers.command_line import TINY, TINY_NETWORK, run_here
from helpers.fork_server import ForkedProgram
from helpers.tiny_program import PROGRAM, Gate

pytestmark = pytest.mark.reliability

SMALL = [*TINY, *TINY_NETWORK]
# Dropout, flips, two sizes, validation after every epoch, and a checkpoint every other step.
WORDS = [
    *SMALL, "data.short_edges=[32,48]", "data.steps_per_epoch=6", "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1", "checkpoint.every_n_steps=2", "checkpoint.keep=2",
]  # fmt: skip


def start(folder: Path, *words: str, variables: dict[str, str] | None = None) -> ForkedProgram:
    """Start a command line in `folder`; sums over two threads and over one would differ in their last bit."""
    return ForkedProgram([str(PROGRAM), *words], folder, os.environ | {"OMP_NUM_THREADS": "1"} | (variables or {}))


def run(folder: Path, *words: str, code: int = 0) -> str:
    """What a command line prints; it must end with the exit code `code`."""
    process = start(folder, *words)
    assert process.wait(timeout=300) == code, process.read()
    return process.read()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with `whole`, a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("resumed")
    run(folder, *WORDS, "run_dir=whole")
    return folder


def end_of(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_end(found: Path, expected: Path) -> None:
    one, other = end_of(found), end_of(expected)
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    assert one["global_step"] == other["global_step"]
    assert (found / "logs" / "metrics.csv").read_bytes() == (expected / "logs" / "metrics.csv").read_bytes()


def kill_and_resume(folder: Path, name: str, steps: list[int], rng: random.Random) -> int:
    """Run, kill -9 a moment after each of `steps`, start again with the same command; returns the number of kills."""
    kills = 0
    for number, step in enumerate(steps):
        gate = Gate(folder / f"{name}_gate_{number}", step)
        process = start(folder, *WORDS, f"run_dir={name}", variables=gate.variables)
        gate.wait()
        gate.open()
        time.sleep(rng.uniform(0, 0.1))  # any moment will do
        kills += process.poll() is None
        process.kill()
        assert process.wait(timeout=60) in (0, -signal.SIGKILL), process.read()
    run(folder, *WORDS, f"run_dir={name}")
    return kills


@pytest.mark.slow
def test_a3_a_run_that_is_killed_twice_ends_like_one_that_is_not(folder: Path) -> None:
    kill_and_resume(folder, "killed", steps=[3, 10], rng=random.Random(1))
    assert_same_end(folder / "killed", folder / "whole")


@pytest.mark.long
def test_a3_thirty_kills(folder: Path) -> None:
    kills = 0
    for number in range(10):
        rng = random.Random(number)
        steps = [rng.randrange(first, first + 5) for first in (1, 7, 13)]
        kills += kill_and_resume(folder, f"killed_{number}", steps, rng)
        assert_same_end(folder / f"killed_{number}", folder / "whole")
    assert kills >= 10


@pytest.mark.slow
def test_a10_a_finished_run_says_so_and_leaves_everything_alone(folder: Path) -> None:
    before = (folder / "whole" / "checkpoints" / "last.ckpt").read_bytes()
    output = run_here(folder, *WORDS, "run_dir=whole")
    assert "already finished at epoch 3" in output and "trainer.max_epochs" in output
    assert (folder / "whole" / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.slow
def test_b6_a_damaged_last_checkpoint_is_skipped_and_reported(folder: Path) -> None:
    checkpoints = folder / "damaged" / "checkpoints"
    shutil.copytree(folder / "whole", folder / "damaged")
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_00000014.ckpt", "step_00000016.ckpt"]
    for name in ("last.ckpt", "best.ckpt"):
        with (checkpoints / name).open("r+b") as file:
            file.truncate(10_000)
    output = run(folder, *WORDS, "run_dir=damaged")
    assert "last.ckpt: cut short or damaged" in output
    assert "step_00000016.ckpt" in output
    assert_same_end(folder / "damaged", folder / "whole")


@pytest.mark.slow
def test_f2_a_second_run_in_the_same_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    words, gate = [*SMALL, "run_dir=busy"], Gate(tmp_path / "gate", step=1)
    first = start(folder, *words, variables=gate.variables)
    try:
        gate.wait()
        output = run(folder, *words, code=2)
        assert f"process {first.pid}" in output
    finally:
        first.kill()
        first.wait(timeout=60)
    assert "takes it over" in run(folder, *words, "resume=null")


@pytest.mark.slow
def test_f5_a_rerun_gives_the_same_weights_and_the_same_log(folder: Path) -> None:
    run(folder, "mode=rerun", "run=whole", "run_dir=again")
    assert_same_end(folder / "again", folder / "whole")
    assert "mode=rerun needs run=<run folder>" in run_here(folder, "mode=rerun", "run=nowhere", code=2)
