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
from torch.distributed import run as torchrun

from helpers.command_line import RUN, TINY, TINY_NETWORK
from helpers.fork_server import ForkedProgram
from helpers.tiny_program import Gate
from semseg.training.loggers.csv import read_rows
from semseg.training.resume import RUN_KEY

Run = Callable[..., str]
Start = Callable[..., ForkedProgram]
TORCHRUN = torchrun.__file__
SMALL = [*TINY, *TINY_NETWORK]


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def run_of_two(run: Run, folder: Path) -> tuple[Path, str]:
    """The folder of a run on two ranks, in the new folder `runs`, and what it printed."""
    output = run(*SMALL, "trainer.devices=2", "runs_dir=runs")
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir, output


@pytest.mark.slow
@pytest.mark.reliability
def test_f3_two_ranks_share_one_folder_and_one_configuration(run_of_two: tuple[Path, str], folder: Path) -> None:
    run_dir, output = run_of_two
    assert output.count("best mean IoU") == 1  # only rank 0 prints
    assert len(list(folder.glob("**/.hydra/config.yaml"))) == 1
    assert list(folder.glob("**/last.ckpt")) == [run_dir / "checkpoints" / "last.ckpt"]


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("devices", [2, pytest.param(3, marks=pytest.mark.long)])
def test_c16_evaluation_counts_every_image_once_on_any_number_of_ranks(
    run: Run, run_of_two: tuple[Path, str], folder: Path, devices: int
) -> None:
    words = ["mode=eval", f"ckpt={run_of_two[0] / 'checkpoints' / 'last.ckpt'}", "trainer.accelerator=cpu"]
    words.append("eval.label_errors=true")
    for number in (1, devices):
        run(*words, f"run_dir=eval{number}", f"trainer.devices={number}")
    alone, together = metrics(folder / "eval1"), metrics(folder / f"eval{devices}")
    assert alone["images"] == together["images"] == 7
    assert alone["confusion"] == together["confusion"]
    assert alone["classes"] == together["classes"]
    errors = [(folder / f"eval{number}" / "label_errors.csv").read_text() for number in (1, devices)]
    assert errors[0] == errors[1] and errors[0].count("\n") > 1


WITH_WORKERS = [word for word in TINY if not word.startswith("data.num_workers")]  # the default number of them


