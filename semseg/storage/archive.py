"""Unpack downloaded archives; all members are checked before the first byte is written. No torch.

Entries that no archive of a data set contains, but a hostile one may, are refused: paths out of the folder, links,
devices, two files with one name, and contents that are out of proportion to the archive.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from filelock import FileLock
from rich.progress import track

from semseg.errors import DataError, describe_reason
from semseg.storage.atomic import make_folder

MAX_ENTRIES = 1_000_000
MAX_RATIO = 200  # bytes unpacked for each byte of the archive
MIN_SUSPICIOUS = 1 << 24  # bytes unpacked; below that any ratio is harmless
COPY_BYTES = 1 << 20
READ_ERRORS = (  # what damaged and encrypted archives raise
    zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError,
    EOFError, OverflowError, UnicodeDecodeError, NotImplementedError, RuntimeError,
)  # fmt: skip


class Member(NamedTuple):
    """One file or folder of an archive."""

    name: str  # as the archive has it, for messages
    size: int  # bytes
    is_folder: bool
    problem: str  # why it must not be unpacked, whatever its name is; empty: nothing
    open: Callable[[], IO[bytes] | None]  # its content


def extract_archive(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar file (with any compression that `tarfile` knows) to `folder`, completely or not at all.

    If everything lies in one top folder, the content of that folder becomes `folder`, whatever its name is.
    Permissions, owners and times are not restored, and macOS's own files are skipped. Names in a zip file may have
    Windows' backslashes. Files are unpacked beside `folder` and moved into place; what a killed process left there is
    removed.

    Raises:
        DataError: if `folder` exists and is not empty, the archive is damaged, encrypted or too large for the disk, or
            a member could do harm: names the archive and the member. Nothing is written then.
        OSError: if `folder` cannot be written.
    """
    folder = folder.resolve()  # the temporary folder has to be on the disk that a link points to
    make_folder(folder.parent)
    temporary = folder.with_name(f".{folder.name}.unpacking")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder}: exists and is not empty. Remove it, or unpack {archive} to another folder.")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with open_archive(archive) as listed:
                members = check_members(archive, listed)
                require_space(archive, sum(member.size for member in members.values()), folder.parent)
                write_members(archive, members, temporary)
            (temporary / find_top_folder(members)).replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_members(archive: Path, listed: Iterable[Member]) -> dict[PurePosixPath, Member]:
    """The members of an archive by their path below the folder.

    Raises:
        DataError: if one of them must not be unpacked.
    """
    members: dict[PurePosixPath, Member] = {}
    max_size = max(MIN_SUSPICIOUS, MAX_RATIO * archive.stat().st_size)
    size = 0
    for count, member in enumerate(listed, start=1):
        path, problem = parse_member_path(member.name)
        size += member.size
        if count > MAX_ENTRIES:
            problem = f"the archive has more than {MAX_ENTRIES:,} entries"
        elif size > max_size:
            problem = f"the archive unpacks to more than {MAX_RATIO} times its size"
        elif member.size < 0 or not (path.parts or member.is_folder):
            problem = "it has no name or a negative size"
        elif path in members and not (member.is_folder and members[path].is_folder):
            problem = "two entries have this name"
        if problem or member.problem:
            raise member_error(archive, member, problem or member.problem)
        if not is_macos_metadata(path):
            members[path] = member
    for path, member in members.items():
        if any(parent in members and not members[parent].is_folder for parent in path.parents):
            raise member_error(archive, member, "its folder is a file in the same archive")
    if all(member.is_folder for member in members.values()):
        raise DataError(f"{archive}: contains no files.")
    return members


def member_error(archive: Path, member: Member, reason: str) -> DataError:
    return DataError(f"{archive}: not unpacked because of its entry {member.name!r}: {reason}.")


def parse_member_path(name: str) -> tuple[PurePosixPath, str]:
    """The path of an entry relative to the folder, and why it must not be written there (empty: it may).

    >>> parse_member_path("./images/a.jpg")
    (PurePosixPath('images/a.jpg'), '')
    >>> parse_member_path("images/../../a.jpg")[1]
    'its path leads out of the folder'
    """
    path = PurePosixPath(name)
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return path, "its path is absolute"
    if ".." in re.split(r"[/\\]", name):
        return path, "its path leads out of the folder"
    if "\\" in name or "\0" in name:
        return path, "its path contains a forbidden character"
    return path, ""


