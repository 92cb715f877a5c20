"""Signals to one process or to a whole job: one checkpoint, the right exit code, and the command that goes on."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed.test_devices import rank_processes, wait_for_steps

from helpers.command_line import TINY

Start = Callable[..., subprocess.Popen[str]]
Run = Callable[..., str]
ENDLESS = ["data.steps_per_epoch=100000", "trainer.log_every_n_steps=1"]

pytestmark = pytest.mark.reliability


def assert_stopped(job: subprocess.Popen[str], run_dir: Path, name: str, code: int) -> str:
    """Wait for the end of a job that was asked to stop; returns the command that goes on."""
    began = time.monotonic()
    _, errors = job.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert job.returncode == code, errors
    pattern = rf"stopped by {name} at step (\d+); \S+last\.ckpt is written\. To go on: (python run\.py .*)"
    told = re.search(pattern, errors)
    assert told, errors
    content = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == int(told[1])
    assert not list(run_dir.glob("checkpoints/.*.tmp"))
    assert not (run_dir / "run.lock").exists()
    return told[2]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_e2_e3_one_process_stops_with_a_checkpoint(
    start: Start, folder: Path, number: signal.Signals, code: int
) -> None:
    run_dir = folder / f"stopped_{number.name}"
    job = start(*TINY, *ENDLESS, f"run_dir={run_dir.name}")
    wait_for_steps(run_dir, job)
    job.send_signal(number)
    command = assert_stopped(job, run_dir, number.name, code)
    assert shlex.split(command)[-2:] == [f"run_dir={run_dir.name}", "resume=auto"]


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGTERM, 1), pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.long)]
)
def test_e2_e5_a_signal_to_any_rank_stops_all_of_them_at_the_same_step(
    start: Start, folder: Path, number: signal.Signals, rank: int
) -> None:
    run_dir = folder / f"stopped_{number.name}_{rank}"
    job = start(*TINY, *ENDLESS, "trainer.devices=2", f"run_dir={run_dir.name}")
    wait_for_steps(run_dir, job)
    ranks = rank_processes(job.pid)
    os.kill(ranks[rank], number)
    assert_stopped(job, run_dir, number.name, 143)
    assert not [process for process in ranks if Path(f"/proc/{process}").exists()]


def test_e3_ctrl_c_to_the_job_reaches_its_ranks(start: Start, folder: Path) -> None:
    run_dir = folder / "interrupted_job"
    job = start(*TINY, *ENDLESS, "trainer.devices=2", f"run_dir={run_dir.name}")
    wait_for_steps(run_dir, job)
    job.send_signal(signal.SIGINT)
    assert_stopped(job, run_dir, "SIGINT", 130)


def test_e4_a_stop_during_validation_validates_first_when_the_run_goes_on(start: Start, run: Run, folder: Path) -> None:
    run_dir = folder / "stopped_in_validation"
    # Seven images at these scales take long enough to be hit in the middle.
    words = [*TINY, "data.steps_per_epoch=2", f"run_dir={run_dir.name}", "trainer.log_every_n_steps=1"]
    job = start(*words, "eval.scales=[400,410,420,430,440,450]", "data.max_long_edge=800")
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "last.ckpt").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert_stopped(job, run_dir, "SIGTERM", 143)
    assert not (run_dir / "checkpoints" / "best.ckpt").exists()
    output = run(*words, "data.max_long_edge=800")
    assert "validation  mean IoU" in output
    rows = (run_dir / "logs" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "0", "1"]  # no step is taken again


def test_e3_the_second_ctrl_c_ends_the_run_at_once(start: Start, folder: Path) -> None:
    run_dir = folder / "twice"
    job = start(*TINY, *ENDLESS, f"run_dir={run_dir.name}")
    wait_for_steps(run_dir, job)
    for _ in range(2):
        job.send_signal(signal.SIGINT)
        time.sleep(0.02)
    job.communicate(timeout=30)
    assert job.returncode in (130, 1, -signal.SIGINT)


def test_e6_a_slurm_job_is_requeued_and_goes_on_where_it_was(
    start: Start, run: Run, folder: Path, tmp_path: Path
) -> None:
    words = [*TINY, "data.steps_per_epoch=15", "trainer.log_every_n_steps=1"]
    run(*words, "run_dir=undisturbed")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n')
    scontrol.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    run_dir = folder / "queue" / "slurm_77"
    job = start(*words, "runs_dir=queue", variables=slurm)
    wait_for_steps(run_dir, job)
    job.send_signal(signal.SIGUSR1)
    output, errors = job.communicate(timeout=60)
    assert job.returncode == 0, errors
    assert "SLURM job 77 is requeued" in output
    assert (tmp_path / "asked").read_text() == "requeue 77\n"

    again = start(*words, "runs_dir=queue", variables=slurm)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert "going on from" in output
    ends = [torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (run_dir, folder / "undisturbed")]
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
