"""Stopping in good order: a signal to any process ends all of them at the same step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
from types import FrameType

import torch
import torch.distributed as dist

from semseg.errors import SemsegError
from semseg.system.process import get_stop_code, list_stop_signals, request_stop


class StoppedError(SemsegError):
    """A run that was asked to stop and has written its checkpoint."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number  # of the signal
        self.exit_code = get_stop_code(number)


class StopSignals:
    """Notes the first signal that asks this process to stop; the second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[signal.Signals, object] = {}

    def install(self) -> None:
        """Take over the signals. Lightning's own handler ends with exit code 0 and hangs if one rank gets it alone."""
        for number in list_stop_signals():
            handler = signal.signal(number, self._note)
            self._before.setdefault(number, handler)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] - what signal.signal gave us
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        signal.signal(signal.SIGINT, request_stop)


def requeue(number: int, *, is_first_rank: bool) -> str | None:
    """Put this SLURM job back into the queue if signal `number` is SLURM's warning; returns the job's number if so.

    SLURM sends SIGUSR1 ahead of a time limit (sbatch --signal=USR1@300); a job that is preempted by SIGTERM
    it requeues itself.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or number != signal.SIGUSR1:
        return None
    if is_first_rank:
        finished = subprocess.run(["scontrol", "requeue", job], check=False)  # noqa: S603, S607 - SLURM's own command
        return job if finished.returncode == 0 else None
    return job


class Votes:
    """Questions that all ranks answer at the same step; one yes is a yes for all.

    The votes go over a gloo group of their own, so that they neither wait for a device nor meet other collectives.
    """

    def __init__(self, world_size: int) -> None:
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None

    def largest(self, *numbers: int) -> list[int]:
        """For each of `numbers` the largest that any rank has. Every rank must call it equally often."""
        if self._group is None:
            return list(numbers)
        ballot = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._group)  # pyright: ignore[reportArgumentType]
        return ballot.tolist()

    def total(self, *numbers: int) -> list[int]:
        """For each of `numbers` the sum over all ranks. Every rank must call it equally often."""
        if self._group is None:
            return list(numbers)
        ballot = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(ballot, dist.ReduceOp.SUM, group=self._group)  # pyright: ignore[reportArgumentType]
        return ballot.tolist()
