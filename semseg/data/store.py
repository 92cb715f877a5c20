"""Files of a data set, on disk or inside a zip archive: `scenes.zip/images/a.jpg` is a path like any other.

Errors are those of files on disk (FileNotFoundError and other OSError), and DataError for a broken archive. A name is
found in either Unicode form: é may be one character, or an e and an accent, as macOS writes it.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from semseg.errors import DataError
from semseg.storage.archive import entry_name

SUFFIX = ".zip"
MAX_BYTES = 2**30  # of one file once it is unpacked: more than any image has; a few kB can announce terabytes
SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"})  # of file managers
OLD_ENCODINGS = ("cp932", "gbk", "big5", "cp949", "cp1252", "cp1251", "cp850", "cp866")  # of names in zip archives
MAX_SHOWN = 3  # names of files that are not used, for each reason


class Archive(NamedTuple):
    """An open archive. Only as long as the process lives: nobody else writes into it."""

    file: zipfile.ZipFile
    entries: dict[str, zipfile.ZipInfo]  # by path inside, files alone
    folders: frozenset[str]  # "" is the archive itself
    aliases: dict[str, str]  # composed Unicode form -> path inside, of names that are not ASCII
    top: str  # the folder that holds everything else, with / at its end; "" if there is none
    unused: list[tuple[str, str]]  # reason, path inside

    def place_of(self, name: str) -> str:
        """The path inside that `name` means: itself, or below the one top folder, or in another form or encoding."""
        names = [name]
        if not (name.isascii() or name in self.entries):
            names += [unicodedata.normalize("NFC", name), *_as_old_systems_wrote(name)]
        for one in names:
            for place in (one, self.top + one):
                found = self.aliases.get(place, place)
                if found in self.entries or found in self.folders:
                    return found
        for parent in PurePosixPath(name).parents:
            if str(parent) in self.entries and parent.suffix.lower() == SUFFIX:
                raise DataError(
                    f"{self.file.filename}/{parent}: archives in archives are not read. Unpack the outer one."
                )
        return name


class Unused:
    """Files and folders that are seen in a data set and not used, by reason, to be reported in one line."""

    def __init__(self) -> None:
        self._paths: dict[str, dict[str, None]] = {}  # reason -> paths, each once, in order

    def add(self, reason: str, path: str | Path) -> None:
        """Count a path; the reason follows a number: "hidden", ".txt"."""
        self._paths.setdefault(reason, {})[str(path)] = None

    @property
    def count(self) -> int:
        return sum(map(len, self._paths.values()))

    def words(self, root: str | Path = "") -> str:
        """Counts and a few names for each reason, as paths below `root`; empty if everything is used.

        >>> unused = Unused()
        >>> unused.add("hidden", "set/.a")
        >>> unused.add(".txt", "set/notes.txt")
        >>> unused.words("set")
        '1 hidden (.a), 1 .txt (notes.txt)'
        """
        prefix = f"{root}/"
        return ", ".join(
            f"{len(paths)} {reason} "
            f"({', '.join(printable(path.removeprefix(prefix)) for path in list(paths)[:MAX_SHOWN])}"
            f"{', ...' if len(paths) > MAX_SHOWN else ''})"
            for reason, paths in self._paths.items()
        )


def printable(name: str) -> str:
    r"""A file name as characters that every terminal and file takes; bytes that are not UTF-8 become \xe9.

    >>> printable("caf\udce9\n")
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
    """Whether a file or folder of this name is one of the system, or hidden."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def read_file(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        OSError: as `Path.read_bytes`.
        DataError: if the archive, or the file in it, is broken, encrypted or too large.
    """
    inside = _place(path)
    if inside is None:
        return Path(path).read_bytes()
    archive = _open(inside.archive)
    name = archive.place_of(inside.name)
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
        return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for a name that is too long
    archive = _open(inside.archive)
    return archive.place_of(inside.name) in archive.entries


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder; an archive is one."""
    inside = _place(path)
    if inside is None:
        return os.path.isdir(path)  # noqa: PTH112
    archive = _open(inside.archive)
    return archive.place_of(inside.name) in archive.folders


def files_below(folder: Path, unused: Unused | None = None) -> list[Path]:
    """All files below a folder, sorted. Links to folders are followed, but not to folders that are searched anyway.

    Args:
        unused: takes what is left out: hidden files and folders, broken links, empty folders, names that are not UTF-8.
    """
    unused = Unused() if unused is None else unused
    inside = _place(folder)
    if inside is None:
        return sorted(map(Path, _walk(str(folder), unused)))
    archive = _open(inside.archive)
    place = archive.place_of(inside.name)
    start = f"{place}/" if place else ""
    for reason, name in archive.unused:
        unused.add(reason, f"{inside.archive}/{name}")
    found = []
    for name in archive.entries:
        if name.startswith(start):
            below = name[len(start) :]
            if any(map(is_hidden, below.split("/"))):
                unused.add("hidden", folder / below)
            else:
                found.append(folder / below)
    return sorted(found)


def names_in(folder: Path, unused: Unused) -> list[str]:
    """Names of the files and folders in a folder that are not hidden, sorted, printable.

    Args:
        unused: takes the entries of an archive that are left out.
    """
    inside = _place(folder)
    if inside is None:
        found = set(os.listdir(folder))  # noqa: PTH208
    else:
        archive = _open(inside.archive)
        for reason, name in archive.unused:
            unused.add(reason, name)
        place = archive.place_of(inside.name)
        start = f"{place}/" if place else ""
        found = {name[len(start) :].split("/", 1)[0] for name in archive.entries if name.startswith(start)}
    return sorted(printable(name) for name in found if not is_hidden(name))


def _walk(start: str, unused: Unused) -> Iterator[str]:
    top = os.path.realpath(start)
    waiting: list[tuple[str, tuple[str, ...]]] = [
        (start, (top,))
    ]  # a folder, and where it and the links that lead to it really are
    while waiting:
        folder, above = waiting.pop()
        try:
            with os.scandir(folder) as found:
                entries = list(found)
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
                if _is_in(real, top) or any(_is_in(place, real) for place in above):
                    unused.add("link to a folder that is searched anyway", entry.path)
                else:
                    waiting.append((entry.path, (*above, real)))
            elif entry.is_dir():
                waiting.append((entry.path, above))
            elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():  # noqa: PTH113
                yield entry.path
            else:
                unused.add("broken link" if entry.is_symlink() else "neither file nor folder", entry.path)


def _is_in(path: str, folder: str) -> bool:
    """Whether a real path is that of a folder, or leads below it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def path_of(text: str | Path) -> Path:
    """The path that a user means: ~ is the home directory, and names are found in either Unicode form."""
    return Path(existing(os.path.expanduser(text)))  # noqa: PTH111 - Path.expanduser raises for unknown users


