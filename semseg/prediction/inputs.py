"""Resolve `input=` of mode=predict to image and video files, each with the path of its outputs.

No torch. Folders and lists are read; images and videos are not opened.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, TextIO

from semseg.config.overrides import RECORD_FOLDER
from semseg.data import store
from semseg.data.folders import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES, leave_out_arrays_beside_images
from semseg.data.store import UnusedFiles
from semseg.errors import ConfigError, DataError
from semseg.prediction.geotiff import WORLD_FILE_ENDS, find_world_file
from semseg.storage.run_folders import is_of_run

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
LIST_SUFFIXES = frozenset({".lst", ".txt"})
IN_RUN_FOLDER, OF_OTHER_RUN = "in the run folder", "in the folder of another run"  # why a file is not used
AS_PATH_LIST = "This file was read as a list of paths, one on each line."


class Input(NamedTuple):
    """A file to predict."""

    path: Path
    output_path: Path  # where its outputs go: relative to the run folder, without suffix

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(
    source: str, run_dir: Path, stdin: TextIO = sys.stdin, unused: UnusedFiles | None = None
) -> list[Input]:
    """Find the files that `input` names: each once, sorted unless they come from a list.

    Args:
        source: an image or a video, a folder or zip archive (searched at every depth), a pattern such as
            photos/**/*.jpg, a text file with one path a line (relative paths start at the folder of the list), or - for
            such lines on standard input (relative paths start at the current folder). A file or folder of exactly this
            name, or of its first parts, takes precedence over the pattern.
        run_dir: folder of the outputs; files in it are not inputs of a folder or a pattern.
        unused: collects the files and folders that are not inputs.

    Raises:
        ConfigError: for a URL, and for a run folder that holds inputs.
        DataError: if there are no inputs.
    """
    if "://" in source:
        raise ConfigError(f"input={source}: URLs are not supported. Download the file and give its path.")
    path, unused = store.resolve_path(source), UnusedFiles() if unused is None else unused
    if source == "-":
        files, base = parse_path_lines(stdin, "input=-", Path(), unused), None
    elif store.is_folder(path):
        files, base = select_inputs(store.list_files_below(path, unused), path, run_dir, unused), path
    elif is_path_list(source):
        files, base = read_path_list(path, unused), None
    elif store.is_file(path):
        files, base = [path], path.parent
    elif glob.has_magic(source):
        files, base = select_inputs(expand_pattern(path), None, run_dir, unused), None
    else:
        raise DataError(f"input={source}: there is no such file or folder.")
    if not files:
        ignored = f" Not used: {unused.describe(path)}." if unused.count else ""
        known = ", ".join(sorted(input_suffixes()))
        kind = f" {AS_PATH_LIST}" if is_path_list(source) else ""
        raise DataError(f"input={source}: there are no images or videos (suffixes: {known}).{kind}{ignored}")
    files = list({os.path.abspath(file): file for file in reversed(files)}.values())[::-1]  # noqa: PTH100 - of lists
    inputs = [Input(file, target) for file, target in zip(files, choose_output_paths(files, base), strict=True)]
    if holds_inputs(run_dir, inputs, unused):
        raise ConfigError(f"run_dir={run_dir}: holds inputs, which outputs could overwrite. Set another folder.")
    return inputs


def holds_inputs(run_dir: Path, inputs: Sequence[Input], unused: UnusedFiles) -> bool:
    """Whether outputs would be written beside inputs, or into a folder of images that no run has written."""
    folders = {run_dir, *((run_dir / item.output_path).parent for item in inputs)}
    folders |= {run_dir / item.output_path for item in inputs if item.is_video}
    if not {folder.resolve() for folder in folders}.isdisjoint({item.path.parent.resolve() for item in inputs}):
        return True
    return IN_RUN_FOLDER in unused.reasons and not is_of_run(run_dir)


def is_path_list(source: str) -> bool:
    """Whether `input` names a text file with one path a line."""
    path = store.resolve_path(source)
    return path.suffix.lower() in LIST_SUFFIXES and path.is_file()


def input_suffixes() -> frozenset[str]:
    """The suffixes of inputs, with UNREADABLE_SUFFIXES: predicting such a file fails and reports the reason."""
    return IMAGE_SUFFIXES | UNREADABLE_SUFFIXES | VIDEO_SUFFIXES


def resolves_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def select_inputs(paths: Iterable[Path], folder: Path | None, run_dir: Path, unused: UnusedFiles) -> list[Path]:
    """Select images and videos; other files, and those of runs below `folder`, are added to `unused`.

    World files of the images are neither: predictions have their transforms.
    The files of `run_dir` are not selected for patterns (`folder` is None) either, unless `folder` is in it.
    """
    selected, others = [], []
    is_run = cache(lambda parent: (parent / RECORD_FOLDER).is_dir())
    for path in paths:
        if path.suffix.lower() not in input_suffixes():
            others.append(path)
        elif resolves_below(path, run_dir) and not (folder and resolves_below(folder, run_dir)):
            unused.add(IN_RUN_FOLDER, path)
        elif folder and any(is_run(parent) for parent in path.parents if folder in parent.parents):
            unused.add(OF_OTHER_RUN, path)
        else:
            selected.append(path)
    has_world_files = any(path.suffix.lower().endswith(WORLD_FILE_ENDS) for path in others)
    world_files = {find_world_file(path) for path in selected} if has_world_files else set()
    for path in others:
        if path not in world_files:
            unused.add(path.suffix.lower() or "without suffix", path)
    return leave_out_arrays_beside_images(selected, unused)


def expand_pattern(pattern: Path) -> list[Path]:
    """Return the files that match a pattern, sorted; parts that exist under exactly this name are not patterns.

    `**` matches any number of folders. Hidden files are matched only by patterns that begin with a dot. Links to
    folders are followed, each folder only once.
    """
    parts = pattern.relative_to(pattern.anchor).parts
    return sorted({path for path in match_parts(Path(pattern.anchor), parts) if path.is_file()})


def match_parts(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield paths below `folder` whose names match `parts`; a path may occur more than once."""
    if not parts:
        yield folder
        return
    first, *rest = parts
    literal = Path(store.match_unicode_form(str(folder / first)))
    if os.path.lexists(literal):
        yield from match_parts(literal, rest)
    elif first == "**":
        files = store.list_files_below(folder)
        folders = {folder} | {parent for file in files for parent in file.parents if parent.is_relative_to(folder)}
        for subfolder in folders:
            yield from match_parts(subfolder, rest or ["*"])
    elif glob.has_magic(first) and folder.is_dir():
        pattern = unicodedata.normalize("NFC", first)
        for path in folder.iterdir():
            is_match = fnmatch.fnmatchcase(unicodedata.normalize("NFC", path.name), pattern)
            if is_match and (first.startswith(".") or not store.is_hidden(path.name)) and store.is_utf8(path.name):
                yield from match_parts(path, rest)


