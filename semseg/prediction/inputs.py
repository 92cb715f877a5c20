"""What mode=predict shall look at: one word of the command line to image and video files, each with a place of its own.

No torch. Nothing here opens an image; a list is opened, and so are folders.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from semseg.data import store
from semseg.data.records import IMAGE_SUFFIXES, NOT_READ
from semseg.data.store import Unused
from semseg.errors import ConfigError, DataError

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
LIST_SUFFIXES = frozenset({".lst", ".txt"})


class Input(NamedTuple):
    """One file to predict."""

    path: Path
    place: Path  # of its outputs below the run folder, without suffix

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(word: str, run_dir: Path, stdin: TextIO = sys.stdin, unused: Unused | None = None) -> list[Input]:
    """The files that `input` means, sorted unless they come from a list, each once.

    Args:
        word: an image or a video, a folder or zip archive (searched at every depth), a pattern such as photos/**/*.jpg,
            a text file with one path a line (those that are not absolute start at the list's folder), or - for such
            lines on standard input (which start at the current folder). What is there under this very name, or under
            the first parts of it, is no pattern.
        run_dir: where outputs go; what is in it is no input of a folder or a pattern.
        unused: takes the files and folders that are seen and are no inputs.

    Raises:
        ConfigError: for an address, and for a run folder that lies over the inputs.
        DataError: if there is nothing.
    """
    if "://" in word:
        raise ConfigError(f"input={word}: addresses are not opened. Download the file and give its path.")
    path, unused = store.path_of(word), Unused() if unused is None else unused
    if word == "-":
        files, base = read_lines(stdin, "input=-", Path(), unused), None
    elif store.is_folder(path):
        files, base = inputs_among(store.files_below(path, unused), path, run_dir, unused), path
    elif path.suffix.lower() in LIST_SUFFIXES and path.is_file():
        files, base = read_list(path, unused), None
    elif store.is_file(path):
        files, base = [path], path.parent
    elif glob.has_magic(word):
        files, base = inputs_among(matches(path), None, run_dir, unused), None
    else:
        raise DataError(f"input={word}: there is no such file or folder.")
    if not files:
        told = f" Not used: {unused.words(path)}." if unused.count else ""
        raise DataError(f"input={word}: no images or videos there (looked for {', '.join(sorted(suffixes()))}).{told}")
    files = list(dict.fromkeys(files))
    if any(file.resolve().parent == run_dir.resolve() for file in files):
        raise ConfigError(f"run_dir={run_dir}: holds inputs, which outputs could overwrite. Give another folder.")
    return [Input(file, place) for file, place in zip(files, places(files, base), strict=True)]


def suffixes() -> frozenset[str]:
    """Of files that are inputs. Those of NOT_READ are, too: predicting them fails, with the reason."""
    return IMAGE_SUFFIXES | NOT_READ | VIDEO_SUFFIXES


def is_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def inputs_among(paths: Iterable[Path], folder: Path | None, run_dir: Path, unused: Unused) -> list[Path]:
    """Images and videos, without earlier outputs in `run_dir` unless `folder` is in it; others go to `unused`."""
    found = []
    for path in paths:
        if path.suffix.lower() not in suffixes():
            unused.add(path.suffix.lower() or "without suffix", path)
        elif is_below(path, run_dir) and not (folder and is_below(folder, run_dir)):
            unused.add("in the run folder", path)
        else:
            found.append(path)
    return found


def matches(pattern: Path) -> list[Path]:
    """The files that a pattern means, sorted; parts of it that are there under their very name are no patterns.

    `**` means any number of folders. Hidden files are matched by patterns that begin with a dot only, and links to
    folders are followed but once.
    """
    return sorted(
        {path for path in matching(Path(pattern.anchor), pattern.relative_to(pattern.anchor).parts) if path.is_file()}
    )


def matching(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Paths below `folder` whose names match `parts`, some of them more than once."""
    if not parts:
        yield folder
        return
    first, *rest = parts
    literal = Path(store.existing(str(folder / first)))
    if os.path.lexists(literal):
        yield from matching(literal, rest)
    elif first == "**":
        files = store.files_below(folder)
        folders = {folder} | {parent for file in files for parent in file.parents if parent.is_relative_to(folder)}
        for place in folders:
            yield from matching(place, rest or ["*"])
    elif glob.has_magic(first) and folder.is_dir():
        form = unicodedata.normalize("NFC", first)
        for path in folder.iterdir():
            is_meant = fnmatch.fnmatchcase(unicodedata.normalize("NFC", path.name), form)
            if is_meant and (first.startswith(".") or not store.is_hidden(path.name)) and store.is_utf8(path.name):
                yield from matching(path, rest)


def read_list(path: Path, unused: Unused) -> list[Path]:
    """The paths in a text file.

    Raises:
        DataError: if it is no text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            return read_lines(file, str(path), path.parent, unused)
    except OSError as error:
        raise DataError(f"{path}: the list cannot be read ({error.strerror}).") from error


def read_lines(lines: Iterable[str], where: str, folder: Path, unused: Unused) -> list[Path]:
    """One path a line, which may have Windows' backslashes; blank lines and lines that begin with # are left out.

    Raises:
        DataError: if they are no text.
    """
    found = []
    try:
        for line in lines:
            name = line.removeprefix("\ufeff").strip()
            if not store.is_utf8(name):
                unused.add("with a name that is not UTF-8", name)
            elif name and not name.startswith("#"):
                path = store.path_of(folder / store.path_of(name))
                is_windows = "\\" in name and not os.path.lexists(path)
                found.append(store.path_of(folder / name.replace("\\", "/")) if is_windows else path)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: the list cannot be read: not UTF-8 text (byte {error.start}).") from error
    return found


def places(files: list[Path], base: Path | None) -> list[Path]:
    """A place for each file: its path below what they have in common, or below `base`; no two are equal.

    Files that differ in nothing but the suffix keep it: a.jpg and a.png become a_jpg and a_png.

    >>> [place.as_posix() for place in places([Path("x/a.jpg"), Path("x/a.png"), Path("x/y/a.jpg")], Path("x"))]
    ['a_jpg', 'a_png', 'y/a']
    """
    absolute = [Path(os.path.abspath(file)) for file in files]  # noqa: PTH100 - without following links
    start = Path(os.path.abspath(base)) if base else Path(os.path.commonpath([file.parent for file in absolute]))  # noqa: PTH100
    relative = [file.relative_to(start) for file in absolute]
    stems = Counter(place.with_suffix("") for place in relative)
    taken: set[Path] = set()
    found = []
    for place in relative:
        is_alone = stems[place.with_suffix("")] == 1
        free = wanted = place.with_suffix("") if is_alone else place.with_name(place.name.replace(".", "_"))
        number = 2
        while free in taken:
            free, number = wanted.with_name(f"{wanted.name}_{number}"), number + 1
        taken.add(free)
        found.append(free)
    return found
