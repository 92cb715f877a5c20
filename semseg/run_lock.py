"""One run per folder: a lock file that says who is using it. Knows no torch, so it is taken before anything slow.

The lock is a file made with O_CREAT | O_EXCL, not a kernel lock (flock). Creating a file is atomic on local disks and
on the shared file systems of clusters, whereas flock is often local to one machine there, or missing; and a data
loading process that outlives a killed run would inherit a kernel lock and keep it. The price is that a killed run
leaves its file behind. The file therefore names the process exactly, and on the same host a dead one is replaced.
There flock does serve, to let one process at a time replace a file: only processes of one host ever compete for that.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from semseg.errors import ConfigError

LOCK_FILE = "run.lock"  # in the run folder
# A lock file is empty between its creation and its first write; one that stays unreadable longer is damaged.
UNREADABLE_SECONDS = 1.0
POLL_SECONDS = 0.05


class Holder(NamedTuple):
    """The process that a lock file names."""

    pid: int
    host: str  # containers that share a folder need host names of their own, which they have by default
    started: str  # of the run: local time, ISO 8601
    command: str
    process_start: int | None  # clock ticks after boot; tells a process from a later one with its id. None: not known
    slurm_job: str | None = None  # number of the SLURM job, if it is one

    def is_same_job(self) -> bool:
        """Whether it was an earlier attempt of this very job: SLURM requeues a job once the attempt before ended."""
        return self.slurm_job is not None and self.slurm_job == os.environ.get("SLURM_JOB_ID")

    def is_this_host(self) -> bool:
        return self.host == socket.gethostname()


class RunLock:
    """Holds a run folder for this process: `with RunLock(run_dir) as lock: ...`.

    Entering makes the folder and takes the lock; `lock.takeover` is then a line to log if a dead run had left its lock
    behind, else None. Leaving gives the lock back. Only the process that entered does so: a forked child that leaves
    the block changes nothing, and neither does the end of a thread.

    Raises (on entering):
        ConfigError: if another process holds the folder, if that cannot be told, or if the folder cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = run_dir / LOCK_FILE
        self.takeover: str | None = None
        self._mine: Holder | None = None

    def __enter__(self) -> RunLock:
        mine = _this_process()
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            while not _create(self.path, mine):
                with contextlib.suppress(FileNotFoundError):  # it has just gone
                    self._make_way()
        except OSError as error:
            raise ConfigError(
                f"run_dir={self.run_dir}: this folder cannot be written ({error.strerror}). Give another run_dir."
            ) from error
        self._mine = mine
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A forked child has a copy of this object, and a lock file deleted by hand may be somebody else's by now.
        # Where the file system has gone away, the file is left to be taken over.
        with contextlib.suppress(OSError):
            if self._mine is not None and self._mine.pid == os.getpid() and _read(self.path) == self._mine:
                self.path.unlink()
        self._mine = None

    def _make_way(self) -> None:
        """Remove the lock file that a dead process of this host left.

        Raises:
            ConfigError: if it is anybody else's.
            FileNotFoundError: if it has gone.
        """
        holder = _read_patiently(self.path)
        if holder is None:
            raise ConfigError(
                f"run_dir={self.run_dir}: {self.path} is there, but does not say who holds this folder. "
                "Give another run_dir, or delete that file if no run uses the folder."
            )
        if not holder.is_this_host() and not holder.is_same_job():
            raise ConfigError(
                f"{self._in_use_by(holder)} Whether it still runs cannot be told from this host. Give another run_dir, "
                f"wait until it has ended, or delete {self.path} if it no longer runs."
            )
        if holder.is_this_host() and is_running(holder.pid, holder.process_start):
            raise ConfigError(f"{self._in_use_by(holder)} Give another run_dir, or wait until it has ended.")
        try:
            _remove_stale(self.path, holder)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConfigError(
                f"run_dir={self.run_dir}: process {holder.pid}, which held this folder since {holder.started}, has "
                f"ended, but its lock cannot be removed ({error.strerror}). Delete {self.path}."
            ) from error
        self.takeover = (
            f"{self.run_dir}: process {holder.pid}, which held this folder since {holder.started}, ended without "
            "giving it back; this run takes it over"
        )

    def _in_use_by(self, holder: Holder) -> str:
        return (
            f"run_dir={self.run_dir}: in use by process {holder.pid} on {holder.host} since {holder.started} "
            f"({holder.command})."
        )


def is_running(pid: int, start: int | None = None) -> bool:
    """Whether a process of this host runs, and began at `start` if that is given (see `start_of`).

    A process that has ended but was not waited for by its parent does not run.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is somebody else's
    fields = _stat_fields(pid)
    if not fields:
        return True
    return fields[0] not in "ZX" and start in (None, int(fields[19]))


def start_of(pid: int) -> int | None:
    """When a process of this host began, in clock ticks after boot; None where the system does not tell."""
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else None


def _stat_fields(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third one (the state) on; none where there is no such file."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return stat.rpartition(")")[2].split()  # the second field, the name in brackets, may hold anything


def _this_process() -> Holder:
    return Holder(
        pid=os.getpid(),
        host=socket.gethostname(),
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=shlex.join(sys.argv)[:200],
        process_start=start_of(os.getpid()),
        slurm_job=os.environ.get("SLURM_JOB_ID"),
    )


def _create(path: Path, holder: Holder) -> bool:
    """Make the lock file; False if there is one already."""
    try:
        file = path.open("x", encoding="utf-8")  # O_CREAT | O_EXCL
    except FileExistsError:
        return False
    try:
        with file:
            file.write(json.dumps(holder._asdict()) + "\n")
    except BaseException:
        path.unlink()
        raise
    return True


def _read(path: Path) -> Holder | None:
    """The process that a lock file names; None if it names none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        holder = Holder(**content)
        valid = 0 < holder.pid < 2**31 and isinstance(holder.pid, int) and isinstance(holder.host, str)
    except (ValueError, TypeError):
        return None
    return holder if valid else None


def _read_patiently(path: Path) -> Holder | None:
    """As `_read`, giving a process that has just made the file the time to write it."""
    deadline = time.monotonic() + UNREADABLE_SECONDS
    while (holder := _read(path)) is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return holder


def _remove_stale(path: Path, holder: Holder) -> None:
    """Remove the lock file of a dead process of this host, unless another process has done so.

    Raises:
        OSError: if it has gone, or cannot be opened, locked or removed.
    """
    descriptor = os.open(path, os.O_RDWR)  # NFS asks for a writable file to lock it exclusively
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Before it got here, another process may have put a lock of its own in place of the stale one.
        if _read(path) == holder:
            path.unlink()
    finally:
        os.close(descriptor)
