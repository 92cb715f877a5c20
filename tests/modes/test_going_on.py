"""Runs that are killed, damaged or refused, through the real command line: the same command goes on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.command_line import RUN, TINY, run

pytestmark = pytest.mark.reliability

# Dropout, flips, two sizes, validation after every epoch, and a checkpoint every other step.
WORDS = [
    *TINY, "data.short_edges=[32,48]", "data.steps_per_epoch=6", "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1", "checkpoint.every_n_steps=2", "checkpoint.keep=2",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over two threads and over one differ in their last bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with `whole`, a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("going_on")
    subprocess.run([sys.executable, str(RUN), *WORDS, "run_dir=whole"], cwd=folder, env=ENVIRONMENT, check=True)
    return folder


def end_of(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_end(found: Path, expected: Path) -> None:
    one, other = end_of(found), end_of(expected)
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    assert one["global_step"] == other["global_step"]
    assert (found / "logs" / "metrics.csv").read_bytes() == (expected / "logs" / "metrics.csv").read_bytes()


def killed_until_done(folder: Path, name: str, kills: int, seed: int) -> int:
    """Run, kill -9 at random moments, start again with the same command; returns how often it was hit."""
    rng = random.Random(seed)
    hits = 0
    for attempt in range(kills + 1):
        process = subprocess.Popen(
            [sys.executable, str(RUN), *WORDS, f"run_dir={name}"],
            cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if attempt < kills:
            # Start-up takes most of a short run: wait for the first sign of training, then a while.
            log, before = folder / name / "logs" / "metrics.csv", time.time()
            while process.poll() is None and not (log.is_file() and log.stat().st_mtime > before):
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 2.5))
            if process.poll() is None:
                process.kill()
                hits += 1
        output, _ = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), output
    return hits


def test_a3_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(folder: Path) -> None:
    assert killed_until_done(folder, "killed", kills=2, seed=1) >= 1
    assert_same_end(folder / "killed", folder / "whole")


@pytest.mark.long
def test_a3_thirty_kills(folder: Path) -> None:
    hits = 0
    for round_number in range(10):
        hits += killed_until_done(folder, f"killed_{round_number}", kills=3, seed=round_number)
        assert_same_end(folder / f"killed_{round_number}", folder / "whole")
    assert hits >= 10


def test_a10_a_finished_run_says_so_and_leaves_everything_alone(folder: Path) -> None:
    before = (folder / "whole" / "checkpoints" / "last.ckpt").read_bytes()
    output = run(folder, *WORDS, "run_dir=whole")
    assert "already finished at epoch 3; raise trainer.max_epochs to continue" in output
    assert (folder / "whole" / "checkpoints" / "last.ckpt").read_bytes() == before


def test_b6_a_damaged_last_checkpoint_is_passed_over_and_told(folder: Path) -> None:
    checkpoints = folder / "damaged" / "checkpoints"
    shutil.copytree(folder / "whole", folder / "damaged")
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_00000014.ckpt", "step_00000016.ckpt"]
    for name in ("last.ckpt", "best.ckpt"):
        with (checkpoints / name).open("r+b") as file:
            file.truncate(10_000)
    output = run(folder, *WORDS, "run_dir=damaged")
    assert "last.ckpt: cut short or damaged" in output
    assert "going on from" in output and "step_00000016.ckpt" in output
    assert_same_end(folder / "damaged", folder / "whole")


def test_f2_a_second_run_in_the_same_folder_is_refused(folder: Path) -> None:
    words = [*TINY, "data.steps_per_epoch=100000", "run_dir=busy", "trainer.log_every_n_steps=1"]
    first = subprocess.Popen(
        [sys.executable, str(RUN), *words], cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (folder / "busy" / "logs" / "metrics.csv").is_file():
            assert first.poll() is None
            time.sleep(0.05)
        output = run(folder, *words, code=2)
        assert f"process {first.pid}" in output and "since" in output
    finally:
        first.kill()
        first.wait()
    output = run(folder, *words[:-2], "run_dir=busy", "data.steps_per_epoch=2", "resume=null")
    assert "this run takes it over" in output


def test_f5_a_rerun_gives_the_same_weights_and_the_same_log(folder: Path) -> None:
    run(folder, "mode=rerun", "run=whole", "run_dir=again")
    assert_same_end(folder / "again", folder / "whole")
    assert "mode=rerun needs run=<run folder>" in run(folder, "mode=rerun", "run=nowhere", code=2)
