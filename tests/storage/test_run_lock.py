"""One run per folder, whatever becomes of the process that holds it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from semseg.errors import ConfigError
from semseg.storage.run_lock import HOLDER_FILE, LOCK_FILE, hold_run_folder

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from semseg.storage.run_lock import hold_run_folder
with hold_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
# Many processes run for one folder again and again; who has it keeps it until all have tried.
RACE = """
import multiprocessing, sys
from pathlib import Path
from semseg.errors import ConfigError
from semseg.storage import run_lock
from semseg.storage.run_lock import hold_run_folder

run_lock.WAIT_SECONDS = 0

def race(folders, barrier, wins):
    for folder in folders:
        lock = hold_run_folder(folder)
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


def leave_holder(folder: Path, **changes: object) -> None:
    """Leave in `folder` what a killed run leaves: a lock that nobody holds, and the name of its holder."""
    content = {"pid": 7, "host": socket.gethostname(), "started": "2026-01-02T03:04:05+00:00", "command": "run.py"}
    (folder / LOCK_FILE).touch()
    (folder / HOLDER_FILE).write_text(json.dumps(content | changes))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a lock."""
    monkeypatch.setattr("semseg.storage.run_lock.WAIT_SECONDS", 0)


def test_the_holder_is_named_and_goes_with_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    with hold_run_folder(folder) as takeover:
        content = json.loads((folder / HOLDER_FILE).read_text())
        assert (content["pid"], content["host"]) == (os.getpid(), socket.gethostname())
        assert takeover is None
    assert list(folder.iterdir()) == []


def test_the_lock_goes_with_a_run_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), hold_run_folder(tmp_path):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.reliability
def test_f2_a_second_process_is_refused_with_pid_host_and_start_of_the_first(
    tmp_path: Path, holder: subprocess.Popen[str], impatient: None
) -> None:
    started = json.loads((tmp_path / HOLDER_FILE).read_text())["started"]
    with pytest.raises(ConfigError) as caught, hold_run_folder(tmp_path):
        pass
    message = str(caught.value)
    for part in (str(tmp_path), f"process {holder.pid} on {socket.gethostname()} since {started}", "another run_dir"):
        assert part in message
    assert "\n" not in message
    assert json.loads((tmp_path / HOLDER_FILE).read_text())["pid"] == holder.pid


def test_f2_a_second_run_in_the_same_process_is_refused_and_leaves_the_first_its_lock(
    tmp_path: Path, impatient: None
) -> None:
    with hold_run_folder(tmp_path):
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} "), hold_run_folder(tmp_path):
            pass
        assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE, HOLDER_FILE}


@pytest.mark.reliability
def test_f2_the_lock_of_a_killed_process_is_taken_over_at_once_and_reported(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGKILL)
    with hold_run_folder(tmp_path) as takeover:
        assert f"process {holder.pid}" in (takeover or "")
        assert "takes it over" in (takeover or "")
        assert json.loads((tmp_path / HOLDER_FILE).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.reliability
@pytest.mark.parametrize("content", ["", "not json", "[1]", "[" * 9999, '{"pid": "a"}', "\udcff", "null", None])
def test_f6_whatever_the_holder_file_says_a_lock_that_nobody_holds_is_taken(
    content: str | None, tmp_path: Path
) -> None:
    (tmp_path / LOCK_FILE).touch()
    if content is not None:
        (tmp_path / HOLDER_FILE).write_bytes(content.encode(errors="surrogateescape"))
    with hold_run_folder(tmp_path) as takeover:
        assert (takeover is None) == (content is None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.reliability
@pytest.mark.parametrize("content", ["", "not json", None])
def test_f6_whatever_the_holder_file_says_a_lock_that_somebody_holds_is_refused(
    content: str | None, tmp_path: Path, holder: subprocess.Popen[str], impatient: None
) -> None:
    (tmp_path / HOLDER_FILE).unlink()
    if content is not None:
        (tmp_path / HOLDER_FILE).write_text(content)
    with pytest.raises(ConfigError, match="in use by another process"), hold_run_folder(tmp_path):
        pass


@pytest.mark.reliability
@pytest.mark.parametrize("changes", [{"host": "before"}, {"pid": os.getppid()}, {"pid": 1, "pid_namespace": "pid:[1]"}])
def test_f6_a_container_with_a_new_host_name_or_the_same_process_ids_takes_over(
    changes: dict[str, object], tmp_path: Path
) -> None:
    leave_holder(tmp_path, **changes)
    with hold_run_folder(tmp_path) as takeover:
        assert "since 2026-01-02T03:04:05+00:00) ended without" in (takeover or "")


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(["unshare", "-pf", "true"], check=False, capture_output=True).returncode != 0,
    reason="needs process namespaces",
)
def test_f6_of_two_containers_with_one_host_name_the_second_is_refused(tmp_path: Path) -> None:
    command = ["unshare", "-pf", "--kill-child", "--mount-proc", sys.executable, "-c", HOLD, tmp_path]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "in use by process 1 on " in second.stderr and "in another container" in second.stderr
    first.kill()
    first.communicate()
    with hold_run_folder(tmp_path) as takeover:
        assert "takes it over" in (takeover or "")


@pytest.mark.reliability
def test_f6_a_forked_worker_that_outlives_a_killed_run_does_not_keep_its_folder(tmp_path: Path) -> None:
    code = HOLD.replace(
        "    time.sleep(60)", "    import os\n    os.write(1, f'{os.fork()}\\n'.encode())\n    time.sleep(60)"
    )
    run = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "held\n"
    worker = max(int(run.stdout.readline()) for _ in range(2))  # 0 in the worker
    run.kill()
    run.wait()
    os.kill(worker, 0)  # it is still there
    with hold_run_folder(tmp_path) as takeover:
        assert "takes it over" in (takeover or "")
    os.kill(worker, signal.SIGKILL)
    run.stdout.close()


@pytest.mark.reliability
def test_e6_a_requeued_slurm_job_takes_over_what_its_last_attempt_still_seems_to_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="in use"), hold_run_folder(tmp_path):  # another step of the same attempt
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with hold_run_folder(tmp_path) as takeover:
        assert f"process {process.pid}" in (takeover or "")
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("is_stale", [False, True])
def test_f2_of_processes_that_race_exactly_one_gets_the_folder(is_stale: bool, tmp_path: Path) -> None:
    for index in range(60):
        folder = tmp_path / f"{index:02}"
        folder.mkdir()
        if is_stale:
            leave_holder(folder)
    subprocess.run([sys.executable, "-c", RACE, tmp_path], cwd=ROOT, check=True, timeout=60)


@pytest.mark.reliability
def test_f2_a_forked_child_and_a_thread_that_end_do_not_give_the_folder_back(tmp_path: Path) -> None:
    held = hold_run_folder(tmp_path)
    with held:
        child = os.fork()
        if child == 0:
            held.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE, HOLDER_FILE}


def test_a_lock_deleted_by_hand_and_taken_by_another_stays_with_the_other(tmp_path: Path) -> None:
    with hold_run_folder(tmp_path):
        (tmp_path / LOCK_FILE).unlink()
        with hold_run_folder(tmp_path):
            pass
        other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None and other.stdout.readline() == "held\n"
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE, HOLDER_FILE}
    other.kill()
    other.communicate()


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
        with pytest.raises(ConfigError) as caught, hold_run_folder(folder):
            pass
        Path(parent).chmod(0o755)
    assert str(caught.value) == (
        f"run_dir={folder}: this folder cannot be written (Permission denied). Give another run_dir."
    )


def test_b4_a_file_in_place_of_the_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="File exists"), hold_run_folder(tmp_path / "run"):
        pass


@pytest.mark.reliability
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_f6_a_file_system_without_locks_is_reported_and_does_not_stop_the_run(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.warns(UserWarning, match=r"this file system has no locks \("), hold_run_folder(tmp_path) as takeover:
        assert takeover is None
    assert not (tmp_path / HOLDER_FILE).exists()
