"""Stopping in good order: a signal to any process ends all of them at the same step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from semseg.errors import SemsegError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StoppedError(SemsegError):
    """A run that was asked to stop and has written its checkpoint."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopSignals:
    """Notes the first signal that asks this process to stop; the second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[signal.Signals, object] = {}

    def install(self) -> None:
        """Take over the signals. Lightning's own handler ends with exit code 0 and hangs if one rank gets it alone."""
        for number in STOP_SIGNALS:
            handler = signal.signal(number, self._note)
            self._before.setdefault(number, handler)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] - what signal.signal gave us
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_signals_to_the_parent(worker: int) -> None:
    """In a worker of a loader: a signal to the whole job is for the process that trains; workers end with it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


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
        dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._group)
        return ballot.tolist()
