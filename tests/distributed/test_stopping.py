"""Signals to one process or to a whole job: one checkpoint, the right exit code, and the command that resumes."""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from distributed.test_devices import SMALL, rank_processes
from pytorch_lightning.callbacks import Callback

from helpers.fork_server import ForkedProgram
from helpers.in_process import TINY_RUN, configured, fit
from helpers.tiny_program import Gate
from semseg.training.callbacks.stop import StoppedError
from semseg.training.loggers.csv import read_rows

Start = Callable[..., ForkedProgram]
Run = Callable[..., str]
STEPS = ["data.steps_per_epoch=8", "trainer.log_every_n_steps=1"]

pytestmark = pytest.mark.reliability


def assert_stopped(job: ForkedProgram, run_dir: Path, name: str, code: int) -> str:
    """Wait for the end of a job that was asked to stop; returns the command that resumes it."""
    assert job.wait(timeout=60) == code, job.read()
    pattern = rf"stopped by {name} at step (\d+); \S+last\.ckpt is written\..*(python run\.py .*)"
    found = re.search(pattern, job.read())
    assert found, job.read()
    content = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == int(found[1])
    assert not list(run_dir.glob("checkpoints/.*.tmp"))
    assert not (run_dir / "run.lock").exists()
    return found[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_e2_e3_one_process_stops_with_a_checkpoint(
    start: Start, folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run_dir, gate = tmp_path / "run", Gate(tmp_path / "gate", step=2)
    job = start(*SMALL, *STEPS, f"run_dir={run_dir}", variables=gate.variables)
    gate.wait()
    job.send_signal(number)
    gate.open()
    command = assert_stopped(job, run_dir, number.name, code)
    assert shlex.split(command)[-2:] == [f"run_dir={os.path.relpath(run_dir, folder)}", "resume=auto"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGTERM, 1), pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.long)]
)
def test_e2_e5_a_signal_to_any_rank_stops_all_of_them_at_the_same_step(
    start: Start, tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    run_dir, gate = tmp_path / "run", Gate(tmp_path / "gate", step=2)
    job = start(*SMALL, *STEPS, "trainer.devices=2", f"run_dir={run_dir}", variables=gate.variables)
    gate.wait(0, 1)
    ranks = rank_processes(job.pid)
    os.kill(ranks[rank], number)
    gate.open()
    assert_stopped(job, run_dir, number.name, 143)
    assert not [process for process in ranks if Path(f"/proc/{process}").exists()]


@pytest.mark.slow
def test_e3_ctrl_c_to_the_job_reaches_its_ranks(start: Start, tmp_path: Path) -> None:
    run_dir, gate = tmp_path / "run", Gate(tmp_path / "gate", step=2)
    job = start(*SMALL, *STEPS, "trainer.devices=2", f"run_dir={run_dir}", variables=gate.variables)
    gate.wait(0, 1)
    job.send_signal(signal.SIGINT)
    gate.open()
    assert_stopped(job, run_dir, "SIGINT", 130)


@pytest.mark.slow
def test_e3_the_second_ctrl_c_ends_the_run_at_once(start: Start, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate", step=2)
    job = start(*SMALL, *STEPS, f"run_dir={tmp_path / 'run'}", variables=gate.variables)
    gate.wait()
    while job.poll() is None:  # the gate stays closed: the first one alone would never end it
        job.send_signal(signal.SIGINT)
        time.sleep(0.1)  # of two signals that come before Python looks, there is one
    assert job.returncode == 130
    assert "interrupted." in job.read() and "Traceback" not in job.read()


class StopInValidation(Callback):
    """SIGTERM comes while the second image of a validation is scored."""

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.usefixtures("signals_restored")
def test_e4_a_run_that_was_stopped_during_validation_validates_first_when_it_resumes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data=scenes", f"data.root={folder / 'scenes'}", *TINY_RUN, "data.steps_per_epoch=2"]
    config = configured(*words, f"run_dir={tmp_path}", "trainer.max_epochs=1")
    with pytest.raises(StoppedError) as caught:
        fit(config, StopInValidation())
    assert (caught.value.number, caught.value.exit_code) == (signal.SIGTERM, 143)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert last.is_file() and not (tmp_path / "checkpoints" / "best.ckpt").exists()
    capsys.readouterr()
    fit(config, resume=last)
    assert "validation  mean IoU" in capsys.readouterr().out
    rows = read_rows(tmp_path / "logs" / "metrics.csv")
    assert [row["step"] for row in rows] == ["0", "1"]  # no step is taken again
    assert "val/miou" in rows[1]


@pytest.mark.slow
def test_e6_a_slurm_job_is_requeued_and_resumes_where_it_was(
    start: Start, run: Run, folder: Path, tmp_path: Path
) -> None:
    run(*SMALL, *STEPS, "run_dir=undisturbed")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n')
    scontrol.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    run_dir, gate = folder / "queue" / "slurm_77", Gate(tmp_path / "gate", step=3)
    job = start(*SMALL, *STEPS, "runs_dir=queue", variables=slurm | gate.variables)
    gate.wait()
    job.send_signal(signal.SIGUSR1)
    gate.open()
    assert job.wait(timeout=60) == 0, job.read()
    assert "SLURM job 77 is requeued" in job.read()
    assert (tmp_path / "asked").read_text() == "requeue 77\n"

    again = start(*SMALL, *STEPS, "runs_dir=queue", variables=slurm)
    assert again.wait(timeout=120) == 0, again.read()
    assert "queue/slurm_77/checkpoints/last.ckpt" in again.read()
    ends = [torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (run_dir, folder / "undisturbed")]
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
