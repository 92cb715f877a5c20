"""Several gloo processes on this machine that do one piece of work. Imports no pytest: every rank loads it."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from helpers.fork_server import ForkedProgram

NO_RENDEZVOUS = 75  # exit code of a rank that did not reach the others
ATTEMPTS = 3
PROGRAM = "import sys; from helpers.ranks import run_rank; run_rank(sys.argv[1], int(sys.argv[2]))"
RENDEZVOUS_SECONDS = 60.0
WORK_SECONDS = 300.0


def launch(work: Callable[[int, int], Any], world: int) -> list[Any]:
    """What `work(rank, world)` returns on each of `world` processes of one gloo group, rank 0 first.

    The processes are forks of the fork server. If they do not find each other, which happens on a busy machine, all of
    them are started again: `work` has not begun by then.

    Args:
        work: a function of a module, or a partial of one.
    """
    for attempt in range(ATTEMPTS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "work").write_bytes(pickle.dumps((work, world)))
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
            ranks = [ForkedProgram(["-c", PROGRAM, name, str(rank)], folder, environment) for rank in range(world)]
            codes = exit_codes(ranks)
            if NO_RENDEZVOUS in codes and attempt + 1 < ATTEMPTS:
                continue
            assert not any(codes), "\n".join(rank.read() for rank in ranks)
            return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    raise AssertionError("the last attempt returns or fails")


def exit_codes(ranks: list[ForkedProgram]) -> list[int]:
    """Wait for all ranks, or until one fails or the time is over: the others are killed then."""
    deadline = time.monotonic() + WORK_SECONDS
    codes = [rank.poll() for rank in ranks]
    while None in codes and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.02)
        codes = [rank.poll() for rank in ranks]
    if NO_RENDEZVOUS not in codes:
        time.sleep(0.1 if any(codes) else 0)  # the cause may be another rank, which is about to end as well
    for rank in ranks:
        rank.kill()
    return [rank.wait() for rank in ranks]


def run_rank(name: str, rank: int) -> None:
    """One process of `launch`: join the group, do the work, and save in the folder `name` what it returns."""
    torch.set_num_threads(1)
    folder = Path(name)
    work, world = pickle.loads((folder / "work").read_bytes())
    os.environ |= {  # as Lightning's own launcher would set them
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # not used: the group is there when Lightning looks for it
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    try:
        # A file, since a free port may be taken before it is used.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=RENDEZVOUS_SECONDS),
        )
        dist.barrier()
    except RuntimeError as error:
        print(f"rank {rank} did not reach the others: {error}", flush=True)
        sys.exit(NO_RENDEZVOUS)
    torch.save(work(rank, world), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
