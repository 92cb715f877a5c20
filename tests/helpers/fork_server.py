"""Start Python programs as real processes without the seconds that importing torch and Lightning takes.

A server that has imported everything forks once for each program: one server for all test processes, or that of the
first program where there is one test process only. The fork has its own process id, working directory, environment,
streams and exit code. It differs from a program started by the interpreter in its entry in the process table and in
what is already imported: tests of those start an interpreter.

With FORK_CHILDREN=1 in its environment, the Python programs that a program starts (the ranks of a job) are forks of
that program in the same way.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import inspect
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
FORK_CHILDREN = "FORK_CHILDREN"  # in the environment of a program
SERVER_ADDRESS = "FORK_SERVER_ADDRESS"  # in the environment of test processes that share a server
MAX_REQUEST = 1 << 20  # bytes
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")  # arguments of Popen._execute_child


class ForkedProgram:
    """A running program; the part of subprocess.Popen that tests need. Its output is a file, not a pipe."""

    def __init__(self, arguments: Sequence[str], cwd: Path, env: dict[str, str] | None = None) -> None:
        self.output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the program
        self.returncode: int | None = None
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect(server_address())
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "env": dict(os.environ if env is None else env),
        }
        descriptor = self.output.fileno()
        socket.send_fds(self.connection, [json.dumps(request).encode()], [descriptor, descriptor])
        self.pid = int(self.connection.recv(64))

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: if the program still runs after `timeout` seconds.
        """
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = int(self.connection.recv(64))
            except TimeoutError:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0, self.read()) from None
            self.connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, or None while the program runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(timeout=1e-3)
        return None

    def read(self) -> str:
        """What the program has written so far to standard output and standard error."""
        self.output.flush()
        with os.fdopen(os.dup(self.output.fileno()), "rb") as file:
            return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and the server has not said so yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_python(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run `python <arguments>`, a file or `-c` and a program, to its end. Both streams are in `stdout`, in order.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds; the program has been killed then.
    """
    program = ForkedProgram(arguments, cwd, env)
    try:
        code = program.wait(timeout)
    except subprocess.TimeoutExpired:
        program.kill()
        raise
    return subprocess.CompletedProcess(["python", *arguments], code, program.read(), "")


@functools.cache
def server_address() -> str:
    """The server that is shared with other test processes, or one of this process."""
    return os.environ.get(SERVER_ADDRESS) or start_server()


def start_server() -> str:
    """Start a server that ends with this process; returns its address, where programs wait until it is ready."""
    folder = tempfile.TemporaryDirectory(prefix="fork_server")
    address = f"{folder.name}/socket"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "helpers.fork_server", address]
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == b"listening\n"
    server.stdout.close()

    def stop() -> None:
        assert server.stdin is not None
        server.stdin.close()  # the server ends when its standard input does
        server.wait()  # so that `time` counts what it and its programs took
        folder.cleanup()

    atexit.register(stop)
    return address


# ---- in the server


def serve(address: str) -> None:
    """Fork for each connection, until standard input is closed."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    os.write(1, b"listening\n")
    import_everything()
    gc.freeze()  # a collection in a fork would copy what was imported
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    gc.unfreeze()
                    return
                if key.fileobj is listener:
                    pid, connection = fork_program(listener, selector)
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
                    continue
                pid, connection = key.data
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError):  # the test may have lost interest
                    connection.send(str(os.waitstatus_to_exitcode(status)).encode())
                connection.close()
                selector.unregister(key.fileobj)
                os.close(key.fd)


