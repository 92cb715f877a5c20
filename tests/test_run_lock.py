"""One run per folder, whatever becomes of the process that holds it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from semseg.errors import ConfigError
from semseg.run_lock import LOCK_FILE, RunLock, is_running, start_of

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys, time
from pathlib import Path
from semseg.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
# Many processes run for one folder again and again; who has it keeps it until all have tried.
RACE = """
import multiprocessing, sys
from pathlib import Path
from semseg.errors import ConfigError
from semseg.run_lock import RunLock

def race(folders, barrier, wins):
    for folder in folders:
        lock = RunLock(folder)
        barrier.wait()
        try:
            lock.__enter__()
        except ConfigError:
            barrier.wait()
        else:
            wins.put(folder.name)
            barrier.wait()
            lock.__exit__(None, None, None)

fork = multiprocessing.get_context("fork")
folders = sorted(Path(sys.argv[1]).iterdir())
barrier, wins = fork.Barrier(4), fork.SimpleQueue()
racers = [fork.Process(target=race, args=(folders, barrier, wins)) for _ in range(4)]
for racer in racers:
    racer.start()
names = [wins.get() for _ in folders]
for racer in racers:
    racer.join()
assert wins.empty()
assert sorted(names) == [folder.name for folder in folders], names
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def lock_of(folder: Path, **changes: object) -> None:
    """Leave in `folder` the lock of a process that had the id of this one and has ended, but for `changes`."""
    content = {"pid": os.getpid(), "host": socket.gethostname(), "started": "2026-01-02T03:04:05+00:00"}
    content |= {"command": "run.py", "process_start": 1, **changes}
    (folder / LOCK_FILE).write_text(json.dumps(content))


def test_the_lock_says_who_holds_the_folder_and_goes_with_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    with RunLock(folder) as lock:
        content = json.loads((folder / LOCK_FILE).read_text())
        assert (content["pid"], content["host"]) == (os.getpid(), socket.gethostname())
        assert content["process_start"] == start_of(os.getpid())
        assert lock.takeover is None
    assert list(folder.iterdir()) == []


def test_the_lock_goes_with_a_run_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunLock(tmp_path):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.reliability
def test_f2_a_second_process_is_refused_with_pid_host_and_start_of_the_first(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    started = json.loads((tmp_path / LOCK_FILE).read_text())["started"]
    with pytest.raises(ConfigError) as caught, RunLock(tmp_path):
        pass
    message = str(caught.value)
    for part in (str(tmp_path), f"process {holder.pid} on {socket.gethostname()} since {started}", "another run_dir"):
        assert part in message
    assert "\n" not in message
    assert (tmp_path / LOCK_FILE).exists()


def test_f2_a_second_run_in_the_same_process_is_refused_and_leaves_the_first_its_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} "), RunLock(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.reliability
def test_f2_the_lock_of_a_killed_process_is_taken_over_and_told(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    wait_for_the_end(holder.pid)
    with RunLock(tmp_path) as lock:
        assert f"process {holder.pid}" in (lock.takeover or "")
        assert "takes it over" in (lock.takeover or "")
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def wait_for_the_end(pid: int) -> None:
    """Until a process has ended, without asking the system for its exit code: it stays behind as a zombie."""
    deadline = time.monotonic() + 5
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.reliability
def test_f2_a_process_with_the_id_of_a_dead_one_does_not_keep_its_lock(tmp_path: Path) -> None:
    start = start_of(os.getppid())
    lock_of(tmp_path, pid=os.getppid(), process_start=start)
    with pytest.raises(ConfigError, match="in use"), RunLock(tmp_path):
        pass
    lock_of(tmp_path, pid=os.getppid(), process_start=(start or 0) - 1)
    with RunLock(tmp_path) as lock:
        assert lock.takeover is not None


@pytest.mark.reliability
def test_f2_a_lock_of_another_host_is_refused_with_the_way_out(tmp_path: Path) -> None:
    lock_of(tmp_path, host="elsewhere")
    with pytest.raises(ConfigError, match=r"on elsewhere .*cannot be told.*delete .*run\.lock"), RunLock(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.reliability
def test_e6_a_requeued_slurm_job_takes_over_what_its_last_attempt_left_on_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_of(tmp_path, host="elsewhere", slurm_job="77")
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    with pytest.raises(ConfigError, match="on elsewhere"), RunLock(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with RunLock(tmp_path) as lock:
        assert lock.takeover is not None


@pytest.mark.parametrize("content", ["", "not json", "[1]", '{"pid": 1}', '{"pid": "a"}', "\udcff", "null"])
def test_a_lock_that_does_not_say_whose_it_is_is_refused(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semseg.run_lock.UNREADABLE_SECONDS", 0.1)
    (tmp_path / LOCK_FILE).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"does not say who.*delete that file"), RunLock(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).exists()


def test_a_lock_that_is_just_being_written_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    path.touch()
    writer = threading.Timer(0.2, lock_of, args=(tmp_path,), kwargs={"host": "elsewhere"})
    writer.start()
    with pytest.raises(ConfigError, match="on elsewhere"), RunLock(tmp_path):
        pass
    writer.join()


@pytest.mark.reliability
@pytest.mark.parametrize("is_stale", [False, True])
def test_f2_of_processes_that_race_exactly_one_gets_the_folder(is_stale: bool, tmp_path: Path) -> None:
    for index in range(60):
        folder = tmp_path / f"{index:02}"
        folder.mkdir()
        if is_stale:
            lock_of(folder)
    subprocess.run([sys.executable, "-c", RACE, tmp_path], cwd=ROOT, check=True, timeout=60)


@pytest.mark.reliability
def test_f2_a_forked_child_and_a_thread_that_end_do_not_give_the_folder_back(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        child = os.fork()
        if child == 0:
            lock.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        assert (tmp_path / LOCK_FILE).exists()


def test_a_lock_deleted_by_hand_and_taken_by_another_stays_with_the_other(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / LOCK_FILE).unlink()
        lock_of(tmp_path)
    assert (tmp_path / LOCK_FILE).exists()


@pytest.fixture
def nobody() -> Iterator[None]:
    """A user whom the permissions of files hold for."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.reliability
@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("name", [".", "new"])
def test_b4_a_folder_that_cannot_be_written_is_refused_with_one_line(name: str) -> None:
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o555)
        folder = Path(parent, name)
        with pytest.raises(ConfigError) as caught, RunLock(folder):
            pass
        Path(parent).chmod(0o755)
    assert str(caught.value) == (
        f"run_dir={folder}: this folder cannot be written (Permission denied). Give another run_dir."
    )


def test_b4_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="File exists"), RunLock(tmp_path / "run"):
        pass


def test_a_stale_lock_on_a_file_system_without_locks_is_left_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    lock_of(tmp_path)
    monkeypatch.setattr("semseg.run_lock.fcntl.flock", unsupported)
    with pytest.raises(ConfigError, match=r"has ended.*not implemented.*Delete .*run\.lock"), RunLock(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).exists()
