"""Files of an export: JSON with named errors, and images by the names that annotations have for them. No torch."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from semseg.data import store
from semseg.data.folders import IMAGE_SUFFIXES
from semseg.data.list_files import match_split
from semseg.errors import DataError, describe_reason
from semseg.system.text import shorten_repr

Kind = TypeVar("Kind")
KIND_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}


class EntryError(ValueError):
    """Why an entry of an export cannot be read, without the name of its file."""


class RepeatedKeyError(ValueError):
    """An object of a JSON file has a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, for `json.loads`, which would take the last of several values without a word.

    Raises:
        RepeatedKeyError: if a key occurs twice.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        seen = set[str]()
        raise RepeatedKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return content


def read_json_file(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: if it cannot be read, is no JSON, or has a key twice in one object.
    """
    try:
        return json.loads(store.read_text(path), object_pairs_hook=refuse_repeated_keys)
    except RepeatedKeyError as error:
        raise DataError(
            f"{path}: an object has the key {shorten_repr(error.key)} twice, and which value is right is not known. "
            "Export it again."
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}). Export it again.") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg}, line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}: not JSON, or truncated ({where}). Export it again.") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        reason = "too many nested brackets" if isinstance(error, RecursionError) else describe_reason(error)
        raise DataError(
            f"{path}: cannot be read as JSON ({reason or type(error).__name__}). Export it again."
        ) from None


def list_json_files(files: Iterable[Path], opening: bytes, has_keys: Callable[[bytes], bool]) -> list[Path]:
    """The JSON files that begin with `opening` and whose content passes a test; a file that cannot be read is none."""
    return [path for path in files if path.suffix.lower() == ".json" and _looks_like(path, opening, has_keys)]


def _looks_like(path: Path, opening: bytes, has_keys: Callable[[bytes], bool]) -> bool:
    try:
        content = store.read_file(path)
    except (OSError, DataError):
        return False
    return content.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(opening) and has_keys(content)


def read_text_lines(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return store.read_text(path).splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}). Export it again.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({describe_reason(error)}). Export it again.") from None


def get(entry: Any, key: str, kind: type[Kind]) -> Kind:
    """The value of a key, which must be there.

    Raises:
        EntryError: if it is missing, or of another kind.
    """
    if not isinstance(entry, dict) or key not in entry:
        found = f"found {shorten_repr(list(entry))}" if isinstance(entry, dict) else f"this is {shorten_repr(entry)}"
        raise EntryError(f"has no {key!r} ({found})")
    return check_kind(entry[key], key, kind)


def get_or(entry: Any, key: str, kind: type[Kind], default: Kind) -> Kind:
    """The value of a key; `default` if it is missing or null.

    Raises:
        EntryError: if it is of another kind.
    """
    value = entry.get(key) if isinstance(entry, dict) else None
    return default if value is None else check_kind(value, key, kind)


def check_kind(value: Any, key: str, kind: type[Kind]) -> Kind:
    """Return a value if it is of a kind: a finite number for float, which may be an int.

    Raises:
        EntryError: otherwise.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number and (isinstance(value, int) or math.isfinite(value)) and abs(value) < 1e300:
        return kind(value)  # pyright: ignore[reportCallIssue]
    if kind is int and is_number and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return kind(value)  # pyright: ignore[reportCallIssue] - tools that write 640.0
    if not isinstance(value, kind) or (kind in (int, float) and not is_number) or kind is float:
        raise EntryError(f"{key} must be {KIND_NAMES[kind]}, got {shorten_repr(value)}")
    if isinstance(value, str) and not store.is_utf8(value):
        raise EntryError(f"{key} is not UTF-8 text")
    return value  # pyright: ignore[reportReturnType]


def describe_entry(entry: Any, key: str, position: int) -> str:
    """How a message calls an entry of a list: by its id, or its position from 1."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return str(value)[:40] if isinstance(value, int | str) else f"number {position + 1}"


def find_split(*names: str) -> str:
    """The split that the words of some names stand for, the last ones first; "" if there is none.

    >>> find_split("annotations", "instances_train2017"), find_split("valid/_annotations.coco"), find_split("trainer")
    ('train', 'val', '')
    """
    for name in reversed(names):
        for word in reversed(re.split(r"[\W_\d]+", name)):
            if split := match_split(word):
                return split
    return ""


def find_other_case(path: Path) -> str:
    """The name of a file beside `path`, which does not exist, that differs in upper and lower case only; "" if none."""
    return _list_by_case(path.parent).get(path.name.casefold(), "")


@lru_cache(maxsize=64)
def _list_by_case(folder: Path) -> dict[str, str]:
    names = store.list_folder(folder, store.UnusedFiles()) if store.is_folder(folder) else []
    return {name.casefold(): name for name in names}


class ImageFinder:
    """Finds the images that an export names, below a folder; names never lead out of it.

    Args:
        root: of the export.
        images: import.images, where they are instead; may be None.
    """

    def __init__(self, root: Path, images: Path | None = None) -> None:
        self.folder = images or root
        self.unused = store.UnusedFiles()
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_case: dict[str, list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        self._expected: dict[str, set[tuple[str, ...]]] = defaultdict(set)  # names of the export by their last part
        for path in store.list_files_below(self.folder, self.unused):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                name = _compose(path.name)
                self._by_name[name].append(path)
                self._by_case[name.casefold()].append(path)

    def expect(self, names: Iterable[str]) -> None:
        """Note all names of an export, so that `find` does not take the image of one for that of another."""
        for name in names:
            if parts := _split_name(name):
                self._expected[parts[-1]].add(parts)

    def find(self, name: str, split: str = "") -> Path:
        """The image file that an export calls `name`, which may be a path of another machine.

        Of several files of that name, the one whose folders agree best is taken, then the one in a folder of the split,
        then the one above all others. Folders that no file agrees with are ignored, unless another name of the export
        (`expect`) agrees better with the only file of that name.

        Raises:
            EntryError: if there is none, or several agree equally well.
        """
        parts = _split_name(name)
        if not parts:
            raise EntryError(f"{name!r} names no image file")
        found = self._by_name.get(parts[-1], [])
        if not found:
            self._refuse_missing(name, parts[-1])
        if len(found) > 1:
            found = _keep_best(found, lambda path: _count_common_end(_compose_parts(path), parts))
        if len(found) > 1 and split:
            found = _keep_best(found, lambda path: int(find_split(*path.relative_to(self.folder).parts[:-1]) == split))
        found = _keep_uppermost(found)
        if len(found) > 1:
            listed = " and ".join(str(path) for path in found[:2])
            raise EntryError(f"{name!r} may be {listed}. Set import.images to the folder with the right one")
        self._refuse_other(name, found[0], _compose_parts(found[0]))
        return found[0]

    def find_stem(self, stem: str, without: Sequence[str]) -> list[Path]:
        """The image files with this path without suffix, or, of all with its last part, those that agree best.

        Args:
            without: patterns of the names of folders of masks, whose files are not images.

        Raises:
            EntryError: if there is only one in another case, or that of another name of the export (`expect`).
        """
        self._index_stems(without)
        parts = [_compose(part) for part in PurePosixPath(stem).parts]
        found = self._by_stem.get(parts[-1], [])
        if not found:
            similar = next(
                (
                    path
                    for key, paths in self._by_stem.items()
                    if key.casefold() == parts[-1].casefold()
                    for path in paths
                ),
                None,
            )
            if similar is not None:
                raise EntryError(f"its image is called {similar.name}: upper and lower case differ. Rename one")
        if len(found) > 1:
            names = {path: [_compose(part) for part in path.with_suffix("").parts] for path in found}
            found = _keep_best(found, lambda path: _count_common_end(names[path], parts))
        found = _keep_uppermost(found)
        if len(found) == 1:
            self._refuse_other(stem, found[0], _compose_parts(found[0].with_suffix("")))
        return found

    def count_stems(self, without: Sequence[str]) -> int:
        """The number of image files that `find_stem` chooses from."""
        self._index_stems(without)
        return sum(map(len, self._by_stem.values()))

    def _index_stems(self, without: Sequence[str]) -> None:
        if not self._by_stem:
            for path in (path for paths in self._by_name.values() for path in paths):
                folders = path.relative_to(self.folder).parts[:-1]
                if not any(fnmatchcase(folder, pattern) for folder in folders for pattern in without):
                    self._by_stem[_compose(path.stem)].append(path)

    def has(self, path: Path) -> bool:
        """Whether a path is one of the images."""
        return path in self._by_name.get(_compose(path.name), ())

    @property
    def count(self) -> int:
        """The number of images below the folder."""
        return sum(map(len, self._by_name.values()))

    def relative(self, path: Path) -> str:
        """The path of an image below the folder, with /."""
        return path.relative_to(self.folder).as_posix()

    def _refuse_other(self, name: str, found: Path, own: Sequence[str]) -> None:
        """Refuse a file, whose path has the parts `own`, if another name of the export agrees better with it.

        Raises:
            EntryError: with that name.
        """
        parts = _split_name(name)
        expected = {parts, *self._expected.get(parts[-1], ())}
        common, other = max((_count_common_end(own, each), each) for each in expected)
        if common > _count_common_end(own, parts):
            raise EntryError(
                f"there is no image {name} below {self.folder}, and {found} is what the export calls {'/'.join(other)}"
            )

    def _refuse_missing(self, name: str, last: str) -> None:
        similar = self._by_case.get(last.casefold())
        if similar:
            raise EntryError(
                f"there is no image {last}, but {similar[0].name}: upper and lower case differ. Rename one"
            )
        way_out = "Set import.images to the folder of the images"
        raise EntryError(f"there is no image {name} below {self.folder}. {way_out}")


def _compose(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _compose_parts(path: Path) -> list[str]:
    return [_compose(part) for part in path.parts]


def _split_name(name: str) -> tuple[str, ...]:
    """The parts of a name, which may be a path of another system; none if it names nothing."""
    parts = (_compose(part) for part in PurePosixPath(name.replace("\\", "/")).parts)
    return tuple(part for part in parts if part not in ("", ".", "..", "/"))


def _keep_uppermost(paths: list[Path]) -> list[Path]:
    """The path in whose folder all others are further below; all paths if there is none."""
    for path in paths:
        others = [other for other in paths if other != path]
        if all(other.parent != path.parent and other.is_relative_to(path.parent) for other in others):
            return [path]
    return paths


def _keep_best(paths: list[Path], rate: Any) -> list[Path]:
    best = max(map(rate, paths))
    return [path for path in paths if rate(path) == best]


def _count_common_end(first: Iterable[str], second: Iterable[str]) -> int:
    """The number of equal parts at the end of two paths."""
    count = 0
    for one, other in zip(reversed(list(first)), reversed(list(second)), strict=False):
        if one != other:
            break
        count += 1
    return count
