"""Files written whole or not at all, and paths as people write them. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = "SEMSEG_SCRIPT"  # of the environment: the processes of other ranks and jobs start with the same file


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it takes the place of `path` if all went well.

    The folder is made. On an error the temporary file is removed and `path` stays as it was.

    durable: wait until it is on the disk, for files that a power cut must not leave half written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def script() -> Path:
    """The file that this command was started with: run.py, or a program that adds networks and calls `launch.main`."""
    return Path(os.environ.get(SCRIPT, Path(__file__).resolve().parent.parent / "run.py"))


def program() -> str:
    """How that file is started, for commands to copy: "python run.py", or "semseg" if a wheel was installed."""
    return f"python {script().name}" if script().suffix == ".py" else script().name


def from_here(path: Path) -> Path:
    """`path` relative to the working directory if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