def import_everything() -> None:
    """Import this package, and with it torch, Lightning, Hydra and OpenCV, and fill the caches of every program.

    Every program knows the encoder `tiny`.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    import semseg  # only in the server, which is a process of its own
    from helpers.command_line import TINY_ENCODERS
    from helpers.composition import cache_defaults, cache_modes, cache_option_files, cache_schema
    from semseg.config.compose import compose_config
    from semseg.config.groups import CONFIG_DIR
    from semseg.config.validate import check_config
    from semseg.nets.registry import ENCODERS
    from semseg.reports.templates import TEMPLATE_FOLDER, _create_environment

    ENCODERS.update(TINY_ENCODERS)
    os.fsync = skip_sync
    cache_option_files()
    cache_defaults()
    cache_modes()
    cache_schema()
    check_config(compose_config([]))
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        GlobalHydra.instance().hydra.get_mode("config", [])
    for path in TEMPLATE_FOLDER.iterdir():
        _create_environment().get_template(path.name)

    for module in pkgutil.walk_packages(semseg.__path__, "semseg."):
        with contextlib.suppress(ImportError):  # an extra is not installed
            importlib.import_module(module.name)


def fork_program(listener: socket.socket, selector: selectors.BaseSelector) -> tuple[int, socket.socket]:
    """Accept one request; returns in the server only, with the process id and the connection to report to."""
    connection, _ = listener.accept()
    message, descriptors, *_ = socket.recv_fds(connection, MAX_REQUEST, 2)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for number, descriptor in enumerate([null, *descriptors]):
            os.dup2(descriptor, number)
        selector.close()
        listener.close()
        connection.close()
        os.closerange(3, 256)
        execute(**json.loads(message))
    for descriptor in descriptors:
        os.close(descriptor)
    connection.send(str(pid).encode())
    return pid, connection


def execute(arguments: list[str], cwd: str, env: dict[str, str]) -> NoReturn:
    """Become the program; ends the process as the interpreter would."""
    code = 1
    try:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        if env.get(FORK_CHILDREN) == "1":
            fork_children()
        sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            sys.path.insert(0, "")
            module = types.ModuleType("__main__")
            sys.modules["__main__"] = module
            exec(compile(arguments[1], "<string>", "exec"), module.__dict__)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = exit_status(leaving.code)
    except BaseException:  # as the interpreter does
        traceback.print_exc()
    finally:
        run_exit_handlers()
        os._exit(code)


@functools.cache
def fork_children() -> None:
    """Have subprocess.Popen fork this process where it is to start a file with our interpreter."""
    from hydra.core.singleton import Singleton

    start = subprocess.Popen._execute_child  # pyright: ignore[reportAttributeAccessIssue]
    names = list(inspect.signature(start).parameters)
    state = dict(Singleton._instances)  # without the configuration of a program that is running

    def fork_or_start(process: subprocess.Popen, *values: Any) -> None:
        given: dict[str, Any] = dict(zip(names, [process, *values], strict=True))
        command = given["args"] if isinstance(given["args"], list | tuple) else [given["args"]]
        command = [str(word) for word in command if word != "-u"]
        if command[0] != sys.executable or not command[1:] or command[1].startswith("-"):
            start(process, *values)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        process.pid = os.fork()
        if process.pid:
            process._child_created = True  # pyright: ignore[reportAttributeAccessIssue]
            process._close_pipe_fds(*(given[name] for name in PIPES))  # pyright: ignore[reportAttributeAccessIssue]
            return
        if given["start_new_session"]:
            os.setsid()
        for number, name in enumerate(["p2cread", "c2pwrite", "errwrite"]):
            if given[name] != -1:
                os.dup2(given[name], number)
        os.closerange(3, 256)
        for number in signal.valid_signals():  # handlers do not survive the start of a program, ignored signals do
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        Singleton._instances = state
        atexit._clear()
        execute(command[1:], str(given["cwd"] or Path.cwd()), dict(given["env"] or os.environ))

    subprocess.Popen._execute_child = fork_or_start  # pyright: ignore[reportAttributeAccessIssue]


def skip_sync(descriptor: int) -> None:
    """In place of os.fsync, here and in the processes of tests: kills do not need it, and no test cuts the power."""


def exit_status(code: object) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    sys.stderr.write(f"{code}\n")
    return 1


def run_exit_handlers() -> None:
    """What the interpreter does at its end: wait for threads, run atexit's functions, flush."""
    with contextlib.suppress(BaseException):
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - no public name
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
