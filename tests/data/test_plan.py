"""The computed stream of sub-batches equals two queues that are filled one record at a time."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from semseg.data.geometry import Size
from semseg.data.plan import RankSequence, TrainPlan
from semseg.data.seeding import Stream, generator_for

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/dataset_shapes.json").read_text())


def queues(sizes: list[Size], seed: int, batch_size: int) -> Iterator[tuple[int, ...]]:
    """The reference: records pass by for ever; the first queue to be full is emitted."""
    waiting: dict[bool, list[int]] = {False: [], True: []}
    index = 0
    while True:
        order = np.arange(len(sizes), dtype=np.int32)
        generator_for(seed, Stream.ORDER, index).shuffle(order)
        for record in order.tolist():
            queue = waiting[sizes[record].height > sizes[record].width]
            queue.append(record)
            if len(queue) == batch_size:
                yield tuple(queue)
                queue.clear()
        index += 1


def some_sizes(num_records: int, share_of_portraits: float, seed: int = 0) -> list[Size]:
    is_portrait = np.random.default_rng(seed).random(num_records) < share_of_portraits
    return [Size(4, 3) if tall else Size(3, 3 + place % 2) for place, tall in enumerate(is_portrait)]


def is_tall(size: Size) -> bool:
    return size.height > size.width


def plan_for(
    sizes: list[Size], seed: int = 304, batch_size: int = 2, *, shuffle: bool = True, flip: bool = True
) -> TrainPlan:
    return TrainPlan(sizes, seed=seed, batch_size=batch_size, short_edges=[300, 375, 450], shuffle=shuffle, flip=flip)


@pytest.mark.parametrize("share", [0.0, 0.12, 0.5, 1.0])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_records", [1, 2, 3, 4, 7, 12, 50])
def test_the_stream_is_that_of_two_queues(num_records: int, batch_size: int, share: float) -> None:
    sizes = some_sizes(num_records, share, seed=num_records)
    count = 4 * num_records // batch_size + 12
    plan = plan_for(sizes, seed=batch_size, batch_size=batch_size)
    expected = list(islice(queues(sizes, batch_size, batch_size), count))
    assert [plan.sub_batch(number).records for number in range(count)] == expected


def test_without_shuffling_the_members_are_the_published_ones() -> None:
    names = sorted(GOLDEN["images"])
    sizes = [Size(*GOLDEN["images"][name]) for name in names]
    for case in GOLDEN["batches"]:
        plan = plan_for(sizes, batch_size=case["batch_per_gpu"], shuffle=False)
        assert [names[index] for index in plan.sub_batch(case["call"]).records] == case["members"]


@pytest.mark.slow
@pytest.mark.reliability
def test_a7_no_record_is_lost_or_repeated_in_any_pass_and_ranks_share_all_numbers() -> None:
    """1600 combinations of world size, batch size and number of records, at least 3 passes each.

    Portraits never meet the others in a sub-batch, and what a pass leaves over begins a sub-batch of the next one. So a
    pass is whole within the sub-batches of one orientation in a row: each of its records once before any comes again.
    """
    num_passes = 0
    for num_records in range(1, 51):
        sizes = some_sizes(num_records, share_of_portraits=0.3, seed=num_records)
        members = {tall: [place for place, size in enumerate(sizes) if is_tall(size) == tall] for tall in (False, True)}
        for batch_size in range(1, 5):
            plan = plan_for(sizes, batch_size=batch_size)
            stream = [plan.sub_batch(number).records for number in range(4 * num_records // batch_size + 8)]
            for tall, expected in members.items():
                flat = [record for records in stream if is_tall(sizes[records[0]]) == tall for record in records]
                for start in range(0, len(flat) - len(expected) + 1, max(1, len(expected))):
                    assert sorted(flat[start : start + len(expected)]) == expected
                    num_passes += 1
            for world_size in range(1, 9):
                steps = plan.steps_in_pass(world_size)
                assert (steps - 1) * world_size * batch_size < num_records <= steps * world_size * batch_size
                shares = [
                    RankSequence(plan, rank=rank, world_size=world_size, start=0, num_steps=steps)
                    for rank in range(world_size)
                ]
                taken = sorted(sub_batch.number for share in shares for sub_batch in share)
                assert taken == list(range(steps * world_size))
    assert num_passes > 1000


def test_both_queues_together_take_every_record_once_a_pass() -> None:
    sizes = some_sizes(40, 0.3)
    plan = plan_for(sizes, batch_size=3)
    times = Counter(record for number in range(400) for record in plan.sub_batch(number).records)  # 1200 = 30 passes
    assert set(times) == set(range(40))
    assert max(times.values()) - min(times.values()) <= 1  # up to what the queues hold at the end


def test_members_of_a_sub_batch_share_their_orientation() -> None:
    sizes = some_sizes(30, 0.4)
    for number in range(60):
        records = plan_for(sizes, batch_size=4).sub_batch(number).records
        assert len({sizes[record].height > sizes[record].width for record in records}) == 1


def test_a_sub_batch_does_not_depend_on_earlier_calls() -> None:
    sizes = some_sizes(23, 0.2)
    forward = [plan_for(sizes).sub_batch(number) for number in range(200)]
    plan = plan_for(sizes)
    assert [plan.sub_batch(number) for number in reversed(range(200))] == forward[::-1]
    assert copy.deepcopy(plan).sub_batch(77) == forward[77]


def test_a_rare_orientation_collects_over_many_passes() -> None:
    sizes = [Size(5, 4)] + [Size(4, 5)] * 99  # one portrait, 4 a sub-batch: full in every 4th pass
    plan = plan_for(sizes, batch_size=4)
    tall = [number for number in range(400) if plan.sub_batch(number).records == (0, 0, 0, 0)]
    assert len(tall) == 4  # 400 sub-batches are 16 passes


def test_seeking_far_reads_at_most_a_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    original = TrainPlan._compute_pass
    monkeypatch.setattr(
        TrainPlan, "_compute_pass", lambda self, index: (passes.append(index), original(self, index))[1]
    )
    plan = plan_for(some_sizes(1000, 0.12))
    plan.sub_batch(10**12)
    assert len(passes) <= 2


def test_half_of_the_images_are_flipped_and_short_edges_are_even() -> None:
    plan = plan_for(some_sizes(100, 0.1))
    drawn = [plan.sub_batch(number) for number in range(3000)]
    assert 0.47 < np.mean([flip for sub_batch in drawn for flip in sub_batch.flips]) < 0.53
    counts = Counter(sub_batch.short_edge for sub_batch in drawn)
    assert sorted(counts) == [300, 375, 450]
    assert min(counts.values()) > 900


def test_flip_off_flips_nothing_and_changes_nothing_else() -> None:
    sizes = some_sizes(10, 0.3)
    with_flip, without = plan_for(sizes), plan_for(sizes, flip=False)
    for number in range(50):
        assert without.sub_batch(number) == with_flip.sub_batch(number)._replace(flips=(False, False))


def test_the_order_changes_with_the_seed_and_from_pass_to_pass() -> None:
    sizes = [Size(4, 4)] * 64
    passes = [
        [plan_for(sizes, seed=seed).sub_batch(first + number).records for number in range(32)]
        for seed, first in ((1, 0), (2, 0), (1, 32))
    ]
    assert passes[0] != passes[1]
    assert passes[0] != passes[2]


def test_an_array_of_sizes_is_as_good_as_a_list() -> None:
    sizes = some_sizes(9, 0.5)
    assert plan_for(np.array(sizes)).sub_batch(5) == plan_for(sizes).sub_batch(5)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_ten_million_records_fit() -> None:
    sizes = np.random.default_rng(0).integers(100, 1000, (10**7, 2), dtype=np.int16)
    plan = TrainPlan(sizes, seed=1, batch_size=2, short_edges=[300])
    records = plan.sub_batch(7).records
    assert all(0 <= record < 10**7 for record in records)
    assert sum(array.nbytes for pair in plan._pass(0) for array in pair) == 8 * 10**7


def test_a_rank_starts_where_the_interrupted_run_stopped() -> None:
    plan = plan_for(some_sizes(20, 0.2))
    whole = RankSequence(plan, rank=1, world_size=2, start=0, num_steps=30)
    rest = RankSequence(plan, rank=1, world_size=2, start=12, num_steps=18)
    assert list(rest) == list(whole)[12:] == whole[12:]
    assert whole[-1].number == 59


def test_an_endless_share_has_a_length_and_a_beginning() -> None:
    endless = RankSequence(plan_for(some_sizes(5, 0.2)), rank=0, world_size=1, start=3, num_steps=sys.maxsize)
    assert len(endless) == sys.maxsize
    assert [sub_batch.number for sub_batch in islice(endless, 3)] == [3, 4, 5]


@pytest.mark.parametrize("numbers", [(1, 1, 0, 1), (-1, 2, 0, 1), (0, 1, -1, 1), (0, 1, 0, -1)])
def test_an_impossible_share_is_refused(numbers: tuple[int, int, int, int]) -> None:
    rank, world_size, start, num_steps = numbers
    with pytest.raises(ValueError, match="0 <= rank < world_size"):
        RankSequence(plan_for([Size(1, 1)]), rank=rank, world_size=world_size, start=start, num_steps=num_steps)


def test_a_plan_without_records_or_short_edges_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one record"):
        plan_for([])
    with pytest.raises(ValueError, match="short_edges"):
        TrainPlan([Size(1, 1)], seed=0, batch_size=1, short_edges=[])
    with pytest.raises(ValueError, match="from 0"):
        plan_for([Size(1, 1)]).sub_batch(-1)


def test_repeats_of_one_leave_the_plan_as_it_is() -> None:
    sizes = some_sizes(12, 0.3)
    ones = TrainPlan(sizes, seed=1, batch_size=2, short_edges=[300], repeats=[1.0] * 12)
    plain = TrainPlan(sizes, seed=1, batch_size=2, short_edges=[300])
    assert [ones.sub_batch(number) for number in range(100)] == [plain.sub_batch(number) for number in range(100)]


def test_a_record_is_seen_as_often_as_repeats_say_and_every_record_in_every_pass() -> None:
    sizes = some_sizes(40, 0.3)
    repeats = np.ones(40)
    repeats[[3, 8]] = 2.5, 4.0
    plan = TrainPlan(sizes, seed=1, batch_size=1, short_edges=[300], repeats=repeats)
    passes = [Counter(plan.sub_batch(number).records[0] for number in range(start, start + plan.num_records))
              for start in range(0, 200 * plan.num_records, plan.num_records)]  # fmt: skip
    assert plan.num_records in (45, 46)  # 40 + 1.5 + 3, rounded up in both orientations
    assert {count[3] for count in passes} == {2, 3}
    assert all(len(count) == 40 for count in passes)
    assert sum(count[3] for count in passes) / 200 == pytest.approx(2.5, rel=0.1)
    assert sum(count[8] for count in passes) / 200 == pytest.approx(4.0, rel=0.1)


def test_with_repeats_any_sub_batch_is_reached_directly() -> None:
    options = {"seed": 5, "batch_size": 3, "short_edges": [300], "repeats": np.linspace(1, 3, 20)}
    walked, jumped = TrainPlan(some_sizes(20, 0.4), **options), TrainPlan(some_sizes(20, 0.4), **options)
    in_order = [walked.sub_batch(number) for number in range(300)]
    assert [jumped.sub_batch(number) for number in (299, 7, 150)] == [in_order[299], in_order[7], in_order[150]]


@pytest.mark.parametrize("repeats", [[1.0], [1.0, 0.5], [1.0, float("nan")]])
def test_repeats_below_one_or_of_another_number_are_refused(repeats: list[float]) -> None:
    with pytest.raises(ValueError, match="2 numbers of at least 1"):
        TrainPlan([Size(3, 4)] * 2, seed=0, batch_size=1, short_edges=[300], repeats=repeats)
