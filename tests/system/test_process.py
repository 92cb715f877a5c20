"""What every process does first, in processes of a few lines: parents that end, signals, streams."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.command_line import RUN
from semseg.errors import INTERRUPTED, TERMINATED
from semseg.system import process
from semseg.system.process import (
    SUPERVISOR_VARIABLE,
    SWEEP_VARIABLE,
    StopRequest,
    announce_sweep,
    is_sweep_gone,
    request_stop,
)

ROOT = RUN.parent
CHILD = (
    "import time; from semseg.system.process import prepare_process; prepare_process();"
    "print('on', flush=True); time.sleep(60)"
)


def python(code: str, *, environment: dict[str, str] | None = None, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **(environment or {})}, text=True, **options
    )


def is_running(number: int) -> bool:
    """Whether a process runs. A zombie does not."""
    return bool(process.get_start_time(number))


def ends(number: int, within: float) -> bool:
    deadline = time.monotonic() + within
    while is_running(number) and time.monotonic() < deadline:
        time.sleep(0.02)
    if is_running(number):
        os.kill(number, signal.SIGKILL)
        return False
    return True


# ---- ending with the parent


@pytest.mark.reliability
def test_e7_a_child_whose_parent_has_ended_already_ends_at_once() -> None:
    child = python(
        CHILD, environment={SUPERVISOR_VARIABLE: "1"}, stdout=subprocess.PIPE
    )  # its parent is another process
    assert child.communicate(timeout=20)[0] == ""
    assert child.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("delay", [0.0, 0.05, pytest.param(1.0, marks=pytest.mark.long)])
@pytest.mark.parametrize("fails", [False, True], ids=["prctl", "watching"])
def test_e7_a_child_ends_with_its_parent_at_any_moment(delay: float, *, fails: bool) -> None:
    """`fails`: as on a system that cannot send a signal when a parent dies."""
    blind = "from semseg.system import process; process.request_death_signal = lambda: False; " if fails else ""
    start = (
        "import os, subprocess, sys, time;"
        f"os.environ[{SUPERVISOR_VARIABLE!r}] = str(os.getpid());"
        f"child = subprocess.Popen([sys.executable, '-c', {blind + CHILD!r}], start_new_session=True);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = python(start, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(delay)
    parent.kill()
    parent.wait()
    assert ends(child, within=5)
    parent.stdout.close()


@pytest.mark.reliability
def test_e7_a_worker_that_watches_its_trainer_does_not_end_the_script_that_started_it(tmp_path: Path) -> None:
    """Without a signal of the system, a data-loading worker watches its parent; it is in the group of the script."""
    watch = (
        "import os; from semseg.system.process import watch_parent; parent = os.getppid();"
        "print(os.getpid(), flush=True); watch_parent(parent)"
    )
    trainer = (
        f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {watch!r}]);"
        "sys.stdin.read(1); os.kill(os.getpid(), 9)"
    )
    script = tmp_path / "train.sh"
    script.write_text('"$1" -c "$2"\nsleep 2\necho next\n')
    command = ["sh", str(script), sys.executable, trainer]
    program = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert program.stdout is not None and program.stdin is not None
    worker = int(program.stdout.readline())
    program.stdin.write(" ")
    program.stdin.flush()
    assert program.communicate(timeout=20)[0] == "next\n" and program.returncode == 0
    assert ends(worker, within=5)


@pytest.mark.reliability
def test_e7_a_grandchild_is_not_a_child_of_the_supervisor() -> None:
    grandchild = f"import os; print({SUPERVISOR_VARIABLE!r} in os.environ)"
    code = (
        "import subprocess, sys; from semseg.system.process import prepare_process, is_supervised; prepare_process();"
        f"print(is_supervised(), flush=True); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    )
    child = python(code, environment={SUPERVISOR_VARIABLE: str(os.getpid())}, stdout=subprocess.PIPE)
    assert child.communicate(timeout=20)[0].split() == ["True", "False"]


@pytest.mark.reliability
def test_e7_a_process_of_a_launcher_knows_whether_its_sweep_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWEEP_VARIABLE, raising=False)
    assert not is_sweep_gone()  # there is no sweep
    announce_sweep()
    assert not is_sweep_gone()
    host, _, birth = os.environ[SWEEP_VARIABLE].split(" ")
    ended = python("pass")
    ended.wait()
    for gone in (
        f"{host} {ended.pid} {birth}",
        f"{host} {os.getpid()} 1",
    ):  # the process id may have been reused
        monkeypatch.setenv(SWEEP_VARIABLE, gone)
        assert is_sweep_gone()
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert not is_sweep_gone()  # the job belongs to SLURM
    monkeypatch.delenv("SUBMITIT_EXECUTOR")
    monkeypatch.setenv(SWEEP_VARIABLE, f"elsewhere {ended.pid} 1")
    assert not is_sweep_gone()  # on another machine, so unknown


# ---- signals


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A process that is not stopping; collects the exit codes with which it would have ended at once."""
    codes: list[int] = []
    monkeypatch.setattr(process, "_is_stopping", False)
    monkeypatch.setattr(process, "exit_immediately", codes.append)
    monkeypatch.setattr(process, "UNWIND_SECONDS", 1000)
    return codes


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, INTERRUPTED, "interrupted."),
        (signal.SIGHUP, TERMINATED, "stopped by SIGHUP."),
        (signal.SIGTERM, TERMINATED, "stopped by SIGTERM."),
    ],
)
def test_e8_a_signal_unwinds_and_the_second_ctrl_c_ends_at_once(
    asked: list[int], capfd: pytest.CaptureFixture[str], number: int, code: int, line: str
) -> None:
    with pytest.raises(StopRequest) as request:
        request_stop(number, None)
    assert (request.value.code, request.value.number) == (code, number)
    request_stop(signal.SIGTERM, None)  # a scheduler sends it to every process of a job, more than once
    assert asked == []
    request_stop(signal.SIGINT, None)
    assert asked == [INTERRUPTED]
    assert capfd.readouterr().err == f"{line}\n"


