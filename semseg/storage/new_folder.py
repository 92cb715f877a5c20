"""Folders that appear when everything in them is written, or not at all. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from semseg.errors import ConfigError
from semseg.storage.atomic import make_folder, name_file_in_errors


@contextmanager
def create_folder(path: Path, key: str) -> Iterator[Path]:
    """A hidden folder beside `path` to write into, which becomes `path` at the end; after an error it is removed.

    What a killed process left there is removed too.

    Args:
        key: configuration key of `path`, for messages.

    Raises:
        ConfigError: if `path` exists and is not empty, or another process writes it.
    """
    path = path.resolve()  # the hidden folder has to be on the disk that a link points to
    hidden, lock_file = path.with_name(f".{path.name}.unfinished"), path.with_name(f".{path.name}.lock")
    with name_file_in_errors(path):
        if (taken := next((parent for parent in path.parents if parent.is_file()), None)) is not None:
            raise ConfigError(f"{key}={path}: {taken} is a file. Give another {key}.")
        make_folder(path.parent)
        lock = FileLock(lock_file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"{key}={path}: another process is writing this folder. Wait until it has ended."
            ) from None
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ConfigError(f"{key}={path}: exists and is not empty. Remove it, or give another {key}.")
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir()
            yield hidden
            hidden.replace(path)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            with suppress(OSError):
                lock_file.unlink()
            lock.release()
