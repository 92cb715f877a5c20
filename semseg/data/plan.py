"""Stage 2: decide which images form a sub-batch, at which size, and which are flipped. Reads no pixels.

The published order: records pass by in a shuffled list and join one of two queues, portrait (h > w) or the rest;
the first queue to hold `batch_size` records becomes a sub-batch; the list is reshuffled when exhausted, and the queues
survive. Here this endless stream is not replayed but computed: any sub-batch number is reached at the same cost.

With P members in a queue, its k-th arrival (k from 0) comes in pass k // P, and the queue's j-th sub-batch is
arrivals j*B .. j*B + B - 1. So after p passes it has given (p * P) // B sub-batches and holds (p * P) % B records.

Records that are to be seen more often than once in a pass (`repeats`) take part several times. Which of them get the
extra turn of a broken number changes from pass to pass, but their number does not, so that all of the above holds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from semseg.data.geometry import Size
from semseg.data.seeding import generator_for

ORDER, DRAWS, TURNS = 0, 1, 2  # streams of randomness under one seed: generator_for(seed, stream, number)


def groups_of_one_shape(shapes: Iterable[Hashable], most: int) -> list[list[int]]:
    """Places in a list in groups of up to `most` of equal shape; the groups in the order of their first members.

    >>> groups_of_one_shape(["tall", "wide", "tall", "tall"], most=2)
    [[0, 2], [1], [3]]
    """
    latest: dict[Hashable, list[int]] = {}
    groups = []
    for place, shape in enumerate(shapes):
        if shape not in latest or len(latest[shape]) == most:
            latest[shape] = []
            groups.append(latest[shape])
        latest[shape].append(place)
    return groups


class SubBatch(NamedTuple):
    """What one device trains on in one step. Plain numbers, so that it can be sent to any worker."""

    number: int  # place in the global sequence, from 0
    records: tuple[int, ...]  # batch_size indices into the list of records
    short_edge: int  # pixels; shared by all members
    flips: tuple[bool, ...]  # mirror left and right, one for each member


class _Pass(NamedTuple):
    """One walk over the shuffled list, split by queue (0 = landscape and square, 1 = portrait)."""

    members: tuple[NDArray[np.int32], NDArray[np.int32]]  # records of each queue in order of arrival
    arrivals: tuple[NDArray[np.int32], NDArray[np.int32]]  # their places in the shuffled list


class TrainPlan:
    """The endless sequence of training sub-batches, as a pure function of its arguments.

    Args:
        sizes: (height, width) of every record; a list of `Size` or an array N x 2.
        seed: at least 0. Nothing else decides the order.
        batch_size: records in a sub-batch (images per device).
        short_edges: one is drawn for every sub-batch, each with the same chance.
        flip: mirror each member with chance 0.5.
        shuffle: False keeps the list order in every pass.
        repeats: how often each record is seen in a pass on average, at least 1; None: once. The sum over the records of
            an orientation is rounded up.

    Raises:
        ValueError: if there is no record, no short edge, batch_size is below 1, or a number of `repeats` is.

    >>> plan = TrainPlan([Size(3, 4), Size(4, 3), Size(5, 5)], seed=304, batch_size=2, short_edges=[300], shuffle=False)
    >>> plan.sub_batch(0).records, plan.sub_batch(1).records, plan.sub_batch(2).records
    ((0, 2), (1, 1), (0, 2))
    """

    def __init__(
        self,
        sizes: Sequence[Size] | NDArray[np.integer],
        *,
        seed: int,
        batch_size: int,
        short_edges: Sequence[int],
        flip: bool = True,
        shuffle: bool = True,
        repeats: Sequence[float] | NDArray[np.floating] | None = None,
    ) -> None:
        height_width = np.asarray(sizes)
        if height_width.size == 0:
            raise ValueError("a training plan needs at least one record")
        if batch_size < 1 or not short_edges:
            raise ValueError(
                f"batch_size must be at least 1 (is {batch_size}) and short_edges must not be empty (is {short_edges})"
            )
        self.seed, self.batch_size, self.flip, self.shuffle = seed, batch_size, flip, shuffle
        self.short_edges = tuple(int(edge) for edge in short_edges)
        self._is_portrait = height_width[:, 0] > height_width[:, 1]  # (N,) bool: all that is kept of the sizes
        self._turns = None if repeats is None else _cumulated(np.asarray(repeats, np.float64), self._is_portrait)
        num_portrait = int(np.count_nonzero(self._is_portrait))
        self._num_members = (len(height_width) - num_portrait, num_portrait)
        if self._turns is not None:
            self._num_members = (int(self._turns[0][-1]), int(self._turns[1][-1]))
        self.num_records = sum(self._num_members)  # of a pass
        # The present pass and the one before, from which a queue's leftovers come.
        self._pass = lru_cache(maxsize=2)(self._walk)

    def sub_batch(self, number: int) -> SubBatch:
        """Sub-batch `number` (from 0) of the global sequence. Costs the same for every number.

        Raises:
            ValueError: if number is below 0.
        """
        if number < 0:
            raise ValueError(f"sub-batches are numbered from 0, got {number}")
        queue, place = self._queue_and_place(number)
        rng = generator_for(self.seed, DRAWS, number)
        short_edge = self.short_edges[int(rng.integers(len(self.short_edges)))]
        flips = rng.random(self.batch_size) < 0.5 if self.flip else np.zeros(self.batch_size, bool)
        return SubBatch(number, self._records(queue, place), short_edge, tuple(flips.tolist()))

    def steps_in_pass(self, world_size: int) -> int:
        """Steps after which `world_size` devices have together taken about one pass over the records (rounded up)."""
        return -(-self.num_records // (self.batch_size * world_size))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_pass"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._pass = lru_cache(maxsize=2)(self._walk)

    def _completed(self, num_passes: int) -> int:
        """Sub-batches that both queues have given after `num_passes` passes."""
        return sum(num_passes * members // self.batch_size for members in self._num_members)

    def _queue_and_place(self, number: int) -> tuple[int, int]:
        """Which queue gives sub-batch `number`, and the how-manieth of that queue it is (from 0)."""
        # After p passes between p*N/B - 2 and p*N/B sub-batches are complete.
        first = number * self.batch_size // self.num_records
        last = (number + 2) * self.batch_size // self.num_records + 1
        index = first + bisect_right(range(first, last + 1), number, key=self._completed) - 1
        arrivals = self._pass(index).arrivals
        starts = [index * members // self.batch_size for members in self._num_members]
        # Within the pass a queue emits whenever an arrival fills it: every batch_size-th, less what it held before.
        held = [index * members % self.batch_size for members in self._num_members]
        emitted = [arrivals[queue][self.batch_size - 1 - held[queue] :: self.batch_size] for queue in (0, 1)]
        rank = number - sum(starts)  # how many emissions of this pass come before
        from_portrait = _taken_from_second(emitted[0], emitted[1], rank)
        from_landscape = rank - from_portrait
        landscape_next = from_portrait == len(emitted[1]) or (
            from_landscape < len(emitted[0]) and emitted[0][from_landscape] < emitted[1][from_portrait]
        )
        return (0, starts[0] + from_landscape) if landscape_next else (1, starts[1] + from_portrait)

    def _records(self, queue: int, place: int) -> tuple[int, ...]:
        """Members of the `place`-th sub-batch of a queue; the first ones may stem from earlier passes."""
        arrivals = range(place * self.batch_size, (place + 1) * self.batch_size)
        passes_and_ranks = (divmod(arrival, self._num_members[queue]) for arrival in arrivals)
        return tuple(int(self._pass(index).members[queue][rank]) for index, rank in passes_and_ranks)

    def _taking_part(self, index: int) -> NDArray[np.int32]:
        """The records of pass `index` in the order of the list, some of them several times.

        Systematic sampling: a comb of distance 1 with a random start is laid over the running sums, and each record
        gets a turn for every tooth within its stretch. So its turns are its number of repeats rounded down or up, and
        all of them together are the same number in every pass.
        """
        records = np.arange(len(self._is_portrait), dtype=np.int32)
        if self._turns is None:
            return records
        start = generator_for(self.seed, TURNS, index).random()
        counts = sum(np.diff(np.floor(sums + start)) for sums in self._turns)
        return np.repeat(records, np.asarray(counts, np.int64))

    def _walk(self, index: int) -> _Pass:
        """Pass `index` (from 0) over the records: 8 bytes a record."""
        order = self._taking_part(index)
        if self.shuffle:
            generator_for(self.seed, ORDER, index).shuffle(order)
        is_portrait = self._is_portrait[order]
        arrivals = [np.flatnonzero(is_portrait == queue).astype(np.int32) for queue in (False, True)]
        return _Pass((order[arrivals[0]], order[arrivals[1]]), (arrivals[0], arrivals[1]))


def _cumulated(repeats: NDArray[np.float64], is_portrait: NDArray[np.bool_]) -> tuple[NDArray[np.float64], ...]:
    """For each queue: 0 and the running sums of `repeats` (0 for records of the other queue), scaled to a whole end.

    Raises:
        ValueError: if they are not one number of at least 1 for each record.
    """
    if repeats.shape != is_portrait.shape or not (repeats >= 1).all():
        raise ValueError(f"repeats must be {len(is_portrait)} numbers of at least 1")
    sums = []
    for queue in (False, True):
        running = np.concatenate([[0.0], np.cumsum(np.where(is_portrait == queue, repeats, 0.0))])
        whole = math.ceil(running[-1] - 1e-6)
        sums.append(running * (whole / running[-1]) if whole else running)
        sums[-1][-1] = whole  # exactly, whatever the rounding of the product
    return tuple(sums)


def _taken_from_second(first: NDArray[np.int32], second: NDArray[np.int32], rank: int) -> int:
    """How many of the `rank` smallest numbers of two sorted arrays without common members lie in `second`.

    >>> _taken_from_second(np.array([1, 4, 6]), np.array([2, 3, 9]), rank=4)
    2
    """
    least, most = max(0, rank - len(first)), min(rank, len(second))
    # The answer is the first count m for which second[m] is not among the `rank` smallest.
    while least < most:
        middle = (least + most) // 2
        if second[middle] < first[rank - middle - 1]:
            least = middle + 1
        else:
            most = middle
    return least


class RankSequence(Sequence[SubBatch]):
    """The sub-batches of one rank: at step t it takes number first + (start + t) * world_size + rank of the plan.

    A sampler for `DataLoader(batch_size=None)`. All ranks together take every number once.

    Args:
        start: steps already done, so that a resumed run goes on where the first one stopped.
        num_steps: length; `sys.maxsize` for an endless stream.
        first: sub-batches that were taken before step 0, whatever the number of ranks was then.

    >>> plan = TrainPlan([Size(3, 4)], seed=0, batch_size=1, short_edges=[300])
    >>> tuple(item.number for item in RankSequence(plan, rank=1, world_size=4, start=10, num_steps=3))
    (41, 45, 49)
    """

    def __init__(
        self, plan: TrainPlan, *, rank: int, world_size: int, start: int, num_steps: int, first: int = 0
    ) -> None:
        if not 0 <= rank < world_size or min(start, num_steps, first) < 0:
            raise ValueError(
                f"needs 0 <= rank < world_size, start, num_steps and first >= 0, "
                f"got rank {rank}, world_size {world_size}, start {start}, num_steps {num_steps}, first {first}"
            )
        self.plan, self.rank, self.world_size, self.start, self.num_steps = plan, rank, world_size, start, num_steps
        self.first = first

    def __len__(self) -> int:
        return self.num_steps

    @overload
    def __getitem__(self, index: int) -> SubBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[SubBatch]: ...
    def __getitem__(self, index: int | slice) -> SubBatch | list[SubBatch]:
        if isinstance(index, slice):
            return [self[step] for step in range(*index.indices(self.num_steps))]
        if not -self.num_steps <= index < self.num_steps:
            raise IndexError(f"step {index} of {self.num_steps}")
        step = index % self.num_steps
        return self.plan.sub_batch(self.first + (self.start + step) * self.world_size + self.rank)