@pytest.mark.slow
@pytest.mark.reliability
def test_e8_a_process_that_cannot_unwind_ends_anyway() -> None:
    code = """
import os, signal, time
from semseg.system import process
process.UNWIND_SECONDS = 0.5
process.prepare_process()
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
Swallows()
time.sleep(60)
"""
    child = python(code, stderr=subprocess.PIPE)
    assert child.communicate(timeout=20)[1].startswith("interrupted.\n")
    assert child.returncode == INTERRUPTED


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize(("handling", "code"), [("SIG_DFL", TERMINATED), ("SIG_IGN", None)])
def test_e8_nohup_is_respected(handling: str, code: int | None) -> None:
    child = python(
        CHILD, stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, getattr(signal, handling))
    )
    assert child.stdout is not None and child.stdout.readline() == "on\n"
    child.send_signal(signal.SIGHUP)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=0.4 if code is None else 20)
    assert child.returncode == code
    child.kill()
    child.communicate()


# ---- streams


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize(
    "redirection",
    [
        *(pytest.param(closed, marks=pytest.mark.long) for closed in (">&-", "2>&-")),
        ">&- 2>&- <&-",
        "2>&1 | head -1",
        ">/dev/full",
    ],
)
def test_e9_a_closed_or_full_stream_loses_only_what_is_written_to_it(redirection: str) -> None:
    command = f"{sys.executable} {RUN} --help {redirection}; echo ${{PIPESTATUS[0]}} >&9"
    read, write = os.pipe()
    ended = subprocess.run(
        ["bash", "-c", command.replace("&9", f"&{write}")],
        pass_fds=[write],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(write)
    with os.fdopen(read) as codes:
        assert codes.read() == "0\n"
    assert "Traceback" not in ended.stderr + ended.stdout
    lost = "warning: cannot write to standard output (No space left on device); further output is lost.\n"
    assert ended.stderr == (lost if redirection == ">/dev/full" else "")


@pytest.mark.reliability
def test_e9_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "import sys; from semseg.system.process import prepare_process; prepare_process();"
        f"file = open({str(tmp_path / 'result')!r}, 'w'); print('astray'); print('astray', file=sys.stderr);"
        "print(sys.stdin.read() == '', sys.stdout.isatty(), file=file)"
    )
    subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-'], cwd=ROOT, check=True, timeout=20)
    assert (tmp_path / "result").read_text() == "True False\n"
