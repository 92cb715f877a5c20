"""Runs on several processes through the real command line: one folder, one configuration, exact numbers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.command_line import TINY

Run = Callable[..., str]
Start = Callable[..., subprocess.Popen[str]]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.reliability
def test_f3_two_ranks_share_one_folder_and_one_configuration(run: Run, folder: Path) -> None:
    before = set(folder.iterdir())
    output = run(*TINY, "trainer.devices=2", "runs_dir=runs")
    assert output.count("best mean IoU") == 1  # only rank 0 speaks
    runs = list((folder / "runs").iterdir())
    assert len(runs) == 1 and set(folder.iterdir()) - before == {folder / "runs"}
    assert len(list(folder.glob("runs/**/.hydra/config.yaml"))) == 1
    assert len(list(folder.glob("runs/**/last.ckpt"))) == 1


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    command = [sys.executable, str(Path(__file__).resolve().parents[2] / "run.py"), *TINY, "run_dir=trained"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    return folder / "trained/checkpoints/last.ckpt"


@pytest.mark.reliability
@pytest.mark.parametrize("devices", [2, pytest.param(3, marks=pytest.mark.long)])
def test_c16_evaluation_counts_every_image_once_on_any_number_of_ranks(
    run: Run, folder: Path, checkpoint: Path, devices: int
) -> None:
    run("mode=eval", f"ckpt={checkpoint}", "run_dir=eval1", "trainer.accelerator=cpu")
    run(
        "mode=eval",
        f"ckpt={checkpoint}",
        f"run_dir=eval{devices}",
        "trainer.accelerator=cpu",
        f"trainer.devices={devices}",
    )
    alone, together = metrics(folder / "eval1"), metrics(folder / f"eval{devices}")
    assert alone["images"] == together["images"] == 7
    assert alone["confusion"] == together["confusion"]
    assert alone["classes"] == together["classes"]


@pytest.mark.long
def test_torchrun_on_one_node(run: Run, folder: Path) -> None:
    run(*TINY, "trainer.devices=2", "runs_dir=torchrun", launcher=(*TORCHRUN, "--standalone", "--nproc-per-node=2"))
    assert len(list((folder / "torchrun").iterdir())) == 1
    assert len(list(folder.glob("torchrun/**/.hydra/config.yaml"))) == 1
    assert len(list(folder.glob("torchrun/**/last.ckpt"))) == 1


def test_two_torchruns_play_two_nodes(start: Start, folder: Path) -> None:
    port = free_port()
    nodes = [
        start(
            *TINY, "trainer.devices=1", "trainer.num_nodes=2", "runs_dir=nodes", "trainer.strategy=ddp",
            launcher=(*TORCHRUN, "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1",
                      "--master-addr=127.0.0.1", f"--master-port={port}"),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert len(list((folder / "nodes").iterdir())) == 1
    assert len(list(folder.glob("nodes/**/.hydra/config.yaml"))) == 1


def test_slurm_starts_the_ranks_itself(start: Start, folder: Path) -> None:
    shared = {
        "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    ranks = [
        start(*TINY, "trainer.devices=2", "runs_dir=slurm",
              variables={**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [path.name for path in (folder / "slurm").iterdir()] == ["slurm_4242"]
    assert len(list(folder.glob("slurm/**/.hydra/config.yaml"))) == 1
    assert len(list(folder.glob("slurm/**/last.ckpt"))) == 1


def test_a_sweep_runs_each_job_once_on_its_own_ranks(run: Run, folder: Path) -> None:
    run("-m", *TINY, "optim.lr=0.01,0.02", "trainer.devices=2", "runs_dir=sweep")
    results = sorted(folder.glob("sweep/**/result.json"))
    assert len(results) == 2
    assert len(list(folder.glob("sweep/**/last.ckpt"))) == 2
    rates = [
        torch.load(path, weights_only=True)["semseg"]["config"]["optim"]["lr"]
        for path in folder.glob("sweep/**/last.ckpt")
    ]
    assert sorted(rates) == [0.01, 0.02]


LONG = ["trainer.max_epochs=1", "data.steps_per_epoch=100000", "trainer.devices=2"]


def rank_processes(supervisor: int) -> list[int]:
    """Process ids of the ranks of a job, rank 0 first."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == supervisor and f"SEMSEG_SUPERVISOR={supervisor}".encode() in environment:
            rank = next(int(word.split(b"=")[1]) for word in environment if word.startswith(b"LOCAL_RANK="))
            found.append((rank, int(entry.name)))
    return [process for _, process in sorted(found)]


def wait_for_steps(run_dir: Path, process: subprocess.Popen[str]) -> None:
    """Until training is under way."""
    deadline = time.monotonic() + 120
    log = run_dir / "logs/metrics.csv"
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


@pytest.mark.reliability
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
def test_e1_a_rank_that_is_killed_ends_the_job_and_is_named(start: Start, folder: Path, rank: int) -> None:
    number, run_dir = signal.SIGKILL, f"killed_{rank}"
    job = start(*TINY, *LONG, f"run_dir={run_dir}", "trainer.log_every_n_steps=1")
    wait_for_steps(folder / run_dir, job)
    ranks = rank_processes(job.pid)
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[rank], number)
    _, errors = job.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert job.returncode == 128 + number
    last_block = errors.strip().splitlines()[-2:]
    assert f"rank {rank} of 2 failed" in last_block[0] and number.name in last_block[0]
    assert "its log" in last_block[1]
    assert not [process for process in ranks if Path(f"/proc/{process}").exists()]


def test_a_rank_that_raises_is_named_with_its_exception(start: Start, folder: Path) -> None:
    # Rank 1's share of the second sub-batches is a damaged image.
    victim = sorted((folder / "scenes/annotations/validation").iterdir())[1]  # validation image 1 belongs to rank 1
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    try:
        job = start(*TINY, "trainer.devices=2", "run_dir=raised")
        _, errors = job.communicate(timeout=120)
    finally:
        victim.write_bytes(content)
    assert job.returncode == 1
    last_block = errors.strip().splitlines()[-2:]
    assert "rank 1 of 2 failed" in last_block[0] and victim.name in last_block[0]
    assert "rank1" in last_block[1]


@pytest.mark.reliability
def test_e5_the_ranks_end_with_the_supervisor(start: Start, folder: Path) -> None:
    job = start(*TINY, *LONG, "run_dir=orphans", "trainer.log_every_n_steps=1")
    wait_for_steps(folder / "orphans", job)
    ranks = rank_processes(job.pid)
    job.kill()
    job.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [process for process in ranks if Path(f"/proc/{process}").exists()]
