"""One run per folder: an operating-system lock on run.lock, held for the life of the run. No torch.

The kernel releases the lock when the process ends, for whatever reason, so no lock is ever stale. Forked children
close the descriptor (filelock does that): a loader worker that outlives a killed run does not keep the folder. The file
beside it names the holder for messages only; its content decides nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import socket
import sys
import warnings
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from filelock import FileLock, Timeout

from semseg.errors import ConfigError
from semseg.storage.atomic import DISK_FULL, atomic_write
from semseg.system.text import escape_unprintable

LOCK_FILE, HOLDER_FILE = "run.lock", "run.holder.json"  # in the run folder
# Time for the last process of a killed run to end, and for a holder file that is being written.
WAIT_SECONDS = 2.0
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def on_lock_acquired() -> None:
    """Called by RunLock once it holds its folder; replaced by callers that write files into the folder only then."""


class Holder(NamedTuple):
    """The process that holds, or held, a run folder."""

    pid: int
    host: str
    started: str  # local time, ISO 8601
    command: str
    pid_namespace: str = ""  # identifies the container, since process ids repeat in other containers
    slurm_job: str | None = None
    slurm_restart: int = 0  # number of times SLURM has requeued the job

    def __str__(self) -> str:
        host = f"{self.host}, in another container" if self.is_in_another_container() else self.host
        return escape_unprintable(f"process {self.pid} on {host}")

    def is_in_another_container(self) -> bool:
        return self.host == socket.gethostname() and self.pid_namespace != _read_pid_namespace()

    def is_earlier_attempt_of(self, other: Holder) -> bool:
        """Whether SLURM ended this process before it requeued the job, even if the file system still shows its lock."""
        return (
            self.slurm_job is not None
            and self.slurm_job == other.slurm_job
            and self.slurm_restart < other.slurm_restart
        )


class RunLock:
    """Holds a run folder for this process: `with RunLock(run_dir) as lock: ...`.

    Entering creates the folder and takes the lock; `lock.takeover` is then a line to log if the previous run ended
    without releasing it, else None. On a file system without locks it warns, and nothing is held.

    Raises (on entering):
        ConfigError: if another process holds the folder, or if the folder cannot be written.
        OSError: if the disk is full.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.takeover: str | None = None
        self.path, self._holder_path = run_dir / LOCK_FILE, run_dir / HOLDER_FILE
        self._lock: FileLock | None = None
        self._inode = 0
        self._this_process = _describe_this_process()

    def __enter__(self) -> RunLock:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise ConfigError(
                f"run_dir={self.run_dir}: this folder cannot be written ({error.strerror}). Give another run_dir."
            ) from error
        if self._lock is not None and self._holder_path.exists():
            before = _read_holder(self._holder_path)
            who = f"{before}, which held this folder since {before.started}," if before else "the previous run"
            self.takeover = f"{self.run_dir}: {who} ended without releasing it; this run takes it over"
        with contextlib.suppress(OSError), atomic_write(self._holder_path, durable=False) as temporary:
            temporary.write_text(json.dumps(self._this_process._asdict()) + "\n", encoding="utf-8")
        try:
            on_lock_acquired()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._this_process.pid != os.getpid():
            return  # a forked child has a copy of this object
        # If the file system is gone, the holder file stays and is taken over.
        with contextlib.suppress(OSError):
            if _read_holder(self._holder_path) == self._this_process:
                self._holder_path.unlink()
            # After a deletion by hand, the path may be the lock of another process.
            if self._lock is not None and self.path.stat().st_ino == self._inode:
                self.path.unlink()  # filelock does not lock a removed file
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._lock.release()

    def _acquire(self) -> None:
        # filelock would fall back to a soft lock, a file with a process id, which is stale after a kill.
        lock = FileLock(self.path, fallback_to_soft=False)
        try:
            try:
                lock.acquire(timeout=WAIT_SECONDS)
            except Timeout:
                holder = _read_holder(self._holder_path)
                if holder is None or not holder.is_earlier_attempt_of(self._this_process):
                    raise ConfigError(self._in_use_message(holder)) from None
                self.path.unlink(missing_ok=True)  # the file system keeps the lock of a failed node
                lock.acquire(timeout=WAIT_SECONDS)
        except Timeout:
            raise ConfigError(self._in_use_message(None)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"run_dir={self.run_dir}: this file system has no locks ({error.strerror}), so a second run in the "
                "folder would go unnoticed",
                stacklevel=1,
            )
            return
        self._lock, self._inode = lock, self.path.stat().st_ino

    def _in_use_message(self, holder: Holder | None) -> str:
        if holder is None:
            return (
                f"run_dir={self.run_dir}: in use by another process. Give another run_dir, or wait until it has ended."
            )
        way_out = "Give another run_dir, or wait until it has ended."
        if holder.host != socket.gethostname():
            way_out += f" If that machine has failed and the lock stays, delete {self.path}."
        command = escape_unprintable(holder.command)
        started = escape_unprintable(holder.started)
        return f"run_dir={self.run_dir}: in use by {holder} since {started} ({command}). {way_out}"


def _describe_this_process() -> Holder:
    return Holder(
        pid=os.getpid(),
        host=socket.gethostname(),
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=shlex.join(sys.argv)[:200],
        pid_namespace=_read_pid_namespace(),
        slurm_job=os.environ.get("SLURM_JOB_ID"),
        slurm_restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )


def _read_pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - the target is no path
    except OSError:  # not Linux
        return ""


def _read_holder(path: Path) -> Holder | None:
    """The process that a holder file names; None if there is none or it is damaged."""
    try:
        holder = Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts = (holder.host, holder.started, holder.command, holder.pid_namespace, holder.slurm_job or "")
    is_valid = all(isinstance(text, str) for text in texts) and type(holder.pid) is type(holder.slurm_restart) is int
    return holder if is_valid else None
