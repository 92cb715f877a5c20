"""One run per folder: an operating-system lock on run.lock, held for the life of the run. No torch.

The kernel releases the lock when the process ends, for whatever reason, so no lock is ever stale. Forked children
close the descriptor (filelock does that): a loader worker that outlives a killed run does not keep the folder. The file
beside it names the holder for messages, and decides only whether a requeued SLURM job takes over from its last attempt.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from semseg.errors import ConfigError
from semseg.storage.atomic import DISK_FULL, atomic_write
from semseg.storage.commands import list_this_command
from semseg.system.text import escape_unprintable

LOCK_FILE, HOLDER_FILE = "run.lock", "run.holder.json"  # in the run folder
# Time for the last process of a killed run to end, and for a holder file that is being written.
WAIT_SECONDS = 2.0
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def on_folder_taken() -> None:
    """Called before a mode writes into its run folder: training when it has the lock, prediction when its inputs are
    known to lie elsewhere. Replaced by callers that write into the folder only then.
    """


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
        is_in_another_container = self.host == socket.gethostname() and self.pid_namespace != _read_pid_namespace()
        place = f"{self.host}, in another container," if is_in_another_container else self.host
        return escape_unprintable(f"process {self.pid} on {place} since {self.started}")


@contextmanager
def hold_run_folder(run_dir: Path) -> Iterator[str | None]:
    """Create a run folder and hold it for this process. On a file system without locks it warns, and nothing is held.

    Yields:
        A line to log if the previous run ended without releasing the folder, else None.

    Raises:
        ConfigError: if another process holds the folder, or if the folder cannot be written.
        OSError: if the disk is full.
    """
    path, holder_path = run_dir / LOCK_FILE, run_dir / HOLDER_FILE
    this_process = _describe_this_process()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = _acquire_lock(run_dir, this_process)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise ConfigError(
            f"run_dir={run_dir}: this folder cannot be written ({error.strerror}). Give another run_dir."
        ) from error
    takeover = None
    if lock.is_locked and holder_path.exists():
        before = _read_holder(holder_path)
        who = f"the previous run ({before})" if before else "the previous run"
        takeover = f"{run_dir}: {who} ended without releasing this folder; this run takes it over"
    with suppress(OSError), atomic_write(holder_path, durable=False) as temporary:
        temporary.write_text(json.dumps(this_process._asdict()) + "\n", encoding="utf-8")
    try:
        on_folder_taken()
        yield takeover
    finally:
        if this_process.pid == os.getpid():  # a forked child has a copy of this generator
            # If the file system is gone, the holder file stays and is taken over. If somebody has deleted the lock and
            # another process holds a new one, the files are its own.
            with suppress(OSError):
                if _read_holder(holder_path) == this_process:
                    holder_path.unlink()
                    path.unlink()  # filelock does not lock a removed file
            with suppress(OSError):
                lock.release()


def _acquire_lock(run_dir: Path, this_process: Holder) -> FileLock:
    """The lock of a run folder: held, or not held on a file system without locks.

    Raises:
        ConfigError: if another process holds it.
        OSError: if the lock file cannot be written.
    """
    path = run_dir / LOCK_FILE
    # filelock would fall back to a soft lock, a file with a process id, which is stale after a kill.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        with suppress(Timeout):
            lock.acquire(timeout=WAIT_SECONDS)
        holder = _read_holder(run_dir / HOLDER_FILE)
        if not lock.is_locked and holder and _is_earlier_attempt(holder, this_process):
            path.unlink(missing_ok=True)  # the file system keeps the lock of a failed node
            with suppress(Timeout):
                lock.acquire(timeout=WAIT_SECONDS)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        message = f"run_dir={run_dir}: this file system has no locks ({error.strerror}), so a second run in the folder"
        warnings.warn(f"{message} would go unnoticed", stacklevel=1)
        return lock
    if not lock.is_locked:
        who = f"{holder} ({escape_unprintable(holder.command)})" if holder else "another process"
        way_out = "Give another run_dir, or wait until it has ended."
        if holder and holder.host != socket.gethostname():
            way_out += f" If that machine has failed and the lock stays, delete {path}."
        raise ConfigError(f"run_dir={run_dir}: in use by {who}. {way_out}")
    return lock


def _is_earlier_attempt(holder: Holder, other: Holder) -> bool:
    """Whether SLURM ended `holder` before it requeued the job, even if the file system still shows its lock."""
    is_same_job = holder.slurm_job is not None and holder.slurm_job == other.slurm_job
    return is_same_job and holder.slurm_restart < other.slurm_restart


def _describe_this_process() -> Holder:
    return Holder(
        pid=os.getpid(),
        host=socket.gethostname(),
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=shlex.join(list_this_command())[:200],
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
        return holder._replace(slurm_restart=int(holder.slurm_restart))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
