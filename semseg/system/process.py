"""What every process of a run does first: tie itself to its parent, handle signals, repair streams.

A process that another one of ours has started (a rank, a job of a sweep) ends with it, at any moment and for any
reason. Signals that request a stop raise `StopRequest` in the main thread, except in training, which writes a
checkpoint first (semseg/training/callbacks/stop.py). Uses the standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from semseg.errors import INTERRUPTED, TERMINATED

SUPERVISOR_VARIABLE = "SEMSEG_SUPERVISOR"  # process id, in the environment of every rank and every job of a sweep
# Host, process id and start time of the first process of a sweep, for the processes of its launcher.
SWEEP_VARIABLE = "SEMSEG_SWEEP"
PR_SET_PDEATHSIG = 1  # option of Linux's prctl
UNWIND_SECONDS = 10.0  # after a request to stop, a process that cannot unwind is ended
# Signals that Windows does not have; None equals no number of a signal.
SIGUSR1, SIGHUP, SIGCHLD, SIGKILL = (
    getattr(signal, name, None) for name in ("SIGUSR1", "SIGHUP", "SIGCHLD", "SIGKILL")
)
STOP_SIGNALS = tuple(number for number in (signal.SIGTERM, SIGUSR1, signal.SIGINT, SIGHUP) if number is not None)

_is_supervised = False
_is_stopping = False


class StopRequest(SystemExit):
    """A signal requested this process to stop. Neither `except Exception` nor Lightning catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(get_stop_code(number))
        self.number = number  # signal number


def get_stop_code(number: int) -> int:
    """The exit code after a signal that requests a stop."""
    return INTERRUPTED if number == signal.SIGINT else TERMINATED


def prepare_process() -> None:
    """Call this before anything slow is imported. Calling it again is harmless."""
    follow_supervisor()
    repair_streams()
    handle_stop_signals()


# ---- ending with the parent


def is_supervised() -> bool:
    """Whether this process is a rank or a job that another process of ours started."""
    return _is_supervised


def follow_supervisor() -> None:
    """In a rank or a job of a sweep: end when the process that started it ends, or has ended already."""
    global _is_supervised  # noqa: PLW0603 - a fact about the process
    # Removed from the environment, because processes that this one starts are not the supervisor's children.
    supervisor = os.environ.pop(SUPERVISOR_VARIABLE, None)
    if supervisor is not None:
        _is_supervised = True
        end_with_parent(int(supervisor))
    elif "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_RANK" in os.environ:
        end_with_parent(os.getppid())  # torchrun ends its ranks only if it ends properly itself


def end_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends, or at once if it has ended already. `parent` is a process id."""
    if not request_death_signal():
        threading.Thread(target=watch_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # checked afterwards, so that there is no gap
        kill_this_process()


def request_death_signal() -> bool:
    """Make Linux send SIGKILL when the thread that started this process ends; False if that is not possible."""
    if sys.platform != "linux":
        return False
    import ctypes  # noqa: PLC0415 - few processes need it

    try:
        return ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False


def watch_parent(parent: int) -> NoReturn:
    """End this process once it has another parent, and with it those that it started if it leads their group.

    A data-loading worker is in the group of its trainer, which is that of the user's script if there is one rank.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    kill_this_process()


def kill_this_process() -> NoReturn:
    """End this process at once, as if it was killed from outside."""
    if SIGKILL is not None:
        os.kill(os.getpid(), SIGKILL)
    os._exit(1)


