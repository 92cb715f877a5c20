"""Files written whole or not at all, and paths as people write them. No torch."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from semseg.errors import SemsegError

# Names of temporary_path, and those of earlier versions, which held a process id.
TEMPORARY_NAME = re.compile(r"\..+\.([0-9a-f]{32}|\d+(@.+)?)\.tmp")
SCRIPT_VARIABLE = "SEMSEG_SCRIPT"  # of the environment: the processes of other ranks and jobs start with the same file

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the user can change about a file that cannot be written.
UNWRITABLE = (*DISK_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG)
MIN_FREE_BYTES = 65536  # bytes; a disk with less is full


def temporary_path(path: Path) -> Path:
    """A hidden name in the folder of `path` that no other process takes, on whatever host or in whatever container.

    >>> TEMPORARY_NAME.fullmatch(temporary_path(Path("a.csv")).name) is not None
    True
    """
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}.tmp")


@contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Errors of the system while `path` is written name that file, which a full disk by itself does not."""
    try:
        yield
    except OSError as error:
        if error.errno in UNWRITABLE:
            error.filename, error.filename2 = str(path), None
        raise


def find_disk_error(error: Exception, folder: Path) -> OSError | None:
    """The error of the disk behind one of a library that hides it (torch's writers, safetensors); None if none is."""
    for found in (error, error.__cause__, error.__context__):
        if isinstance(found, OSError) and found.errno in UNWRITABLE:
            return found
    code = re.search(r"\(os error (\d+)\)", str(error))  # as programs in Rust report it
    if code is not None and int(code[1]) in UNWRITABLE:
        return OSError(int(code[1]), os.strerror(int(code[1])))
    is_full = shutil.disk_usage(folder).free < MIN_FREE_BYTES
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if is_full else None


def describe_write_error(error: OSError, folder: Path) -> str | None:
    """The message for a file below `folder` that cannot be written; None for an error that the user cannot change."""
    if error.errno not in UNWRITABLE or (error.filename is None and error.errno not in DISK_FULL):
        return None
    path = str(folder) if error.filename is None else os.fsdecode(error.filename)
    way_out = "Free some space or raise the quota" if error.errno in DISK_FULL else "Check the path and its permissions"
    return f"{path}: cannot be written ({error.strerror}). {way_out}, then run the same command again."


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it takes the place of `path` if all went well.

    The folder is made. On an error the temporary file is removed and `path` stays as it was.

    durable: wait until it is on the disk, for files that a power cut must not leave half written.
    """
    temporary = temporary_path(path)
    with name_file_in_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if durable:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except SemsegError:
            raise
        except Exception as error:
            cause = find_disk_error(error, path.parent)
            if cause is None:
                raise
            raise cause from error
        finally:
            temporary.unlink(missing_ok=True)


def entry_script() -> Path:
    """The file that this command was started with: run.py, or a program that adds networks and calls `launch.main`."""
    return Path(os.environ.get(SCRIPT_VARIABLE, Path(__file__).resolve().parents[2] / "run.py"))


def entry_command() -> str:
    """How that file is started, for commands to copy: "python run.py", or "semseg" if a wheel was installed."""
    return f"python {entry_script().name}" if entry_script().suffix == ".py" else entry_script().name


def relative_to_cwd(path: Path) -> Path:
    """`path` relative to the working directory if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
