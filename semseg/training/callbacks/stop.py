"""Stopping a run: a signal to any process ends all of them at the same step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from types import FrameType

from semseg.errors import SemsegError
from semseg.system.process import SIGUSR1, get_stop_code, list_stop_signals, request_stop


class StoppedError(SemsegError):
    """A run that was asked to stop and has written its checkpoint."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number  # the signal
        self.exit_code = get_stop_code(number)


class StopSignals:
    """Records the first signal that asks this process to stop; the second Ctrl-C does what it did before `install`."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[signal.Signals, object] = {}

    def install(self) -> None:
        """Handle the stop signals; only the main thread can.

        Lightning's own handler exits with 0, and hangs if only one rank gets a signal.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in list_stop_signals():
            handler = signal.signal(number, self._record)
            self._previous.setdefault(number, handler)

    def restore(self) -> None:
        """Restore the handlers from before `install`."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] - what signal.signal returned
        self._previous = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        before = self._previous.get(signal.SIGINT)  # that of a notebook must not end its kernel
        signal.signal(signal.SIGINT, before if callable(before) else request_stop)


def requeue(number: int, *, is_first_rank: bool) -> str | None:
    """Requeue this SLURM job if signal `number` is SLURM's warning; returns the id of the job if so.

    SLURM sends SIGUSR1 ahead of a time limit (sbatch --signal=USR1@300). Jobs that it preempts with SIGTERM are
    requeued by SLURM itself.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or number != SIGUSR1:
        return None
    if is_first_rank:
        finished = subprocess.run(["scontrol", "requeue", job], check=False)  # noqa: S603, S607 - SLURM's own command
        return job if finished.returncode == 0 else None
    return job
