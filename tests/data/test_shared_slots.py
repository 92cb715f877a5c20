"""Items from workers arrive unchanged, through slots or by PyTorch's own mechanism."""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from helpers.fork_server import run_python
from semseg.data import shared_slots
from semseg.data.batch import Batch
from semseg.data.loaders import PREFETCH, SlotDemand, WatchedLoader
from semseg.data.shared_slots import SharedSlots, SlotAddress, read_tensor, write_tensor

COUNT = 40
DEMAND = SlotDemand(tensors_per_item=1, bytes_per_tensor=3 * 12 * 16)


class Numbered(Dataset[Batch]):
    """Batch number n is filled with n and has a size of its own."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> Batch:
        image = torch.full((1, 3, 8 + number % 5, 16), number, dtype=torch.uint8)
        return Batch(image, torch.full((1, 2, 2), number), torch.tensor([[8, 16]]), [f"{number}.jpg"])


def loader(workers: int, demand: SlotDemand | None = DEMAND) -> WatchedLoader[Batch]:
    return WatchedLoader(Numbered(), lambda _: [], 60, demand, batch_size=None, num_workers=workers)


def assert_right(batches: Iterator[Batch]) -> None:
    held = list(batches)  # all at once: what was read is no longer in a slot
    for number, batch in enumerate(held):
        expected = Numbered()[number]
        assert torch.equal(batch.image, expected.image)
        assert torch.equal(batch.label, expected.label)
        assert batch.paths == expected.paths
    assert len(held) == COUNT


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[SharedSlots]:
    """This process as a worker with two slots of twelve bytes."""
    monkeypatch.setattr(shared_slots._registry, "writer", None)
    slots = SharedSlots(1, 2, 12)
    slots.attach_worker(0)
    yield slots


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_everything_goes_through_slots(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = SharedSlots.write

    def write_always(self: SharedSlots, tensor: Tensor) -> SlotAddress:
        address = write(self, tensor)
        assert address is not None, "PyTorch's own mechanism was used"
        return address

    monkeypatch.setattr(SharedSlots, "write", write_always)
    assert_right(iter(loader(workers)))


def test_everything_goes_through_slots_in_inference_mode() -> None:
    with torch.inference_mode():  # as Lightning validates and tests
        assert_right(iter(loader(2)))


def test_a_slot_is_used_again_after_it_was_read(worker: SharedSlots) -> None:
    first, second, third = (torch.full((2, 3), number, dtype=torch.uint8) for number in range(3))
    written = [write_tensor(first), write_tensor(second), write_tensor(third)]
    assert [type(item) for item in written] == [SlotAddress, SlotAddress, Tensor]
    assert torch.equal(read_tensor(written[1]), second)
    rewritten = write_tensor(third)
    assert isinstance(rewritten, SlotAddress) and rewritten == written[1]
    assert torch.equal(read_tensor(rewritten), third) and torch.equal(read_tensor(written[0]), first)


def test_tensors_that_do_not_fit_are_left_to_pytorch(worker: SharedSlots) -> None:
    for tensor in (torch.zeros(13, dtype=torch.uint8), torch.zeros(4)):
        assert write_tensor(tensor) is tensor
        assert read_tensor(tensor) is tensor
    empty = read_tensor(write_tensor(torch.zeros(0, 4, dtype=torch.uint8)))
    assert empty.shape == (0, 4)


def test_an_image_that_was_left_out_arrives_as_an_empty_label(worker: SharedSlots) -> None:
    arrived = read_tensor(write_tensor(torch.zeros(0, dtype=torch.uint8)))
    assert arrived.view(torch.int16).shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("demand", [None, SlotDemand(1, 10)], ids=["no slots", "slots that are too small"])
def test_without_slots_everything_arrives_as_well(demand: SlotDemand | None) -> None:
    assert_right(iter(loader(2, demand)))


def test_processes_that_inherit_nothing_have_no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loader(2)._allocate_slots() is not None
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: "spawn")
    assert loader(2)._allocate_slots() is None


@pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")
def test_workers_are_forks_unless_the_program_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: None)
    assert loader(2).multiprocessing_context.get_start_method() == "fork"
    monkeypatch.setattr(sys, "version_info", (3, 14))
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: "forkserver")  # Python's choice from then on
    assert loader(2).multiprocessing_context.get_start_method() == "fork"
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: "spawn")
    assert loader(2).multiprocessing_context.get_start_method() == "spawn"


@pytest.mark.slow
def test_two_iterations_of_one_loader_do_not_meet() -> None:
    one = loader(2)
    first = iter(one)
    begun = [next(first) for _ in range(3)]
    assert_right(iter(one))
    assert_right(iter([*begun, *first]))


def test_memory_is_used_only_for_what_is_written() -> None:
    mappings = Path("/proc/self/smaps")
    if not mappings.exists():
        pytest.skip("needs Linux's account of memory")
    slots = SharedSlots(3, PREFETCH, 2**27)

    def resident() -> int:
        """KiB of the slots that are in memory; other mappings of the process do not count."""
        blocks = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", mappings.read_text())
        size = f"{3 * PREFETCH * 2**17} kB"
        (own,) = (block for block in blocks if re.search(rf"^Size: +{size}$", block, re.MULTILINE))
        return int(own.split("Rss:")[1].split()[0])

    assert resident() == 0
    slots._free = [0]
    assert slots.write(torch.ones(2**24, dtype=torch.uint8)) is not None
    assert resident() == 2**14


LEAVE = """
import torch
from torch.utils.data import TensorDataset
from semseg.data.loaders import WatchedLoader

data = TensorDataset(torch.arange(100))
items = iter(WatchedLoader(data, lambda _: [], 60, batch_size=None, num_workers=2))
print(next(items))
"""


def test_a_program_may_end_with_an_unfinished_iteration(tmp_path: Path) -> None:
    ended = run_python("-c", LEAVE, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "[tensor(0)]\n")