def kill_with_children(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that was started as the first one of a session, and on POSIX all others in that session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def announce_sweep() -> None:
    """In the first process of a sweep: make it known to the processes of its launcher."""
    os.environ[SWEEP_VARIABLE] = f"{socket.gethostname()} {os.getpid()} {get_start_time(os.getpid())}"


def is_sweep_job() -> bool:
    """Whether this process was started by a sweep, with words that all its jobs have."""
    return SWEEP_VARIABLE in os.environ


def is_sweep_gone() -> bool:
    """In a process of a launcher on this machine: whether its sweep has ended.

    Jobs that were submitted to SLURM belong to SLURM and continue.
    """
    parts = os.environ.get(SWEEP_VARIABLE, "").split(" ")
    if len(parts) != 3 or os.environ.get("SUBMITIT_EXECUTOR", "local") != "local":
        return False
    host, process, start_time = parts
    return host == socket.gethostname() and get_start_time(int(process)) != start_time


def get_start_time(process: int) -> str:
    """When a process of this machine started, in ticks since boot; empty if it has ended or is unknown."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


# ---- signals


def handle_stop_signals() -> None:
    """From now on, signals that request a stop raise `StopRequest`. SIGHUP stays ignored under nohup."""
    if threading.current_thread() is threading.main_thread():
        for number in list_stop_signals():
            # Outside training, SLURM's warning signal is left to Lightning, which requeues the job.
            if not (number == SIGUSR1 and "SLURM_JOB_ID" in os.environ):
                signal.signal(number, request_stop)


def ignore_stop_signals(worker: int) -> None:
    """In a data-loading worker: leave signals to the training process, with which workers end."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def list_stop_signals() -> list[signal.Signals]:
    """The signals that request this process to stop."""
    is_nohup = SIGHUP is not None and signal.getsignal(SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (is_nohup and number == SIGHUP)]


def request_stop(number: int, frame: FrameType | None) -> None:
    """Signal handler: print a line and unwind. Ctrl-C in a process that is stopping already ends it at once.

    Raises:
        StopRequest: the first time.
    """
    global _is_stopping  # noqa: PLW0603 - a fact about the process
    if _is_stopping:
        if number == signal.SIGINT:
            exit_immediately(INTERRUPTED)
        return
    _is_stopping = True
    line = "interrupted." if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}."
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())  # print itself may have been interrupted
    # For a main thread that waits for another rank, and for an exception that is lost in a destructor.
    timer = threading.Timer(UNWIND_SECONDS, exit_immediately, [get_stop_code(number)])
    timer.daemon = True
    timer.start()
    raise StopRequest(number)


def exit_immediately(code: int) -> NoReturn:
    """End this process without unwinding. Its data-loading workers end with it."""
    os._exit(code)


# ---- streams


class ResilientOutput(io.FileIO):
    """A stream's file that becomes the null device when its reader or its terminal is gone.

    A run must not end because its terminal, or the program that reads its output, has ended.
    """

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno == errno.EINTR:
                raise
            if error.errno not in (errno.EPIPE, errno.EIO) and self.fileno() != 2:
                text = f"warning: cannot write to standard output ({error.strerror}); further output is lost.\n"
                os.write(2, text.encode())
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def repair_streams() -> None:
    """Connect closed streams to the null device, and make writing to the others never fail.

    Otherwise a file that is opened later would get the number of a closed stream, and its output.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = wrap_stream(sys.stdout, 1), wrap_stream(sys.stderr, 2)


def wrap_stream(stream: TextIO | None, number: int) -> TextIO:
    """A text stream for file descriptor `number`. A stream that is not Python's own, as in a notebook, is kept."""
    if stream is not None and not is_python_stream(stream, number):
        return stream
    if stream is not None:
        stream.flush()
    file = ResilientOutput(number, "w", closefd=False)
    is_unbuffered = getattr(stream, "write_through", False)  # python -u
    return io.TextIOWrapper(
        file if is_unbuffered else io.BufferedWriter(file),  # pyright: ignore[reportArgumentType] - as Python's own
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",  # file names may have characters that the terminal cannot encode
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=is_unbuffered,
    )


def is_python_stream(stream: TextIO, number: int) -> bool:
    """Whether a stream is the one that Python created for file descriptor `number`."""
    raw = getattr(getattr(stream, "buffer", None), "raw", getattr(stream, "buffer", None))
    return type(raw) is io.FileIO and raw.fileno() == number
