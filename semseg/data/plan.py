"""Stage 2: decide which images form a sub-batch, at which size, and which are flipped. Reads no pixels.

The order of the original code: records arrive in the order of a shuffled list and join one of two queues, portrait
(h > w) or the rest; a queue that holds `batch_size` records becomes a sub-batch. The list is reshuffled when it is
exhausted, and the queues keep their records. Here this endless stream is not replayed but computed: every sub-batch
number is reached at the same cost.

With P members in a queue, its k-th arrival (k from 0) comes in pass k // P, and the queue's j-th sub-batch is
arrivals j*B .. j*B + B - 1. After p passes it has produced (p * P) // B sub-batches and holds (p * P) % B records.

Records with `repeats` above 1 arrive several times in a pass. Which of them get the extra arrival of a fractional
repeat changes from pass to pass, but their number does not, so that all of the above holds.

Records of several data sets (data.mix) have repeats that give each data set its share of a pass (`share_repeats`), and
a pass is ordered so that every stretch from its start has these shares, up to two images of a data set.
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
from semseg.data.seeding import Stream, generator_for


def group_by_shape(shapes: Iterable[Hashable], max_members: int) -> list[list[int]]:
    """Indices of equal shapes, in groups of up to `max_members`, which are ordered by their first members.

    >>> group_by_shape(["tall", "wide", "tall", "tall"], max_members=2)
    [[0, 2], [1], [3]]
    """
    latest: dict[Hashable, list[int]] = {}
    groups = []
    for index, shape in enumerate(shapes):
        if shape not in latest or len(latest[shape]) == max_members:
            latest[shape] = []
            groups.append(latest[shape])
        latest[shape].append(index)
    return groups


class SubBatch(NamedTuple):
    """The images that one device trains on in one step. Plain numbers, so that it can be sent to any worker."""

    number: int  # position in the global sequence, from 0
    records: tuple[int, ...]  # batch_size indices into the list of records
    short_edge: int  # pixels; shared by all members
    flips: tuple[bool, ...]  # whether to mirror each member left to right


class _Pass(NamedTuple):
    """One pass over the shuffled list, split by queue (0 = landscape and square, 1 = portrait)."""

    members: tuple[NDArray[np.int32], NDArray[np.int32]]  # records of each queue in order of arrival
    arrivals: tuple[NDArray[np.int32], NDArray[np.int32]]  # their positions in the shuffled list


class TrainPlan:
    """The endless sequence of training sub-batches, as a pure function of its arguments.

    Args:
        sizes: (height, width) of every record; a list of `Size` or an array N x 2.
        seed: at least 0; the order depends on nothing else.
        batch_size: records in a sub-batch (images per device).
        short_edges: one of them is drawn for each sub-batch, with equal probability.
        flip: mirror each member with probability 0.5.
        shuffle: False keeps the order of the list in every pass.
        repeats: average number of times that each record occurs in a pass, at least 1; None: once. The sum over the
            records of an orientation is rounded up.
        sources: the number of the data set that each record is of, if there are several; needs `shuffle`.

    Raises:
        ValueError: if there is no record or no short edge, or batch_size or one of `repeats` is below 1.

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
        sources: Sequence[int] | NDArray[np.integer] | None = None,
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
        self._is_portrait = height_width[:, 0] > height_width[:, 1]  # (N,) bool; the sizes themselves are not needed
        self._repeat_sums = (
            None if repeats is None else _sum_repeats(np.asarray(repeats, np.float64), self._is_portrait)
        )
        self._sources = None if sources is None else np.asarray(sources)
        num_portrait = int(np.count_nonzero(self._is_portrait))
        self._num_members = (len(height_width) - num_portrait, num_portrait)
        if self._repeat_sums is not None:
            self._num_members = (int(self._repeat_sums[0][-1]), int(self._repeat_sums[1][-1]))
        self.num_records = sum(self._num_members)  # arrivals in a pass
        # The current pass and the one before, from which a queue's leftovers come.
        self._pass = lru_cache(maxsize=2)(self._compute_pass)

    def sub_batch(self, number: int) -> SubBatch:
        """Sub-batch `number` (from 0) of the global sequence, at the same cost for every number.

        Raises:
            ValueError: if number is below 0.
        """
        if number < 0:
            raise ValueError(f"sub-batches are numbered from 0, got {number}")
        queue, position = self._locate(number)
        rng = generator_for(self.seed, Stream.DRAW, number)
        short_edge = self.short_edges[int(rng.integers(len(self.short_edges)))]
        flips = rng.random(self.batch_size) < 0.5 if self.flip else np.zeros(self.batch_size, bool)
        return SubBatch(number, self._records(queue, position), short_edge, tuple(flips.tolist()))

    def steps_in_pass(self, world_size: int) -> int:
        """Steps after which `world_size` devices have together taken about one pass over the records (rounded up)."""
        return -(-self.num_records // (self.batch_size * world_size))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_pass"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._pass = lru_cache(maxsize=2)(self._compute_pass)

    def _num_completed(self, num_passes: int) -> int:
        """Sub-batches that both queues have produced after `num_passes` passes."""
        return sum(num_passes * members // self.batch_size for members in self._num_members)

    def _locate(self, number: int) -> tuple[int, int]:
        """The queue that produces sub-batch `number`, and its position among the sub-batches of that queue (from 0)."""
        # After p passes, between p*N/B - 2 and p*N/B sub-batches are complete.
        first = number * self.batch_size // self.num_records
        last = (number + 2) * self.batch_size // self.num_records + 1
        index = first + bisect_right(range(first, last + 1), number, key=self._num_completed) - 1
        arrivals = self._pass(index).arrivals
        starts = [index * members // self.batch_size for members in self._num_members]
        # Within a pass, a queue emits when an arrival fills it: every batch_size-th, minus the records it held before.
        held = [index * members % self.batch_size for members in self._num_members]
        emitted = [arrivals[queue][self.batch_size - 1 - held[queue] :: self.batch_size] for queue in (0, 1)]
        rank = number - sum(starts)  # emissions of this pass before this one
        from_portrait = _count_from_second(emitted[0], emitted[1], rank)
        from_landscape = rank - from_portrait
        is_landscape_next = from_portrait == len(emitted[1]) or (
            from_landscape < len(emitted[0]) and emitted[0][from_landscape] < emitted[1][from_portrait]
        )
        return (0, starts[0] + from_landscape) if is_landscape_next else (1, starts[1] + from_portrait)

    def _records(self, queue: int, position: int) -> tuple[int, ...]:
        """Members of the sub-batch at `position` of a queue; the first of them may come from earlier passes."""
        arrivals = range(position * self.batch_size, (position + 1) * self.batch_size)
        passes_and_ranks = (divmod(arrival, self._num_members[queue]) for arrival in arrivals)
        return tuple(int(self._pass(index).members[queue][rank]) for index, rank in passes_and_ranks)

    def _repeated_records(self, index: int) -> NDArray[np.int32]:
        """The records of pass `index` in the order of the list, some of them several times.

        Systematic sampling: points at distance 1 with a random start are placed on the cumulative sums of the repeats,
        and each record occurs once for every point in its interval. Its occurrences are therefore its repeats, rounded
        down or up, and their total is the same in every pass.
        """
        records = np.arange(len(self._is_portrait), dtype=np.int32)
        if self._repeat_sums is None:
            return records
        start = generator_for(self.seed, Stream.REPEAT, index).random()
        counts = sum(np.diff(np.floor(sums + start)) for sums in self._repeat_sums)
        return np.repeat(records, np.asarray(counts, np.int64))

    def _compute_pass(self, index: int) -> _Pass:
        """Pass `index` (from 0) over the records; takes 8 bytes per record."""
        order = self._repeated_records(index)
        if self.shuffle:
            rng = generator_for(self.seed, Stream.ORDER, index)
            rng.shuffle(order)
            if self._sources is not None:
                order = _spread_evenly(order, self._sources[order], rng)
        is_portrait = self._is_portrait[order]
        arrivals = [np.flatnonzero(is_portrait == queue).astype(np.int32) for queue in (False, True)]
        return _Pass((order[arrivals[0]], order[arrivals[1]]), (arrivals[0], arrivals[1]))


def _sum_repeats(repeats: NDArray[np.float64], is_portrait: NDArray[np.bool_]) -> tuple[NDArray[np.float64], ...]:
    """For each queue: 0 and the cumulative sums of `repeats` (0 for records of the other queue), with a whole total.

    Raises:
        ValueError: if there is not one number of at least 1 for each record.
    """
    if repeats.shape != is_portrait.shape or not (repeats >= 1).all():
        raise ValueError(f"repeats must be {len(is_portrait)} numbers of at least 1")
    sums = []
    for queue in (False, True):
        cumulative = np.concatenate([[0.0], np.cumsum(np.where(is_portrait == queue, repeats, 0.0))])
        total = math.ceil(cumulative[-1] - 1e-6)
        sums.append(cumulative * (total / cumulative[-1]) if total else cumulative)
        sums[-1][-1] = total  # the product may be rounded
    return tuple(sums)


def share_repeats(
    sources: NDArray[np.integer], shares: Sequence[float], repeats: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """The average number of times that each record occurs in a pass, so that every data set has its share of it.

    The record that occurs least occurs once.

    Args:
        sources: the number of the data set of each record.
        shares: fractions of a pass, by the number of the data set; their sum is 1.
        repeats: by which the records of one data set differ; None: not at all.

    >>> share_repeats(np.array([0, 0, 1, 1, 1, 1]), [0.5, 0.5]).tolist()
    [2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    """
    base = np.ones(len(sources)) if repeats is None else np.asarray(repeats, np.float64)
    factors = np.asarray(shares) / np.bincount(sources, base, minlength=len(shares))
    found = base * factors[sources]
    return found / found.min()


def _spread_evenly(
    order: NDArray[np.int32], sources: NDArray[np.integer], rng: np.random.Generator
) -> NDArray[np.int32]:
    """Shuffled records in another order, in which those of every data set are at equal distances.

    The order among the records of one data set stays.

    Args:
        sources: the number of the data set of each of them.
    """
    places = np.empty(len(order))
    for source in np.unique(sources):
        members = np.flatnonzero(sources == source)
        places[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return order[np.argsort(places, kind="stable")]


def _count_from_second(first: NDArray[np.int32], second: NDArray[np.int32], rank: int) -> int:
    """Count the members of `second` among the `rank` smallest numbers of two sorted arrays without common members.

    >>> _count_from_second(np.array([1, 4, 6]), np.array([2, 3, 9]), rank=4)
    2
    """
    low, high = max(0, rank - len(first)), min(rank, len(second))
    # The result is the first count m for which second[m] is not among the `rank` smallest.
    while low < high:
        middle = (low + high) // 2
        if second[middle] < first[rank - middle - 1]:
            low = middle + 1
        else:
            high = middle
    return low


class RankSequence(Sequence[SubBatch]):
    """The sub-batches of one rank: at step t it takes number first + (start + t) * world_size + rank of the plan.

    A sampler for `DataLoader(batch_size=None)`. All ranks together take every number once.

    Args:
        start: steps already done, so that a resumed run continues where the first one stopped.
        num_steps: length; `sys.maxsize` for an endless stream.
        first: sub-batches that were taken before step 0, by any number of ranks.

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