@pytest.mark.slow
def test_two_ranks_train_with_loader_workers(run: Run, folder: Path) -> None:
    run(*WITH_WORKERS, *TINY_NETWORK, "data.steps_per_epoch=1", "trainer.devices=2", "run_dir=workers")
    assert (folder / "workers" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.long
def test_the_command_as_users_give_it_trains_on_two_ranks_with_loader_workers(folder: Path) -> None:
    """Without the fork server: every rank is an interpreter of its own."""
    small = ["model/encoder=mobilenetv2", "data.steps_per_epoch=1"]
    command = [sys.executable, str(RUN), *WITH_WORKERS, *small, "trainer.devices=2", "run_dir=started"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    assert (folder / "started" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
def test_mode_bench_times_the_steps_of_all_ranks(run: Run, folder: Path) -> None:
    output = run(*SMALL, "mode=bench", "bench.steps=2", "bench.warmup=1", "bench.images=2", "trainer.devices=2",
                 "run_dir=bench")  # fmt: skip
    assert output.count("is the bottleneck") == 1  # only rank 0 prints
    training = json.loads((folder / "bench" / "bench.json").read_text())["training"]
    seconds = training["step_s"] + training["waiting_s"]
    assert training["images_per_s"] == pytest.approx(2 / seconds)  # one image on each rank


@pytest.mark.long
def test_torchrun_on_one_node(run: Run, folder: Path) -> None:
    run(*SMALL, "trainer.devices=2", "runs_dir=torchrun", launcher=(TORCHRUN, "--standalone", "--nproc-per-node=2"))
    assert len(list((folder / "torchrun").iterdir())) == 1
    assert len(list(folder.glob("torchrun/**/.hydra/config.yaml"))) == 1
    assert len(list(folder.glob("torchrun/**/last.ckpt"))) == 1


def run_on_two_nodes(start: Start, *words: str) -> None:
    """Run a command line under two torchruns on this machine, one process each."""
    port = free_port()
    nodes = [
        start(
            *SMALL, "trainer.devices=1", "trainer.num_nodes=2", *words,
            launcher=(TORCHRUN, "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1",
                      "--master-addr=127.0.0.1", f"--master-port={port}"),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    assert [node.wait(timeout=300) for node in nodes] == [0, 0], [node.read() for node in nodes]


WRITTEN_IN = {  # of a run with an evaluation
    "config.yaml": {".", ".hydra"}, "overrides.yaml": {".hydra"}, "last.ckpt": {"checkpoints"}, "metrics.csv": {"logs"},
}  # fmt: skip


@pytest.mark.long
def test_two_torchruns_act_as_two_nodes_write_one_set_of_files_and_resume(start: Start, folder: Path) -> None:
    run_on_two_nodes(start, "runs_dir=nodes", "after_training=[eval]")
    (run_dir,) = (folder / "nodes").iterdir()
    for name, folders in WRITTEN_IN.items():
        assert {str(path.parent.relative_to(run_dir)) for path in run_dir.rglob(name)} == folders
    assert metrics(run_dir / "eval")["images"] == 7
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)[RUN_KEY]["world_size"] == 2
    run_on_two_nodes(start, f"run_dir={run_dir}", "trainer.max_epochs=2")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
    assert [path.name for path in (folder / "nodes").iterdir()] == [run_dir.name]
    steps = [row["step"] for row in read_rows(run_dir / "logs" / "metrics.csv")]
    assert sorted(set(steps), key=int) == ["0", "1", "3"]  # the first one and the ends of the epochs


@pytest.mark.slow
def test_slurm_starts_the_ranks_itself(start: Start, folder: Path) -> None:
    shared = {
        "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    ranks = [
        start(*SMALL, "trainer.devices=2", "runs_dir=slurm",
              variables={**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in (0, 1)
    ]  # fmt: skip
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0], [rank.read() for rank in ranks]
    assert [path.name for path in (folder / "slurm").iterdir()] == ["slurm_4242"]
    assert len(list(folder.glob("slurm/**/.hydra/config.yaml"))) == 1
    assert len(list(folder.glob("slurm/**/last.ckpt"))) == 1


@pytest.mark.long  # tests/cli/test_sweep.py trains a job, and other tests here two ranks
def test_a_sweep_runs_each_job_once_on_its_own_ranks(run: Run, folder: Path) -> None:
    run("-m", *SMALL, "optim.lr=0.01,0.02", "trainer.devices=2", "runs_dir=sweep")
    assert len(list(folder.glob("sweep/**/result.json"))) == 2
    rates = [
        torch.load(path, weights_only=True)["semseg"]["config"]["optim"]["lr"]
        for path in folder.glob("sweep/**/last.ckpt")
    ]
    assert sorted(rates) == [0.01, 0.02]


def rank_processes(supervisor: int) -> list[int]:
    """Process ids of the ranks of a job, rank 0 first: its children, which lead sessions of their own."""
    children = [
        process
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and parent_and_session(process := int(entry.name)) == (supervisor, process)
    ]
    return sorted(children)


def parent_and_session(process: int) -> tuple[int, int]:
    """The values of a process; zeros if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0, 0
    return int(fields[1]), int(fields[3])


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
def test_e1_a_rank_that_is_killed_ends_the_job_and_is_named(start: Start, tmp_path: Path, rank: int) -> None:
    gate = Gate(tmp_path / "gate", step=1)
    job = start(*SMALL, "trainer.devices=2", f"run_dir={tmp_path / 'run'}", variables=gate.variables)
    gate.wait(0, 1)
    ranks = rank_processes(job.pid)
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[rank], signal.SIGKILL)
    assert job.wait(timeout=60) == 128 + signal.SIGKILL
    assert time.monotonic() - began < 30  # ten, if the machine is not busy
    last_block = job.read().strip().splitlines()[-2:]
    assert f"rank {rank} of 2 failed" in last_block[0] and "SIGKILL" in last_block[0]
    assert "its log" in last_block[1]
    assert not [process for process in ranks if Path(f"/proc/{process}").exists()]


@pytest.mark.slow
def test_a_rank_that_raises_is_named_with_its_exception(start: Start, folder: Path, tmp_path: Path) -> None:
    victim = sorted((folder / "scenes/annotations/validation").iterdir())[1]  # validation image 1 belongs to rank 1
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    try:
        job = start(*SMALL, "trainer.devices=2", f"run_dir={tmp_path / 'run'}")
        assert job.wait(timeout=120) == 1
    finally:
        victim.write_bytes(content)
    last_block = job.read().strip().splitlines()[-2:]
    assert "rank 1 of 2 failed" in last_block[0] and victim.name in last_block[0]
    assert "rank1" in last_block[1]


@pytest.mark.slow
@pytest.mark.reliability
def test_e5_the_ranks_end_with_the_supervisor(start: Start, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate", step=1)
    job = start(*SMALL, "trainer.devices=2", f"run_dir={tmp_path / 'run'}", variables=gate.variables)
    gate.wait(0, 1)
    ranks = rank_processes(job.pid)
    assert len(ranks) == 2
    job.kill()
    job.wait(timeout=60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{process}").exists() for process in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [process for process in ranks if Path(f"/proc/{process}").exists()]
