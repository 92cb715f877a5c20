"""What mode=predict shall look at: one word of the command line to image and video files, each with a place of its own.

No torch. Nothing here opens an image; a list is opened, and so are folders.
"""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

from semseg.data.records import IMAGE_SUFFIXES
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


def find_inputs(word: str, run_dir: Path, stdin: TextIO = sys.stdin) -> list[Input]:
    """The files that `input` means, sorted unless they come from a list, each once.

    Args:
        word: an image or a video, a folder (searched at every depth), a pattern such as photos/**/*.jpg, a text file
            with one path a line (those that are not absolute start at the list's folder), or - for such lines on
            standard input (which start at the current folder).
        run_dir: where outputs go; what is in it is no input of a folder or a pattern.

    Raises:
        ConfigError: for an address, and for a run folder that lies over the inputs.
        DataError: if there is nothing.
    """
    if "://" in word:
        raise ConfigError(f"input={word}: addresses are not opened. Download the file and give its path.")
    path = Path(word).expanduser()
    if word == "-":
        files, base = lines_of(stdin, Path()), None
    elif path.is_dir():
        files, base = below(path, run_dir), path
    elif path.suffix.lower() in LIST_SUFFIXES and path.is_file():
        files, base = read_list(path), None
    elif path.is_file():
        files, base = [path], path.parent
    elif glob.has_magic(word):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - ** of any path
        files, base = [file for file in found if is_picture(file) and not is_below(file, run_dir)], None
    else:
        raise DataError(f"input={word}: there is no such file or folder.")
    if not files:
        raise DataError(f"input={word}: no images or videos there (looked for {', '.join(sorted(suffixes()))}).")
    files = list(dict.fromkeys(files))
    if any(file.resolve().parent == run_dir.resolve() for file in files):
        raise ConfigError(f"run_dir={run_dir}: holds inputs, which outputs could overwrite. Give another folder.")
    return [Input(file, place) for file, place in zip(files, places(files, base), strict=True)]


def suffixes() -> frozenset[str]:
    return IMAGE_SUFFIXES | VIDEO_SUFFIXES


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in suffixes() and path.is_file()


def is_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def below(folder: Path, run_dir: Path) -> list[Path]:
    """Images and videos at any depth, hidden files and earlier outputs in `run_dir` left out."""
    found = sorted(path for path in folder.rglob("*") if is_picture(path) and not path.name.startswith("."))
    return [path for path in found if not is_below(path, run_dir) or is_below(folder, run_dir)]


def read_list(path: Path) -> list[Path]:
    """The paths in a text file.

    Raises:
        DataError: if it is no text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            return lines_of(file, path.parent)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the list cannot be read ({type(error).__name__}).") from error


def lines_of(lines: Iterable[str], folder: Path) -> list[Path]:
    """One path a line; blank lines and lines that begin with # are left out."""
    stripped = (line.strip() for line in lines)
    return [folder / Path(line).expanduser() for line in stripped if line and not line.startswith("#")]


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
