"""Small integers that are summed over the ranks during a run, so that all of them do the same at the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor


class Summands(NamedTuple):
    """Integers of this rank at every step of the optimiser, and what is done with their sums over all ranks.

    `local` is called before the optimiser's step, `on_sums` at the earliest right after it, with the number of the
    step: at the same point of the run on all ranks.
    """

    length: int
    local: Callable[[], Sequence[int]]
    on_sums: Callable[[int, list[int]], None]


class StepReduction:
    """The sums over all ranks of the integers of several callbacks: one reduction per step of the optimiser.

    NonFiniteGuard puts them into the reduction that it needs anyway, and reads the sums when the device has them. There
    is no other exchange between ranks in a step than this one, that of the gradients, and those of synchronised layers.
    """

    def __init__(self) -> None:
        self._summands: list[Summands] = []
        self.flush: Callable[[], None] = lambda: None  # reads the last sums if that has not been done; NonFiniteGuard's

    @property
    def length(self) -> int:
        """The length of what `collect` returns."""
        return sum(summands.length for summands in self._summands)

    def register(self, summands: Summands) -> None:
        """Sum these integers at every step from now on."""
        self._summands.append(summands)

    def collect(self, like: Tensor) -> Tensor:
        """All integers of this rank in one row, of the type and device of `like`."""
        numbers = [number for summands in self._summands for number in summands.local()]
        row = like.new_zeros(len(numbers))
        for index, number in enumerate(numbers):
            if number:
                row[index].fill_(number)  # by the device: an upload would wait for it
        return row

    def dispatch(self, step: int, sums: Sequence[float]) -> None:
        """Call `on_sums` of all callbacks with the sums of their integers at a step, in the order of `collect`."""
        remaining = [round(number) for number in sums]
        for summands in self._summands:
            found, remaining = remaining[: summands.length], remaining[summands.length :]
            summands.on_sums(step, found)


@runtime_checkable
class KeepsCounts(Protocol):
    """A callback that counts something for the log, from the start of a run."""

    def read_counts(self) -> dict[str, int]:
        """The counts by their names in the log, up to the step that has just ended. On a GPU this waits for it."""
        ...


class HostReduction:
    """Small integers that the ranks exchange outside of training steps.

    They go over a gloo group of their own, so that they neither wait for a device nor mix with other collectives.
    """

    def __init__(self, world_size: int) -> None:
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None

    def find_maximum(self, number: int) -> int:
        """The maximum of `number` over all ranks. Every rank must call it equally often."""
        if self._group is None:
            return number
        maximum = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self._group)  # pyright: ignore[reportArgumentType]
        return int(maximum)