def read_path_list(path: Path, unused: UnusedFiles) -> list[Path]:
    """Read the paths in a text file.

    Raises:
        DataError: if the file is not text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            return parse_path_lines(file, str(path), path.parent, unused)
    except OSError as error:
        raise DataError(f"{path}: the list cannot be read ({error.strerror}).") from error


def parse_path_lines(lines: Iterable[str], source: str, folder: Path, unused: UnusedFiles) -> list[Path]:
    """Parse one path a line, with slashes or Windows' backslashes; blank lines and lines that begin with # are skipped.

    Args:
        source: name of the list in an error.
        folder: where relative paths start.

    Raises:
        DataError: if the lines are not text.
    """
    paths = []
    try:
        for line in lines:
            name = line.removeprefix("\ufeff").strip()
            if not store.is_utf8(name):
                unused.add("with a name that is not UTF-8", name)
            elif name and not name.startswith("#"):
                path = store.resolve_path(folder / store.resolve_path(name))
                is_windows = "\\" in name and not os.path.lexists(path)
                paths.append(store.resolve_path(folder / name.replace("\\", "/")) if is_windows else path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: the list cannot be read: it is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from error
    return paths


def choose_output_paths(files: list[Path], base: Path | None) -> list[Path]:
    """Choose an output path for each file: its path below the common folder, or below `base`; all are different.

    Files that differ only in their suffix, or in upper and lower case, keep it: a.jpg and A.png become a_jpg and A_png.
    So does a video beside a folder of its name, because its frames get a folder.

    >>> files = [Path("x/a.jpg"), Path("x/a.png"), Path("x/y/a.jpg")]
    >>> [path.as_posix() for path in choose_output_paths(files, Path("x"))]
    ['a_jpg', 'a_png', 'y/a']
    """
    absolute = [Path(os.path.abspath(file)) for file in files]  # noqa: PTH100 - without following links
    start = Path(os.path.abspath(base)) if base else Path(os.path.commonpath([file.parent for file in absolute]))  # noqa: PTH100
    relative = [file.relative_to(start) for file in absolute]
    fold = cache(lambda path: str(path).casefold())  # as some file systems compare names
    stems = Counter(fold(path.with_suffix("")) for path in relative)
    folders = {fold(folder) for path in relative for folder in path.parents}
    taken: set[str] = set()
    chosen = []
    for path in relative:
        is_video = path.suffix.lower() in VIDEO_SUFFIXES
        stem = fold(path.with_suffix(""))
        is_unique = stems[stem] == 1 and not (is_video and stem in folders)
        free = preferred = path.with_suffix("") if is_unique else path.with_name(path.name.replace(".", "_"))
        number = 2
        while fold(free) in taken or (is_video and fold(free) in folders):
            free, number = preferred.with_name(f"{preferred.name}_{number}"), number + 1
        taken.add(fold(free))
        chosen.append(free)
    return chosen