def is_macos_metadata(path: PurePosixPath) -> bool:
    """Whether an entry holds what macOS keeps about a file besides its content."""
    return "__MACOSX" in path.parts or path.name.startswith("._") or path.name == ".DS_Store"


def require_space(archive: Path, size: int, folder: Path) -> None:
    """Raises DataError if `size` bytes do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(f"{archive}: unpacks to {size:,} bytes, but {folder} has room for {free:,}. Free some space.")


def find_top_folder(members: dict[PurePosixPath, Member]) -> str:
    """The one folder that contains everything else; "" if there is none."""
    top, *others = {path.parts[0] for path in members if path.parts}
    is_file = any(path.parts == (top,) and not member.is_folder for path, member in members.items())
    return "" if others or is_file else top


def write_members(archive: Path, members: dict[PurePosixPath, Member], folder: Path) -> None:
    """Write the members of `archive`, which have been checked, below `folder`.

    Raises:
        DataError: if one of them cannot be read.
        OSError: if one of them cannot be written.
    """
    for path, member in track(members.items(), f"unpacking {archive.name}", disable=not sys.stdout.isatty()):
        target = folder / path
        make_folder(target if member.is_folder else target.parent)
        if member.is_folder:
            continue
        try:
            source = member.open()
            assert source is not None, "only regular files pass the check"
            with source, target.open("xb") as file:
                shutil.copyfileobj(source, file, COPY_BYTES)
        except READ_ERRORS as error:
            raise member_error(archive, member, f"it is damaged ({error})") from error


# ---- the two formats


@contextmanager
def open_archive(path: Path) -> Iterator[Iterator[Member]]:
    """The members of a zip or tar file, in the order in which they are stored.

    Raises:
        DataError: if it is neither, or damaged.
    """
    try:
        if tarfile.is_tarfile(path):  # first: a tar file whose last entry is a zip file also looks like a zip file
            with tarfile.open(path) as file:
                yield list_tar_members(file)
        else:
            with zipfile.ZipFile(path) as file:
                yield (describe_zip_entry(file, entry) for entry in file.infolist())
    except READ_ERRORS as error:
        raise DataError(
            f"{path}: cannot be read as a zip or tar file ({describe_reason(error)}). Remove it and get it again."
        ) from error


def describe_zip_entry(file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Member:
    kind = stat.S_IFMT(entry.external_attr >> 16)  # file type of the Unix mode; 0 if it was packed on another system
    problem = "" if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "it is a link or a device"
    problem = "it is encrypted" if entry.flag_bits & 1 else problem
    name = decode_zip_name(entry)
    return Member(name, entry.file_size, name.endswith("/"), problem, partial(file.open, entry))


def list_tar_members(file: tarfile.TarFile) -> Iterator[Member]:
    """All members, then a check of the end: `tarfile` takes a cut or an unreadable header for the end of the file.

    Raises:
        tarfile.ReadError, EOFError, OSError: if it does not end as a tar file should.
    """
    for entry in file:
        problem = "" if entry.isreg() or entry.isdir() else "it is a link or a device"
        yield Member(entry.name, entry.size, entry.isdir(), problem, partial(file.extractfile, entry))
    assert file.fileobj is not None, "it is open"
    file.fileobj.seek(file.offset)
    end = file.fileobj.read(MIN_SUSPICIOUS)  # a compressed file verifies its checksum on the way
    if not end.startswith(tarfile.NUL * tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it is cut short")


def decode_zip_name(entry: zipfile.ZipInfo) -> str:
    """The path of an entry of a zip archive with "/", whatever system packed it; a folder ends with "/"."""
    name, is_text = entry.filename, bool(entry.flag_bits & 0x800)  # the flag: the name is UTF-8
    if not is_text and not name.isascii():
        with contextlib.suppress(UnicodeError):
            # macOS and old Linux tools write UTF-8 without the flag, which zipfile decodes as cp437.
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
