"""Files of a data set, on disk or inside a zip archive: `scenes.zip/images/a.jpg` is a path like any other.

Errors are those of files on disk (FileNotFoundError and other OSErrors), and DataError for a broken archive. Names
match in either Unicode form: é may be one character, or an e and an accent, as macOS writes it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import unicodedata
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from semseg.errors import DataError
from semseg.storage.archive import READ_ERRORS, decode_zip_name

ARCHIVE_SUFFIX = ".zip"
MAX_BYTES = 2**30  # limit of one unpacked file, above any image: an archive of a few kB can announce terabytes
SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"})  # written by file managers
# Encodings of names in old zip archives.
OLD_ENCODINGS = ("cp932", "gbk", "big5", "cp949", "cp1252", "cp1251", "cp850", "cp866")
MAX_UNUSED_NAMES = 3  # names of unused files that a message lists for each reason


class OpenArchive(NamedTuple):
    """An open archive and its index. It is assumed not to change while the process lives."""

    file: zipfile.ZipFile
    entries: dict[str, zipfile.ZipInfo]  # files by their path inside the archive
    folders: frozenset[str]  # "" is the archive itself
    aliases: dict[str, str]  # composed Unicode form -> path inside, for names that are not ASCII
    top: str  # the only folder at the top level, with / at its end; "" if there is none
    unused: list[tuple[str, str]]  # reason, path inside

    def resolve_entry(self, name: str) -> str:
        """The entry for `name`: exactly, below the only top folder, or in another Unicode form or encoding."""
        names = [name]
        if not (name.isascii() or name in self.entries):
            names += [unicodedata.normalize("NFC", name), *_in_old_encodings(name)]
        for candidate in names:
            for path in (candidate, self.top + candidate):
                entry = self.aliases.get(path, path)
                if entry in self.entries or entry in self.folders:
                    return entry
        for parent in PurePosixPath(name).parents:
            if str(parent) in self.entries and parent.suffix.lower() == ARCHIVE_SUFFIX:
                raise DataError(
                    f"{self.file.filename}/{parent}: archives inside archives are not read. Unpack the outer one."
                )
        return name


class UnusedFiles:
    """Files and folders of a data set that are not used, by reason, to be reported in one line."""

    def __init__(self) -> None:
        self._paths: dict[str, dict[str, None]] = {}  # reason -> paths, each once, in order

    def add(self, reason: str, path: str | Path) -> None:
        """Count a path. In messages a number precedes the reason: "hidden", ".txt"."""
        self._paths.setdefault(reason, {})[str(path)] = None

    @property
    def reasons(self) -> list[str]:
        return list(self._paths)

    @property
    def count(self) -> int:
        return sum(map(len, self._paths.values()))

    def describe(self, root: str | Path = "") -> str:
        """Counts and a few names for each reason, as paths below `root`; empty if there are none.

        >>> unused = UnusedFiles()
        >>> unused.add("hidden", "set/.a")
        >>> unused.add(".txt", "set/notes.txt")
        >>> unused.describe("set")
        '1 hidden (.a), 1 .txt (notes.txt)'
        """
        prefix = f"{root}/"
        return ", ".join(
            f"{len(paths)} {reason} "
            f"({', '.join(printable_name(path.removeprefix(prefix)) for path in list(paths)[:MAX_UNUSED_NAMES])}"
            f"{', ...' if len(paths) > MAX_UNUSED_NAMES else ''})"
            for reason, paths in self._paths.items()
        )


def printable_name(name: str) -> str:
    r"""A file name in characters that every terminal and file accepts; bytes that are not UTF-8 become escapes.

    >>> printable_name("caf\udce9\n")
    'caf\\xe9\\n'
    """
    return "".join(
        character
        if character.isprintable()
        else f"\\x{ord(character) - 0xDC00:02x}"
        if 0xDC80 <= ord(character) <= 0xDCFF
        else character.encode("unicode_escape").decode()
        for character in name
    )


def is_utf8(name: str) -> bool:
    """Whether a file name can be written as UTF-8: Python keeps other bytes as lone surrogates."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder with this name is hidden, or belongs to the operating system."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def read_file(path: str | Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: as `Path.read_bytes`.
        DataError: if the archive, or the file in it, is broken, encrypted or too large.
    """
    inside = _split_archive_path(path)
    if inside is None:
        return Path(path).read_bytes()
    archive = _open_archive(inside.archive)
    name = archive.resolve_entry(inside.name)
    if name in archive.folders:
        raise IsADirectoryError(errno.EISDIR, "is a folder in the archive", str(path))
    if name not in archive.entries:
        raise FileNotFoundError(errno.ENOENT, "not in the archive", str(path))
    entry = archive.entries[name]
    if entry.file_size > MAX_BYTES:
        raise DataError(f"{path}: {entry.file_size} bytes when unpacked, which exceeds the limit of {MAX_BYTES}.")
    try:
        return archive.file.read(entry)
    except (*READ_ERRORS, OSError) as error:
        if not _is_damage(error):
            raise
        raise DataError(f"{path}: cannot be unpacked ({error}). Create the archive again.") from error


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        UnicodeDecodeError: if it is not UTF-8.
        OSError, DataError: as `read_file`.
    """
    return read_file(path).decode("utf-8-sig")


def open_file(path: str | Path) -> BinaryIO:
    """Open a file to read its beginning; a file in an archive is unpacked as a whole.

    Raises:
        OSError, DataError: as `read_file`.
    """
    return Path(path).open("rb") if _split_archive_path(path) is None else io.BytesIO(read_file(path))


def is_file(path: str | Path) -> bool:
    """Whether the path is a file."""
    inside = _split_archive_path(path)
    if inside is None:
        return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for a name that is too long
    archive = _open_archive(inside.archive)
    return archive.resolve_entry(inside.name) in archive.entries


def is_folder(path: str | Path) -> bool:
    """Whether the path is a folder; an archive counts as one."""
    inside = _split_archive_path(path)
    if inside is None:
        return os.path.isdir(path)  # noqa: PTH112
    archive = _open_archive(inside.archive)
    return archive.resolve_entry(inside.name) in archive.folders


def list_files_below(folder: Path, unused: UnusedFiles | None = None) -> list[Path]:
    """All files below a folder, sorted. Links to folders are followed, unless the folder is searched anyway.

    Args:
        unused: collects what is skipped: hidden files and folders, broken links, empty folders, names that are not
            UTF-8.
    """
    unused = UnusedFiles() if unused is None else unused
    inside = _split_archive_path(folder)
    if inside is None:
        return sorted(map(Path, _walk(str(folder), unused)))
    archive = _open_archive(inside.archive)
    folder_inside = archive.resolve_entry(inside.name)
    start = f"{folder_inside}/" if folder_inside else ""
    for reason, name in archive.unused:
        unused.add(reason, f"{inside.archive}/{name}")
    paths = []
    for name in archive.entries:
        if name.startswith(start):
            below = name[len(start) :]
            if any(map(is_hidden, below.split("/"))):
                unused.add("hidden", folder / below)
            else:
                paths.append(folder / below)
    return sorted(paths)


def list_folder(folder: Path, unused: UnusedFiles) -> list[str]:
    """Printable names of the files and folders in a folder that are not hidden, sorted.

    Args:
        unused: collects the entries of an archive that are skipped.
    """
    inside = _split_archive_path(folder)
    if inside is None:
        names = set(os.listdir(folder))  # noqa: PTH208
    else:
        archive = _open_archive(inside.archive)
        for reason, name in archive.unused:
            unused.add(reason, name)
        folder_inside = archive.resolve_entry(inside.name)
        start = f"{folder_inside}/" if folder_inside else ""
        names = {name[len(start) :].split("/", 1)[0] for name in archive.entries if name.startswith(start)}
    return sorted(printable_name(name) for name in names if not is_hidden(name))


def _walk(start: str, unused: UnusedFiles) -> Iterator[str]:
    top = os.path.realpath(start)
    # Each folder with the real paths of itself and of the links that lead to it.
    waiting: list[tuple[str, tuple[str, ...]]] = [(start, (top,))]
    while waiting:
        folder, parents = waiting.pop()
        try:
            with os.scandir(folder) as iterator:
                entries = list(iterator)
        except OSError as error:
            unused.add(f"unreadable ({error.strerror})", folder)
            continue
        if not entries:
            unused.add("empty", folder)
        for entry in entries:
            if is_hidden(entry.name):
                unused.add("hidden", entry.path)
            elif not is_utf8(entry.name):
                unused.add("with a name that is not UTF-8", entry.path)
            elif entry.is_symlink() and os.path.isdir(entry.path):  # noqa: PTH112
                real = os.path.realpath(entry.path)
                if _is_same_or_below(real, top) or any(_is_same_or_below(parent, real) for parent in parents):
                    unused.add("link to a folder that is searched anyway", entry.path)
                else:
                    waiting.append((entry.path, (*parents, real)))
            elif not entry.is_symlink() and entry.is_dir():  # a link that leads to itself cannot be asked
                waiting.append((entry.path, parents))
            elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():  # noqa: PTH113
                yield entry.path
            else:
                unused.add("broken link" if entry.is_symlink() else "neither file nor folder", entry.path)


def _is_same_or_below(path: str, folder: str) -> bool:
    """Whether a real path is a folder itself, or lies below it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def resolve_path(text: str | Path) -> Path:
    """A path as users write it: ~ is the home directory, and names match in either Unicode form."""
    return Path(match_unicode_form(os.path.expanduser(text)))  # noqa: PTH111 - Path.expanduser raises for unknown users


def match_unicode_form(path: str) -> str:
    """`path`, or, if it does not exist, the existing path that differs only in the Unicode form of its letters."""
    if path.isascii() or os.path.lexists(path) or _split_archive_path(path) is not None:
        return path
    folder, name = os.path.split(path)
    if folder == path:
        return path
    folder = match_unicode_form(folder) if folder else folder
    with contextlib.suppress(OSError):  # not a folder: the reader of the path says so
        changed = os.stat(folder or ".").st_mtime_ns  # noqa: PTH116
        name = _names_by_unicode_form(folder or ".", changed).get(unicodedata.normalize("NFC", name), name)
    return os.path.join(folder, name)  # noqa: PTH118


@lru_cache(maxsize=64)
def _names_by_unicode_form(folder: str, _changed: int) -> dict[str, str]:
    """The names in a folder that are not ASCII, by their composed form."""
    return {unicodedata.normalize("NFC", name): name for name in os.listdir(folder) if not name.isascii()}  # noqa: PTH208


def file_stamp(path: str | Path) -> list[int]:
    """Time of the last change in ns and length in bytes; a file in an archive has the time of the archive.

    Raises:
        OSError: if there is no such file.
    """
    inside = _split_archive_path(path)
    status = Path(path if inside is None else inside.archive).stat()
    if inside is None:
        return [status.st_mtime_ns, status.st_size]
    archive = _open_archive(inside.archive)
    entry = archive.entries.get(archive.resolve_entry(inside.name))
    if entry is None:
        raise FileNotFoundError(errno.ENOENT, "not in the archive", str(path))
    return [status.st_mtime_ns, entry.file_size]


class _ArchivePath(NamedTuple):
    archive: str
    name: str  # inside, with /


def _split_archive_path(path: str | Path) -> _ArchivePath | None:
    """The archive and the name inside it that a path consists of; None if it leads into no archive."""
    text = str(path)
    if ARCHIVE_SUFFIX not in text.lower():
        return None  # the case of nearly all paths, decided by one string search
    parts = Path(text).parts
    for number, part in enumerate(parts, start=1):
        archive = os.path.join(*parts[:number])  # noqa: PTH118 (called for every file of a data set)
        if part.lower().endswith(ARCHIVE_SUFFIX) and os.path.isfile(archive):  # noqa: PTH113
            return _ArchivePath(archive, "/".join(parts[number:]))
    return None


def _open_archive(path: str) -> OpenArchive:
    status = os.stat(path)  # noqa: PTH116
    # A forked process shares the file position with its parent, so that it needs its own open file.
    return _open_cached(path, status.st_mtime_ns, status.st_size, os.getpid())


def _is_damage(error: Exception) -> bool:
    """Whether an error is about the content of an archive: also of bzip2, and of positions that no file has."""
    return not isinstance(error, OSError) or error.errno in (None, errno.EINVAL)


@lru_cache(maxsize=8)
def _open_cached(path: str, _changed: int, _length: int, _process: int) -> OpenArchive:
    try:
        file = zipfile.ZipFile(path)  # stays open as long as it is in the cache
    except (*READ_ERRORS, OSError) as error:
        if not _is_damage(error):
            raise
        raise DataError(f"{path}: is not a zip archive, or is damaged ({error}). Download it again.") from error
    entries: dict[str, zipfile.ZipInfo] = {}
    unused: list[tuple[str, str]] = []
    for entry in file.infolist():
        name = decode_zip_name(entry)
        if name.endswith("/"):
            continue
        path_inside = PurePosixPath(name)
        if path_inside.is_absolute() or ".." in path_inside.parts:  # only malicious archives have such names
            unused.append(("with a path that leads out of the archive", name))
        elif stat.S_ISLNK(entry.external_attr >> 16):
            unused.append(("symbolic link", str(path_inside)))
        else:
            if str(path_inside) in entries:
                unused.append(("older entry of the same name", str(path_inside)))
            entries[str(path_inside)] = entry
    folders = {str(parent) for name in entries for parent in PurePosixPath(name).parents} - {"."} | {""}
    names = (name for name in (*folders, *entries) if not name.isascii())
    aliases = {unicodedata.normalize("NFC", name): name for name in names}
    tops = {name.split("/", 1)[0] for name in entries if not is_hidden(name.split("/", 1)[0])}
    top = next(iter(tops)) if len(tops) == 1 else ""
    return OpenArchive(file, entries, frozenset(folders), aliases, f"{top}/" if top in folders and top else "", unused)


def _in_old_encodings(name: str) -> Iterator[str]:
    """`name` as zipfile decodes it if it was written in a regional encoding, which archives do not state."""
    for encoding in OLD_ENCODINGS:
        try:
            yield name.encode(encoding).decode("cp437")
        except UnicodeError:
            continue
