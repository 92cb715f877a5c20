"""Unpacking downloaded archives: all members are checked before the first byte is written. No torch.

What is refused is what an archive of a data set never holds, and a hostile one may: ways out of the folder, links,
devices, two files of one name, and contents that are out of proportion to the archive.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import re
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from filelock import FileLock
from rich.progress import track

from semseg.errors import DataError

MAX_ENTRIES = 1_000_000
MAX_RATIO = 200  # bytes unpacked for each byte of the archive
MIN_SUSPICIOUS = 1 << 24  # bytes unpacked; below that any ratio is harmless
BLOCK = 1 << 20  # bytes
DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError,
    EOFError, OverflowError, UnicodeDecodeError, NotImplementedError,
)  # fmt: skip


class Member(NamedTuple):
    """One file or folder of an archive."""

    name: str  # as the archive has it, for messages
    size: int  # bytes
    problem: str  # why it must not be unpacked whatever its name is; empty: nothing
    is_folder: bool
    entry: Any  # zipfile.ZipInfo or tarfile.TarInfo, to read it with


class Archive(NamedTuple):
    """An open zip or tar file."""

    members: Iterator[Member]  # in the order in which they lie in the file
    read: Callable[[Any], IO[bytes] | None]  # the content of an entry


def extract(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar file (of any compression that `tarfile` knows) to `folder`, whole or not at all.

    If everything in it lies in one top folder, the content of that folder becomes `folder`, whatever it is called.
    Permissions, owners and times are not taken over, nor are macOS's own files. Names in a zip file may have Windows'
    backslashes. A temporary folder beside `folder` is used, and what a killed
    process has left there is removed.

    Raises:
        DataError: if `folder` is there and not empty, the archive is damaged, encrypted or too large for the disk, or
            for a member that could harm: names the archive and the member. Nothing is written then.
        OSError: if `folder` cannot be written.
    """
    folder = folder.resolve()  # where a link leads, the temporary folder has to be on the same disk
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.unpacking")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder}: is there already and not empty. Remove it, or unpack {archive} somewhere else.")
        members = checked(archive)
        require_space(archive, sum(member.size for member in members.values()), folder.parent)
        if temporary.exists():
            shutil.rmtree(temporary)
        try:
            write(archive, members, temporary)
            (temporary / top_folder(members)).replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def checked(archive: Path) -> dict[PurePosixPath, Member]:
    """The members of an archive by their path below the folder; each of them can be unpacked.

    Raises:
        DataError: if that is not so.
    """
    members: dict[PurePosixPath, Member] = {}
    most = max(MIN_SUSPICIOUS, MAX_RATIO * archive.stat().st_size)
    size = 0
    with opened(archive) as found:
        for count, member in enumerate(found.members, start=1):
            path, problem = safe_path(member.name)
            size += member.size
            if count > MAX_ENTRIES:
                problem = f"the archive has more than {MAX_ENTRIES:,} entries"
            elif size > most:
                problem = f"the archive unpacks to more than {MAX_RATIO} times its size"
            elif member.size < 0 or not (path.parts or member.is_folder):
                problem = "it has no name or a negative size"
            elif path in members and not (member.is_folder and members[path].is_folder):
                problem = "two entries have this name"
            if problem or member.problem:
                raise refusal(archive, member.name, problem or member.problem)
            if not is_of_macos(path):
                members[path] = member
    for path, member in members.items():
        if any(parent in members and not members[parent].is_folder for parent in path.parents):
            raise refusal(archive, member.name, "it lies in what is a file in the same archive")
    if not any(not member.is_folder for member in members.values()):
        raise DataError(f"{archive}: holds no files.")
    return members


def refusal(archive: Path, name: str, reason: str) -> DataError:
    return DataError(f"{archive}: not unpacked because of its entry {name!r}: {reason}.")


def safe_path(name: str) -> tuple[PurePosixPath, str]:
    """Where an entry of this name goes, relative to the folder, and why it must not go there (empty: it may).

    >>> safe_path("./images/a.jpg")
    (PurePosixPath('images/a.jpg'), '')
    >>> safe_path("images/../../a.jpg")[1]
    'its path leads out of the folder'
    """
    path = PurePosixPath(name)
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return path, "its path is absolute"
    if ".." in re.split(r"[/\\]", name):
        return path, "its path leads out of the folder"
    if "\\" in name or "\0" in name:
        return path, "its path has a character that does not belong there"
    return path, ""


