"""Workers of a loader that are killed or stopped, and workers whose process was killed."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from helpers.command_line import RUN, TINY, TINY_NETWORK
from helpers.fork_server import FORK_CHILDREN, ForkedProgram
from helpers.tiny_program import PROGRAM, Gate
from semseg.data import shared_slots
from semseg.data.loaders import WatchedLoader
from semseg.data.scenes import make_scenes
from semseg.data.workers import MAX_PAUSE_S, ItemWait, workers_of
from semseg.errors import DataError
from semseg.system.process import get_start_time

pytestmark = [pytest.mark.reliability, pytest.mark.usefixtures("short_grace")]


class Numbers(Dataset[Any]):
    """Twenty numbers; from number `slow` on each takes a minute, or fills the pipe to a process that does not read."""

    def __init__(self, slow: int = 20, *, is_large: bool = False) -> None:
        self.slow, self.is_large = slow, is_large

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        if self.is_large:
            return "x" * 2**20
        if index >= self.slow:
            time.sleep(60)
        return torch.tensor(index)


def loader(dataset: Dataset[Any], timeout_s: float = 60) -> WatchedLoader[Any]:
    return WatchedLoader(dataset, lambda number: [f"{number}.jpg"], timeout_s, batch_size=None, num_workers=2)


def workers(items: Iterator[Any]) -> list[int]:
    stream = items.gi_frame.f_locals["stream"]  # pyright: ignore[reportAttributeAccessIssue]
    return [worker.pid or 0 for worker in workers_of(stream)]


def wait_for(numbers: list[int], seconds: float) -> list[int]:
    """Those of the processes that still run after `seconds`; they are killed."""
    deadline = time.monotonic() + seconds
    while any(map(get_start_time, numbers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [number for number in numbers if get_start_time(number)]
    for number in left:
        os.kill(number, signal.SIGKILL)
    return left


def kill_and_compute(worker: int) -> None:
    """Kill a child, and compute until its end can be waited for, which may be a while after /proc calls it a zombie."""
    os.kill(worker, signal.SIGKILL)
    while os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        torch.ones(9).sum()  # nothing is raised here


def test_e10_a_worker_that_dies_while_the_network_computes_is_reported_at_the_next_item_with_its_images() -> None:
    items = iter(loader(Numbers()))
    assert int(next(items)) == 0
    killed = workers(items)[1]
    started = time.monotonic()
    kill_and_compute(killed)
    with pytest.raises(DataError, match=r"waiting for 1\.jpg, .*4\.jpg: .*was killed by signal SIGKILL\. "):
        next(items)
    assert time.monotonic() - started < 10


def test_e10_a_pipe_that_ends_with_its_worker_is_a_death_too() -> None:
    numbers = loader(Numbers(slow=1))
    items = iter(numbers)
    assert int(next(items)) == 0
    kill_and_compute(workers(items)[1])
    stream = items.gi_frame.f_locals["stream"]  # pyright: ignore[reportAttributeAccessIssue]
    explained = numbers._explain(EOFError(), 1, stream)  # as reading an item raises that is never complete
    assert re.search(r"waiting for 1\.jpg, .*was killed by signal SIGKILL", str(explained))


def test_e10_the_death_of_an_idle_worker_of_another_iteration_is_not_blamed_on_this_one() -> None:
    training, validation = iter(loader(Numbers())), iter(loader(Numbers()))
    assert int(next(training)) == int(next(validation)) == 0
    kill_and_compute(workers(training)[0])
    assert [int(item) for item in validation] == list(range(1, 20))
    with pytest.raises(DataError, match=r"1\.jpg"):
        next(training)


@pytest.mark.slow
def test_e10_a_stopped_worker_is_reported_after_the_patience_and_ends() -> None:
    items = iter(loader(Numbers(slow=1), timeout_s=0.3))
    assert int(next(items)) == 0
    numbers = workers(items)
    os.kill(numbers[1], signal.SIGSTOP)
    with pytest.raises(DataError, match="timed out"):
        list(items)
    assert not wait_for(numbers, 1)


@pytest.mark.slow
@pytest.mark.parametrize("is_large", [False, True])
def test_e10_workers_that_are_stopped_in_the_middle_of_an_item_are_reported_after_the_patience(is_large: bool) -> None:
    """The memory of a small item is fetched from its worker; of a large item the pipe has a part."""
    items = iter(loader(Numbers(is_large=is_large), timeout_s=0.2))
    next(items)
    numbers = workers(items)
    stream = items.gi_frame.f_locals["stream"]  # pyright: ignore[reportAttributeAccessIssue]
    waited_for = 1
    while len(stream._task_info[waited_for]) == 2:  # it came before those that `next` has returned
        next(items)
        waited_for += 1
    assert stream._worker_result_queue._reader.poll(60)
    for number in numbers:
        os.kill(number, signal.SIGSTOP)
    rescue = threading.Timer(30, lambda: [os.kill(number, signal.SIGCONT) for number in numbers])
    rescue.start()
    with pytest.raises(DataError, match=rf"waiting for {waited_for}\.jpg: DataLoader timed out.*data\.worker"):
        next(items)
    rescue.cancel()
    assert not wait_for(numbers, 1)


def test_e10_time_in_which_this_process_was_stopped_itself_is_not_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 1002.0, 1060.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    warned: list[float] = []
    wait = ItemWait(10.0, 6.0, warned.append)
    wait.check()
    wait.check()  # after a Ctrl-Z of a quarter of an hour
    assert warned == [2.0 + MAX_PAUSE_S]
    with pytest.raises(RuntimeError, match="DataLoader timed out after 12 s"):
        wait.check()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "state"),
    [
        ("fork", "idle"),
        ("fork", "busy"),
        ("fork", "blocked"),
        ("fork", "stopped"),
        pytest.param("forkserver", "busy", marks=pytest.mark.long),
    ],
)
def test_e7_workers_end_with_their_process_whatever_they_are_at(tmp_path: Path, state: str, method: str) -> None:
    program = tmp_path / "program.py"
    arguments = {"idle": "", "busy": "slow=1", "blocked": "is_large=True", "stopped": ""}[state]
    program.write_text(f"""
