"""Files of a data set, on disk or inside a zip archive: `scenes.zip/images/a.jpg` is a path like any other.

Errors are those of files on disk (FileNotFoundError and other OSError), and DataError for a broken archive.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from semseg.errors import DataError

SUFFIX = ".zip"
MAX_BYTES = 2**30  # of one file once it is unpacked: more than any image has; a few kB can announce terabytes


class Archive(NamedTuple):
    """An open archive. Only as long as the process lives: nobody else writes into it."""

    file: zipfile.ZipFile
    entries: dict[str, zipfile.ZipInfo]  # by path inside, files alone
    folders: frozenset[str]  # "" is the archive itself


def read_file(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        OSError: as `Path.read_bytes`.
        DataError: if the archive, or the file in it, is broken, encrypted or too large.
    """
    inside = _place(path)
    if inside is None:
        return Path(path).read_bytes()
    archive, name = _open(inside.archive), inside.name
    if name in archive.folders:
        raise IsADirectoryError(21, "is a folder in the archive", str(path))
    if name not in archive.entries:
        raise FileNotFoundError(2, "not in the archive", str(path))
    entry = archive.entries[name]
    if entry.file_size > MAX_BYTES:
        raise DataError(f"{path}: {entry.file_size} bytes once unpacked, more than {MAX_BYTES} are not read.")
    try:
        return archive.file.read(entry)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        # RuntimeError: encrypted; NotImplementedError: a compression that Python's zipfile does not know.
        raise DataError(f"{path}: cannot be unpacked ({error}). Write the archive again.") from error


def read_text(path: str | Path) -> str:
    """The content of a UTF-8 file, with or without a byte order mark.

    Raises:
        UnicodeDecodeError: if it is none; else as `read_file`.
    """
    return read_file(path).decode("utf-8-sig")


def opened(path: str | Path) -> BinaryIO:
    """A file to read the beginning of; in an archive it is unpacked as a whole.

    Raises:
        OSError, DataError: as `read_file`.
    """
    return Path(path).open("rb") if _place(path) is None else io.BytesIO(read_file(path))


def is_file(path: str | Path) -> bool:
    """Whether there is such a file."""
    inside = _place(path)
    if inside is None:
        return Path(path).is_file()
    return inside.name in _open(inside.archive).entries


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder; an archive is one."""
    inside = _place(path)
    if inside is None:
        return Path(path).is_dir()
    return inside.name in _open(inside.archive).folders


def files_below(folder: Path) -> list[Path]:
    """All files (and, on disk, folders) below a folder, sorted."""
    inside = _place(folder)
    if inside is None:
        return sorted(folder.rglob("*"))
    start = f"{inside.name}/" if inside.name else ""
    names = (name for name in _open(inside.archive).entries if name.startswith(start))
    return sorted(folder / name[len(start) :] for name in names)


def stamp(path: str | Path) -> list[int]:
    """What changes when a file does: [time of the last change in ns, bytes]; in an archive, the time of that.

    Raises:
        OSError: if there is no such file.
    """
    inside = _place(path)
    status = Path(path if inside is None else inside.archive).stat()
    if inside is None:
        return [status.st_mtime_ns, status.st_size]
    entry = _open(inside.archive).entries.get(inside.name)
    if entry is None:
        raise FileNotFoundError(2, "not in the archive", str(path))
    return [status.st_mtime_ns, entry.file_size]


class _Place(NamedTuple):
    archive: str
    name: str  # inside, with /


def _place(path: str | Path) -> _Place | None:
    """Where a path enters an archive; None if it does not."""
    text = str(path)
    if SUFFIX not in text.lower():
        return None  # nearly all: at the price of a search in a string
    parts = Path(text).parts
    for number, part in enumerate(parts, start=1):
        archive = os.path.join(*parts[:number])  # noqa: PTH118 (called for every file of a data set)
        if part.lower().endswith(SUFFIX) and os.path.isfile(archive):  # noqa: PTH113
            return _Place(archive, "/".join(parts[number:]))
    return None


def _open(path: str) -> Archive:
    status = os.stat(path)  # noqa: PTH116
    # A process that was forked shares the place in the file with its parent: it needs one of its own.
    return _open_once(path, status.st_mtime_ns, status.st_size, os.getpid())


@lru_cache(maxsize=8)
def _open_once(path: str, _changed: int, _length: int, _process: int) -> Archive:
    try:
        file = zipfile.ZipFile(path)  # stays open as long as it is in the cache
    except (zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: is not a zip archive, or not a whole one ({error}). Get it again.") from error
    entries = {entry.filename: entry for entry in file.infolist() if not entry.is_dir() and _is_below(entry.filename)}
    folders = {str(parent) for name in entries for parent in PurePosixPath(name).parents}
    return Archive(file, entries, frozenset(folders - {"."} | {""}))


def _is_below(name: str) -> bool:
    """Whether a name stays in the archive; others can only be meant to do harm."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
