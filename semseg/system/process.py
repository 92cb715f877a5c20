"""What every process of a run does first: end with its parent, take over signals, have streams. Standard library only.

A process that is started by another one of ours (a rank, a job of a sweep) ends with it, however that went and at
whatever moment. Signals that ask to stop raise `StopRequest` in the main thread, except in training, which writes a
checkpoint first (semseg/training/callbacks/stop.py).
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from semseg.errors import INTERRUPTED, TERMINATED

SUPERVISOR_VARIABLE = "SEMSEG_SUPERVISOR"  # process id, in the environment of every rank and every job of a sweep
SWEEP_VARIABLE = (
    "SEMSEG_SWEEP"  # host, process id and birth of the first process of a sweep, for its launcher's processes
)
PR_SET_PDEATHSIG = 1  # of Linux's prctl
UNWIND_SECONDS = 10.0  # from a request to stop to the end of a process that does not get to its own
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP") if hasattr(signal, name)
)

_is_supervised = False
_is_stopping = False  # to stop


class StopRequest(SystemExit):
    """A signal asked this process to stop. Neither `except Exception` nor Lightning takes it for anything else."""

    def __init__(self, number: int) -> None:
        super().__init__(get_stop_code(number))
        self.number = number  # of the signal


def get_stop_code(number: int) -> int:
    """The exit code after a signal that asks to stop."""
    return INTERRUPTED if number == signal.SIGINT else TERMINATED


def prepare_process() -> None:
    """To be called before anything slow is imported; again does no harm."""
    follow_supervisor()
    repair_streams()
    handle_stop_signals()


# ---- ending with the parent


def is_supervised() -> bool:
    """Whether this process is a rank or a job that another process of ours started."""
    return _is_supervised


def follow_supervisor() -> None:
    """In a rank or a job of a sweep: end when what started it is gone, or has gone already. Elsewhere: nothing."""
    global _is_supervised  # noqa: PLW0603 - a fact about the process
    # Out of the environment, since processes that this one starts are not the supervisor's children.
    supervisor = os.environ.pop(SUPERVISOR_VARIABLE, None)
    if supervisor is not None:
        _is_supervised = True
        end_with_parent(int(supervisor))
    elif "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_RANK" in os.environ:
        end_with_parent(os.getppid())  # torchrun ends its ranks only when it ends in good order itself


def end_with_parent(parent: int) -> None:
    """Have this process killed when its parent, whose process id is given, ends. At once if it has ended."""
    if not request_death_signal():
        threading.Thread(target=watch_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # after that, so that there is no moment in between
        os.kill(os.getpid(), signal.SIGKILL)


def request_death_signal() -> bool:
    """Have Linux send SIGKILL when the thread that started this process ends; False where that is not possible."""
    if sys.platform != "linux":
        return False
    import ctypes  # noqa: PLC0415 - most processes have no parent of ours

    try:
        return ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False


def watch_parent(parent: int) -> NoReturn:
    """End this process and its children once it has another parent."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgid(0), signal.SIGKILL)
    raise AssertionError("killed")


def announce_sweep() -> None:
    """In the first process of a sweep: let the processes of its launcher know it."""
    os.environ[SWEEP_VARIABLE] = f"{socket.gethostname()} {os.getpid()} {get_start_time(os.getpid())}"


def is_sweep_gone() -> bool:
    """In a process of a launcher on this machine: whether the sweep that it works for has ended.

    Jobs that were submitted to SLURM are SLURM's, and go on.
    """
    words = os.environ.get(SWEEP_VARIABLE, "").split(" ")
    if len(words) != 3 or os.environ.get("SUBMITIT_EXECUTOR", "local") != "local":
        return False
    return words[0] == socket.gethostname() and get_start_time(int(words[1])) != words[2]


def get_start_time(process: int) -> str:
    """When a process of this machine began, in ticks after the boot; empty if it has ended, or is not known."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


# ---- signals


def handle_stop_signals() -> None:
    """From now on signals that ask to stop raise `StopRequest`. SIGHUP stays ignored where nohup has it ignored."""
    if threading.current_thread() is threading.main_thread():
        for number in list_stop_signals():
            # SLURM's warning is left to Lightning outside training, which requeues the job.
            if not (number == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ):
                signal.signal(number, request_stop)


def ignore_stop_signals(worker: int) -> None:
    """In a worker of a loader: a signal to the whole job is for the process that trains; workers end with it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def list_stop_signals() -> list[signal.Signals]:
    """The signals that ask this process to stop."""
    is_nohup = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (is_nohup and number == signal.SIGHUP)]


def request_stop(number: int, frame: FrameType | None) -> None:
    """A handler: say so and unwind; the second Ctrl-C of a process that is at it ends it at once.

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
        os.write(2, f"{line}\n".encode())  # print may have been interrupted itself
    # Where the main thread waits for another rank, or the exception is lost in a destructor.
    timer = threading.Timer(UNWIND_SECONDS, exit_immediately, [get_stop_code(number)])
    timer.daemon = True
    timer.start()
    raise StopRequest(number)


def exit_immediately(code: int) -> NoReturn:
    """End this process without unwinding; its loader's workers end with it."""
    os._exit(code)


# ---- streams


class ResilientOutput(io.FileIO):
    """A stream's file that is replaced by the null device when nobody reads it any more, or its terminal is gone.

    A run must not end because the terminal, or the program at the other end of the pipe, went first.
    """

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno == errno.EINTR:
                raise
            if error.errno not in (errno.EPIPE, errno.EIO) and self.fileno() != 2:
                text = f"warning: standard output cannot be written ({error.strerror}): what follows is lost.\n"
                os.write(2, text.encode())
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def repair_streams() -> None:
    """Streams that were closed go to the null device, and writing to the others never fails.

    A file that is opened later would get the number of a closed stream, and what is written to that stream.
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
    """The text stream to write to file `number`. One that is not Python's own, as in a notebook, stays."""
    if stream is not None and not is_python_stream(stream, number):
        return stream
    if stream is not None:
        stream.flush()
    file = ResilientOutput(number, "w", closefd=False)
    through = getattr(stream, "write_through", False)  # python -u
    return io.TextIOWrapper(
        file if through else io.BufferedWriter(file),  # pyright: ignore[reportArgumentType] - as Python's own
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",  # names of files may hold characters that the terminal's encoding lacks
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=through,
    )


def is_python_stream(stream: TextIO, number: int) -> bool:
    """Whether a stream is the one that Python made for file `number`."""
    raw = getattr(getattr(stream, "buffer", None), "raw", getattr(stream, "buffer", None))
    return type(raw) is io.FileIO and raw.fileno() == number