def is_of_macos(path: PurePosixPath) -> bool:
    """Whether an entry holds what macOS keeps of a file besides its content; it is not unpacked."""
    return "__MACOSX" in path.parts or path.name.startswith("._") or path.name == ".DS_Store"


def require_space(archive: Path, size: int, folder: Path) -> None:
    """Raises DataError if `size` bytes do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(f"{archive}: unpacks to {size:,} bytes, but {folder} has room for {free:,}. Free some space.")


def top_folder(members: dict[PurePosixPath, Member]) -> str:
    """The one folder that holds everything else; "" if there is none."""
    tops = {path.parts[0] for path in members if path.parts}
    top = next(iter(tops))
    is_file = any(path.parts == (top,) and not member.is_folder for path, member in members.items())
    return top if len(tops) == 1 and not is_file else ""


def write(archive: Path, members: dict[PurePosixPath, Member], folder: Path) -> None:
    """Write the members of `archive`, which have been checked, below `folder`.

    Raises:
        DataError: if one of them cannot be read.
        OSError: if one of them cannot be written.
    """
    with opened(archive) as found:
        names = track(members.items(), f"unpacking {archive.name}", disable=not sys.stdout.isatty())
        for path, member in names:
            target = folder / path
            if member.is_folder:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                copy(found.read(member.entry), target)
            except DAMAGED as error:
                raise refusal(archive, member.name, f"it is damaged ({error})") from error


def copy(source: IO[bytes] | None, target: Path) -> None:
    """Write the content of an entry to a file that is not there yet."""
    assert source is not None, "only regular files pass the check"
    with source, target.open("xb") as file:
        shutil.copyfileobj(source, file, BLOCK)


# ---- the two formats


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """`path` as what it is by its content.

    Raises:
        DataError: if it is neither a zip nor a tar file, or damaged.
    """
    try:
        if tarfile.is_tarfile(path):  # asked first: a tar file whose last entry is a zip file passes for a zip file
            with tarfile.open(path) as file:
                yield Archive(tar_members(file), file.extractfile)
        else:
            with zipfile.ZipFile(path) as file:
                yield Archive((zip_member(entry) for entry in file.infolist()), file.open)
    except DAMAGED as error:
        raise DataError(
            f"{path}: cannot be read as a zip or tar file ({error}). Remove it and get it again."
        ) from error


def zip_member(entry: zipfile.ZipInfo) -> Member:
    kind = stat.S_IFMT(entry.external_attr >> 16)  # of the Unix mode; 0 where it was packed on another system
    problem = "" if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "it is a link or a device"
    problem = "it is encrypted" if entry.flag_bits & 1 else problem
    name = entry_name(entry)
    return Member(name, entry.file_size, problem, name.endswith("/"), entry)


def tar_members(file: tarfile.TarFile) -> Iterator[Member]:
    """All members, then a look at the end: `tarfile` takes a cut, or an unreadable header, for the end of the file.

    Raises:
        tarfile.ReadError, EOFError, OSError: if it ends in another way than it should.
    """
    for entry in file:
        problem = "" if entry.isreg() or entry.isdir() else "it is a link or a device"
        yield Member(entry.name, entry.size, problem, entry.isdir(), entry)
    assert file.fileobj is not None, "it is open"
    file.fileobj.seek(file.offset)
    end = file.fileobj.read(MIN_SUSPICIOUS)  # a compressed file checks its sum on the way
    if not end.startswith(tarfile.NUL * tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it breaks off")


def entry_name(entry: zipfile.ZipInfo) -> str:
    """The path of an entry of a zip archive with /, whatever system has packed it; a folder ends with /."""
    name, is_text = entry.filename, bool(entry.flag_bits & 0x800)  # the flag: the name is UTF-8
    if not is_text and not name.isascii():
        with contextlib.suppress(UnicodeError):
            # macOS and old Linux tools write UTF-8 without the flag; zipfile has read it as cp437.
            name, is_text = name.encode("cp437").decode(), True
    if "\\" not in name:
        return name
    if is_text or name.isascii() or "/" not in name:
        return name.replace("\\", "/")
    # In East Asian encodings, a backslash may be the second byte of a character.
    return "".join(
        "/" if character == "\\" and before.isascii() else character
        for before, character in zip(f" {name}", name, strict=False)
    )