def existing(path: str) -> str:
    """`path`, or, if there is no such file, the one whose name differs in the Unicode form of its letters alone."""
    if path.isascii() or os.path.lexists(path) or _place(path) is not None:
        return path
    folder, name = os.path.split(path)
    if folder == path:
        return path
    folder = existing(folder) if folder else folder
    with contextlib.suppress(OSError):  # not a folder: the reader of the path says so
        changed = os.stat(folder or ".").st_mtime_ns  # noqa: PTH116
        name = _names_by_form(folder or ".", changed).get(unicodedata.normalize("NFC", name), name)
    return os.path.join(folder, name)  # noqa: PTH118


@lru_cache(maxsize=64)
def _names_by_form(folder: str, _changed: int) -> dict[str, str]:
    """Names in a folder that are not ASCII, by their composed form."""
    return {unicodedata.normalize("NFC", name): name for name in os.listdir(folder) if not name.isascii()}  # noqa: PTH208


def stamp(path: str | Path) -> list[int]:
    """What changes when a file does: [time of the last change in ns, bytes]; in an archive, the time of that.

    Raises:
        OSError: if there is no such file.
    """
    inside = _place(path)
    status = Path(path if inside is None else inside.archive).stat()
    if inside is None:
        return [status.st_mtime_ns, status.st_size]
    archive = _open(inside.archive)
    entry = archive.entries.get(archive.place_of(inside.name))
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
    entries: dict[str, zipfile.ZipInfo] = {}
    unused: list[tuple[str, str]] = []
    for entry in file.infolist():
        name = entry_name(entry)
        if name.endswith("/"):
            continue
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:  # such names can only be meant to do harm
            unused.append(("with a path that leads out of the archive", name))
        elif stat.S_ISLNK(entry.external_attr >> 16):
            unused.append(("symbolic link", str(place)))
        else:
            if str(place) in entries:
                unused.append(("older entry of the same name", str(place)))
            entries[str(place)] = entry
    folders = {str(parent) for name in entries for parent in PurePosixPath(name).parents} - {"."} | {""}
    names = (name for name in (*folders, *entries) if not name.isascii())
    aliases = {unicodedata.normalize("NFC", name): name for name in names}
    tops = {name.split("/", 1)[0] for name in entries if not is_hidden(name.split("/", 1)[0])}
    top = next(iter(tops)) if len(tops) == 1 else ""
    return Archive(file, entries, frozenset(folders), aliases, f"{top}/" if top in folders and top else "", unused)


def _as_old_systems_wrote(name: str) -> Iterator[str]:
    """A name as zipfile reads it where it was written in the encoding of a country, which no archive states."""
    for encoding in OLD_ENCODINGS:
        try:
            yield name.encode(encoding).decode("cp437")
        except UnicodeError:
            continue
