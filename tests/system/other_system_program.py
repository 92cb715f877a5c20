"""Train, evaluate and predict without what only POSIX systems have. The argument is the number of spawned workers.

With workers, it also checks the data and times the machine.

Only semseg sees modules without these parts: Python's library and other packages have ways of their own for other
systems. It is a program of its own because what is imported stays imported.
"""

from __future__ import annotations

import builtins
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
MISSING = {
    "os": (
        "fork", "forkpty", "getegid", "geteuid", "getgid", "getgroups", "getloadavg", "getpgid", "getpgrp", "getsid",
        "getuid", "killpg", "mkfifo", "nice", "posix_fallocate", "posix_fadvise", "register_at_fork",
        "sched_getaffinity", "sched_setaffinity", "setpgid", "setsid", "statvfs", "sysconf", "sysconf_names", "uname",
    ),
    "signal": (
        "SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP", "SIGUSR1",
        "SIGUSR2", "setitimer", "alarm", "pthread_sigmask",
    ),
}  # fmt: skip
importing, opening = builtins.__import__, os.open


class Restricted(ModuleType):
    """A module of Python's library as it is elsewhere."""

    def __init__(self, module: ModuleType, missing: tuple[str, ...]) -> None:
        super().__init__(module.__name__)
        self._module, self._missing = module, missing

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._module, name)


def open_file(path: Any, *arguments: Any, **keywords: Any) -> int:
    """os.open of Windows, which opens no folder."""
    if Path(path).is_dir():
        raise PermissionError(13, "Permission denied", path)
    return opening(path, *arguments, **keywords)


RESTRICTED = {name: Restricted(module, MISSING[name]) for name, module in (("os", os), ("signal", signal))}
RESTRICTED["os"].open = open_file


def import_elsewhere(name: str, scope: Any = None, *arguments: Any, **keywords: Any) -> Any:
    """What an import of semseg gives on another system; imports of other packages are as here."""
    if not str((scope or {}).get("__name__", "")).startswith("semseg"):
        return importing(name, scope, *arguments, **keywords)
    if name in MODULES:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return RESTRICTED.get(name) or importing(name, scope, *arguments, **keywords)


def run(*words: str) -> None:
    """Run a command line."""
    from semseg.cli import main

    sys.argv[1:] = words
    try:
        main.main()
    except SystemExit as leaving:
        if leaving.code:
            raise


if __name__ == "__main__":
    for name in [name for name in sys.modules if name.startswith("semseg")]:  # what forks have imported already
        del sys.modules[name]
    builtins.__import__ = import_elsewhere
    multiprocessing.set_start_method("spawn")
    from helpers.command_line import TINY

    number = sys.argv[1]
    run(*TINY, f"data.num_workers={number}", "run_dir=run", "after_training=[eval]", "eval.bootstrap=0")
    run("mode=eval", "ckpt=run", f"data.num_workers={number}", "eval.bootstrap=0", "run_dir=eval")
    picture = next(Path("scenes/images/validation").iterdir())
    run("mode=predict", "ckpt=run", f"input={picture}", f"data.num_workers={number}", "run_dir=predict")
    if number != "0":
        run("mode=check", *TINY, "run_dir=check")
        run("mode=bench", *TINY, "bench.steps=2", "run_dir=bench")
        run("mode=doctor")
