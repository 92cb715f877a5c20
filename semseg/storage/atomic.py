"""Files that are written completely or not at all, and their errors. No torch."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from semseg.errors import SemsegError

# Names made by temporary_path, and by earlier versions, which contained a process id.
TEMPORARY_NAME = re.compile(r"\..+\.([0-9a-f]{32}|\d+(@.+)?)\.tmp")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Reasons why a file cannot be written that the user can remove.
UNWRITABLE = (
    *DISK_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR
)  # fmt: skip
MIN_FREE_BYTES = 65536  # a disk with less is full


def temporary_path(path: Path) -> Path:
    """A hidden name in the folder of `path` that no other process uses, on this or any other host.

    >>> TEMPORARY_NAME.fullmatch(temporary_path(Path("a.csv")).name) is not None
    True
    """
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}.tmp")


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, as far as they do not exist.

    Raises:
        OSError: if that cannot be, with a number of UNWRITABLE also where a file, a broken link or a file system that
            takes no folders is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError):
        raise NotADirectoryError(errno.ENOTDIR, "its folder cannot be created", str(folder)) from None


@contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Put the name of `path` into system errors while it is written; a full disk alone does not name the file."""
    try:
        yield
    except OSError as error:
        if error.errno in UNWRITABLE:
            error.filename, error.filename2 = str(path), None
        raise


def find_disk_error(error: Exception, folder: Path) -> OSError | None:
    """The disk error behind an error of a library that hides it (torch, safetensors); None if there is none."""
    for candidate in (error, error.__cause__, error.__context__):
        if isinstance(candidate, OSError) and candidate.errno in UNWRITABLE:
            return candidate
    code = re.search(r"\(os error (\d+)\)", str(error))  # the format of Rust libraries
    if code is not None and int(code[1]) in UNWRITABLE:
        return OSError(int(code[1]), os.strerror(int(code[1])))
    is_full = shutil.disk_usage(folder).free < MIN_FREE_BYTES
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if is_full else None


def describe_write_error(error: OSError, folder: Path) -> str | None:
    """The message for a file below `folder` that cannot be written; None for an error that the user cannot fix."""
    if error.errno not in UNWRITABLE or (error.filename is None and error.errno not in DISK_FULL):
        return None
    path = str(folder) if error.filename is None else os.fsdecode(error.filename)
    way_out = describe_room(error) if error.errno in DISK_FULL else "Check the path and its permissions"
    return f"{path}: cannot be written ({error.strerror}). {way_out}, then run the same command again."


def describe_room(error: OSError) -> str:
    """What to do about a full disk, a quota, or a file larger than a file system or `ulimit -f` allows."""
    return f"Free some space or raise the quota{' or the limit of file sizes' if error.errno == errno.EFBIG else ''}"


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to, and renames it to `path` if the block succeeds.

    The folder is created. On an error the temporary file is removed and `path` stays as it was.

    Args:
        durable: wait until file and rename are on the disk, so that a power cut cannot leave half a file.
    """
    temporary = temporary_path(path)
    with name_file_in_errors(path):
        make_folder(path.parent)
        try:
            yield temporary
            if durable:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
            if durable:
                sync_folder(path.parent)
        except SemsegError:
            raise
        except Exception as error:
            cause = find_disk_error(error, path.parent)
            if cause is None or cause is error:
                raise
            raise cause from error
        finally:
            with suppress(OSError):
                temporary.unlink()  # after a failure; a rename has already removed it


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can."""
    with suppress(OSError):  # not every network file system syncs folders; the file itself is on the disk
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
