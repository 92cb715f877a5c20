"""What ranks tell each other during a run, so that all of them do the same at the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor


class Question(NamedTuple):
    """Small integers that every rank gives at every step of the optimiser, and what their sums over all ranks are for.

    `give` is called before the optimiser's step, `hear` at the earliest right after it, with the number of the step: at
    the same point of the run on all ranks.
    """

    num_answers: int
    give: Callable[[], Sequence[int]]
    hear: Callable[[int, list[int]], None]


class StepVote:
    """The answers of all ranks to the questions of several callbacks, added up once per step of the optimiser.

    NonFiniteGuard puts them into the reduction that it needs anyway, and reads the sums when the device has them. There
    is no other exchange between ranks in a step than this one, that of the gradients, and those of synchronised layers.
    """

    def __init__(self) -> None:
        self._questions: list[Question] = []
        self.read: Callable[[], None] = lambda: None  # reads the last vote if that has not been done; NonFiniteGuard's

    @property
    def num_answers(self) -> int:
        """The length of what `collect` returns."""
        return sum(question.num_answers for question in self._questions)

    def ask(self, question: Question) -> None:
        """Put a question at every step from now on."""
        self._questions.append(question)

    def collect(self, like: Tensor) -> Tensor:
        """This rank's answers to all questions in one row, of the type and device of `like`."""
        answers = [answer for question in self._questions for answer in question.give()]
        row = like.new_zeros(len(answers))
        for index, answer in enumerate(answers):
            if answer:
                row[index].fill_(answer)  # by the device: an upload would wait for it
        return row

    def announce(self, step: int, sums: Sequence[float]) -> None:
        """Tell those who asked the sums over all ranks of what they gave at a step, in the order of `collect`."""
        remaining = [round(number) for number in sums]
        for question in self._questions:
            heard, remaining = remaining[: question.num_answers], remaining[question.num_answers :]
            question.hear(step, heard)


@runtime_checkable
class KeepsCounts(Protocol):
    """A callback that counts something for the log, from the start of a run."""

    def read_counts(self) -> dict[str, int]:
        """The counts by their names in the log, up to the step that has just ended. On a GPU this waits for it."""
        ...


class HostVotes:
    """Small integers that the ranks exchange outside of training steps.

    They go over a gloo group of their own, so that they neither wait for a device nor mix with other collectives.
    """

    def __init__(self, world_size: int) -> None:
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None

    def maximum(self, number: int) -> int:
        """The maximum of `number` over all ranks. Every rank must call it equally often."""
        if self._group is None:
            return number
        ballot = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._group)  # pyright: ignore[reportArgumentType]
        return int(ballot)
