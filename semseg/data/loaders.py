"""DataLoaders that report what they wait for and what a worker raised, and that leave no worker behind."""

from __future__ import annotations

import atexit
import itertools
import math
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import wait
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from semseg.data import shared_slots
from semseg.data.batch import Batch
from semseg.data.datasets import TrainDataset
from semseg.data.plan import RankSequence, TrainPlan
from semseg.data.shared_slots import SharedSlots
from semseg.data.waiting import checking_while_waiting
from semseg.data.workers import (
    GRACE_S,
    ItemWait,
    LoaderFailure,
    WorkerSetup,
    classify_failure,
    describe_death,
    install_death_handler,
    limit_waiting,
    original_message,
    parent_of_workers,
    raising_for_dead_workers,
    stop_workers,
    workers_of,
)
from semseg.errors import DataError, SemsegError
from semseg.system.process import SIGCHLD

Item = TypeVar("Item")
POLL_S = 2.0  # seconds after which a DataLoader that waits checks its workers
SLOW_ITEM_S = 60.0  # seconds without an item, after which a warning names what is waited for
PREFETCH = 2  # items that every worker prepares in advance, DataLoader's prefetch_factor


class SlotDemand(NamedTuple):
    """Tensors of an item that go through shared slots."""

    tensors_per_item: int
    bytes_per_tensor: int  # size of the largest tensor


class ReadAhead(Iterator[Item]):
    """The items of an iterator; a thread reads the next one while the last one is used.

    An error is raised where its item would have been returned.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._found: list[Item] = []
        self._error: BaseException | None = None
        self._start()

    def __next__(self) -> Item:
        self._thread.join()
        if self._error is not None:
            raise self._error
        item = self._found.pop()
        self._start()
        return item

    def _start(self) -> None:
        # A thread for each item, so that none is left when the last one was taken. It does not keep a process alive.
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self._found.append(next(self._items))
        except BaseException as error:  # also the end of the items
            self._error = error


class WatchedLoader(DataLoader[Item]):
    """A DataLoader that names the images it was waiting for when a worker dies, or when nothing arrives for too long.

    Args:
        images_of: the images of item number n of an iteration.
        timeout_s: seconds to wait for an item; 0: for ever.
        slots: what to allocate for shared slots, which are used if that is possible; None: PyTorch's own mechanism.
        is_ahead: without workers, read the next item while the last one is used. Workers always do.
    """

    def __init__(
        self,
        dataset: Dataset[Item],
        images_of: Callable[[int], list[str]],
        timeout_s: float,
        slots: SlotDemand | None = None,
        *,
        is_ahead: bool = False,
        **options: Any,
    ) -> None:
        obstacle = shared_slots.find_worker_obstacle() if options["num_workers"] else None
        if obstacle is not None:
            rank_zero_warn(f"images are read without workers: the system provides no locks for them ({obstacle}).")
            options["num_workers"] = 0
        self._setup = WorkerSetup()
        if options["num_workers"]:
            # DataLoader checks its workers each time that it has waited this long.
            options |= {"timeout": POLL_S, "multiprocessing_context": shared_slots.worker_start_method()}
        super().__init__(dataset, worker_init_fn=self._setup, **options)
        self._images_of, self.timeout_s, self._slots = images_of, timeout_s or math.inf, slots
        self.is_ahead = is_ahead

    def __iter__(self) -> Iterator[Item]:  # pyright: ignore[reportIncompatibleMethodOverride]
        items = self._iterate()
        _live_iterations.add(items)
        return items

    def _iterate(self) -> Generator[Item, None, None]:
        # The slots belong to this iteration: a local variable keeps them until it ends.
        slots = self._setup.slots = self._allocate_slots()
        self._setup.parent = parent_of_workers() if self.num_workers else None
        previous = None if SIGCHLD is None else signal.getsignal(SIGCHLD)
        stream = super().__iter__()
        install_death_handler(previous)
        limit_waiting(stream)
        items = ReadAhead(stream) if self.is_ahead and not self.num_workers else stream
        try:
            for number in itertools.count():
                try:
                    item = self._next_item(items, number)
                except StopIteration:
                    return
                except Exception as error:
                    explained = self._explain(error, number, stream)
                    if explained is None:
                        raise
                    raise explained from error
                yield item
        finally:
            # However the iteration ends: the traceback of an error keeps the workers referenced, and so alive.
            stop_workers(stream)
            del slots

    def _explain(self, error: Exception, number: int, stream: Iterator[Item]) -> SemsegError | None:
        """The user's error for one that a worker caused; None if this process caused it."""
        failure = classify_failure(error)
        if failure is LoaderFailure.RAISED:
            message = original_message(error)
            if isinstance(error, SemsegError):
                return type(error)(message)
            images = ", ".join(self._images_of(number))
            return DataError(f"{images}: a data-loading worker failed: {message} (data.num_workers=0 shows where).")
        is_broken_pipe = isinstance(error, OSError | EOFError)
        if failure is None and is_broken_pipe and wait([worker.sentinel for worker in workers_of(stream)], GRACE_S):
            failure = LoaderFailure.DIED  # while it was sending an item, which is lost
        if failure is None:
            return None
        reason = next(iter(str(error).splitlines()), "").rstrip(". ")  # an EOFError has no text
        if failure is LoaderFailure.DIED:  # PyTorch does not say which signal has killed a worker
            reason = describe_death(stream) or "DataLoader worker exited unexpectedly"
        images = ", ".join(self._images_in_work(number, failure))
        return DataError(
            f"waiting for {images}: {reason}. Check that the file can be read and that there is enough memory; "
            "data.num_workers=0 shows more, data.worker_timeout_s sets how long to wait."
        )

    def _images_in_work(self, number: int, failure: LoaderFailure) -> list[str]:
        """The images that a worker may have been reading when it ended, or those of item `number` on a timeout."""
        # Items that a worker had finished may be lost with it, so that it may have ended at any item in progress.
        is_dead = failure is LoaderFailure.DIED
        last = min(len(self), number + PREFETCH * self.num_workers) if is_dead else number + 1
        return [image for item in range(number, last) for image in self._images_of(item)]

    def _allocate_slots(self) -> SharedSlots | None:
        """Slots for all items that the workers prepare in advance, including those in progress."""
        if self._slots is None or not self.num_workers or not shared_slots.slots_are_possible():
            return None
        try:
            return SharedSlots(self.num_workers, PREFETCH * self._slots.tensors_per_item, self._slots.bytes_per_tensor)
        except OSError:  # a system that does not overcommit memory
            return None

    def _next_item(self, stream: Iterator[Item], number: int) -> Item:
        """The next item.

        Raises:
            RuntimeError: as `classify_failure` recognises, if a worker is dead or the patience is over.
        """

        def warn(waited_s: float) -> None:
            images = ", ".join(self._images_of(number))
            warnings.warn(f"has been waiting for {images} for {waited_s:.0f} s. Is the disk slow?", stacklevel=1)

        wait = ItemWait(self.timeout_s, SLOW_ITEM_S, warn)
        while True:
            try:
                with raising_for_dead_workers(stream), checking_while_waiting(wait.check):
                    return next(stream)
            except RuntimeError as error:
                if classify_failure(error) is not LoaderFailure.TIMED_OUT:
                    raise
                wait.check()