import multiprocessing, os, signal, time
from test_worker_deaths import Numbers, loader, workers
if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    items = iter(loader(Numbers({arguments}), 600))
    next(items)
    time.sleep(0.2)
    if "{state}" == "stopped":
        for number in workers(items):
            os.kill(number, signal.SIGSTOP)
    print(*workers(items), flush=True)
    time.sleep(60)
""")
    path = os.pathsep.join(map(str, [Path(__file__).parent, RUN.parent, RUN.parent / "tests"]))
    process = ForkedProgram([str(program)], tmp_path, {**os.environ, "PYTHONPATH": path})
    while "\n" not in process.read():
        assert process.poll() is None, process.read()
        time.sleep(0.02)
    numbers = [int(word) for word in process.read().split()]
    process.kill()
    process.wait(60)
    assert len(numbers) == 2
    assert not wait_for(numbers, 5)


def test_e10_without_locks_images_are_read_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_slots, "find_worker_obstacle", lambda: "Read-only file system")
    with pytest.warns(UserWarning, match="without workers.*no locks for them .Read-only file"):
        alone = loader(Numbers())
    assert alone.num_workers == 0
    assert [int(item) for item in alone] == list(range(20))


def test_e10_what_keeps_a_system_from_locks_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_slots.find_worker_obstacle() is None

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", refuse)
    assert shared_slots.find_worker_obstacle() == "Read-only file system"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_e10_a_killed_worker_ends_training_with_one_sentence(tmp_path: Path, ranks: int) -> None:
    make_scenes(tmp_path / "scenes", num_train=6, num_val=7, seed=304)
    words = [*TINY, *TINY_NETWORK, "data.num_workers=1", "data.steps_per_epoch=1000", "run_dir=run",
              f"trainer.devices={ranks}"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", FORK_CHILDREN: "1"}
    gate = Gate(tmp_path / "gate", step=2)
    job = ForkedProgram([str(PROGRAM), *words], tmp_path, environment | gate.variables)
    gate.wait(*range(ranks))
    trainer = children(job.pid)[-1] if ranks == 2 else job.pid
    os.kill(children(trainer)[-1], signal.SIGKILL)
    gate.open()
    assert job.wait(60) == 1
    errors = job.read()
    assert "Traceback" not in errors
    assert re.search(r"waiting for \S+\.jpg, .*: DataLoader worker .* was killed by signal SIGKILL", errors), errors


def children(parent: int) -> list[int]:
    """Process ids of the children of a process, the youngest last."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return sorted(found)