_live_iterations: WeakSet[Generator[Any, None, None]] = WeakSet()  # iterations whose workers may be alive


@atexit.register
def close_iterations() -> None:
    """Stop the workers of unfinished iterations; see `stop_workers`."""
    for items in list(_live_iterations):
        items.close()


class SubBatchLoader:
    """This rank's part of the endless sequence of sub-batches, cut into epochs of equal length.

    Its only state is the number of sub-batches that all ranks together have taken. Workers continue from epoch to
    epoch, and a resumed run starts them at the next sub-batch.
    """

    def __init__(
        self,
        dataset: TrainDataset,
        plan: TrainPlan,
        *,
        rank: int,
        world_size: int,
        steps: int,
        num_workers: int,
        timeout_s: float = 0,
        max_image_bytes: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        self.rank = rank
        self.world_size = world_size
        self.steps = steps
        self.num_workers, self.timeout_s = num_workers, timeout_s
        self.pin_memory = pin_memory
        self.slots = None if max_image_bytes is None else SlotDemand(1, max_image_bytes)
        self.taken = 0  # sub-batches of all ranks since the run began
        self._stream: Iterator[Batch] | None = None

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        """The next epoch."""
        if self._stream is None:
            self._stream = iter(self.loader_from(self.taken))
        for _ in range(self.steps):
            batch = next(self._stream)
            # Counted here, where batches are used: workers prepare later ones already.
            self.taken += self.world_size
            yield batch

    def loader_from(self, taken: int) -> DataLoader[Batch]:
        """All sub-batches of this rank after the first `taken` ones of the plan."""
        sequence = RankSequence(
            self.plan, rank=self.rank, world_size=self.world_size, start=0, num_steps=sys.maxsize, first=taken
        )

        def images_of(number: int) -> list[str]:
            return [self.dataset.records[index].image for index in sequence[number].records]

        return WatchedLoader(
            self.dataset,  # pyright: ignore[reportArgumentType] - indexed by sub-batches, not numbers
            images_of,
            self.timeout_s,
            self.slots,
            batch_size=None,
            sampler=sequence,  # pyright: ignore[reportArgumentType]
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    def close(self) -> None:
        """Stop the workers."""
        self._stream = None

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = parse_taken(state, self.world_size)
        self.close()


def parse_taken(state: dict[str, Any], world_size: int) -> int:
    """The sub-batches that all ranks have taken, from a saved state; the first release saved steps instead."""
    return int(state["taken"]) if "taken" in state else int(state["position"]) * world_size
