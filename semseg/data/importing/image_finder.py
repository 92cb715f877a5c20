"""Finds the images of an export by the names that annotations have for them. No torch."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar
from urllib.parse import unquote

from semseg.data import store
from semseg.data.folders import IMAGE_SUFFIXES, leave_out_arrays_beside_images
from semseg.data.importing.files import EntryError, find_split

Named = TypeVar("Named", Path, tuple[str, ...])


class EndIndex(Generic[Named]):
    """Paths or names, found by the parts at their end: as fast for one name in many folders as for many names."""

    def __init__(self) -> None:
        self._parts: dict[Named, Sequence[str]] = {}
        self._by_end: list[dict[tuple[str, ...], list[Named]]] = []  # by the last part, the last two, ...

    def add(self, item: Named, parts: Sequence[str]) -> None:
        """Add an item, whose path has these parts."""
        self._parts[item] = parts
        self._by_end.clear()

    def find_best(self, parts: Sequence[str]) -> list[Named]:
        """The items that agree with a path in most parts from its end; none if its last part is that of none."""
        best: list[Named] = []
        for length in range(1, len(parts) + 1):
            found = self._index(length).get(tuple(parts[-length:]))
            if found is None:
                break
            best = found
            if len(best) == 1:
                break
        return best

    def __len__(self) -> int:
        return len(self._parts)

    def _index(self, length: int) -> dict[tuple[str, ...], list[Named]]:
        """The items by their last `length` parts."""
        while len(self._by_end) < length:
            index, count = defaultdict(list), len(self._by_end) + 1
            for item, parts in self._parts.items():
                if len(parts) >= count:
                    index[tuple(parts[-count:])].append(item)
            self._by_end.append(dict(index))
        return self._by_end[length - 1]


class ImageFinder:
    """Finds the images that an export names, below a folder; names never lead out of it.

    Args:
        root: of the export.
        images: import.images, where they are instead; may be None.
    """

    def __init__(self, root: Path, images: Path | None = None) -> None:
        self.folder = images or root
        self.unused = store.UnusedFiles()
        files = store.list_files_below(self.folder, self.unused)
        self._paths = {path: None for path in files if path.suffix.lower() in IMAGE_SUFFIXES}
        self._stems: EndIndex[Path] | None = None  # the images without suffix, once `find_stem` was called
        self._stems_by_case: dict[str, Path] = {}
        self._images: EndIndex[Path] = EndIndex()
        self._by_case: dict[str, Path] = {}
        for path in self._paths:
            self._images.add(path, _compose_parts(path))
            self._by_case.setdefault(_compose(path.name).casefold(), path)
        self._expected: EndIndex[tuple[str, ...]] = EndIndex()  # names of the export

    def expect(self, names: Iterable[str]) -> None:
        """Note all names of an export, so that `find` does not take the image of one for that of another."""
        for name in names:
            if parts := self._choose_spelling(name):
                self._expected.add(parts, parts)

    def find(self, name: str, split: str = "") -> Path:
        """The image file that an export calls `name`, which may be a path of another machine.

        Of several files of that name, the one whose folders agree best is taken, then the one in a folder of the split,
        then the one above all others. Folders that no file agrees with are ignored, unless another name of the export
        (`expect`) agrees better with the only file of that name. A name may be percent-encoded, as in addresses.

        Raises:
            EntryError: if there is none, or several agree equally well, or it is in a folder of another split.
        """
        parts = self._choose_spelling(name)
        if not parts:
            raise EntryError(f"{name!r} names no image file")
        found = self._images.find_best(parts)
        if not found:
            self._refuse_missing(name, parts[-1])
        if len(found) > 1 and split:
            found = _keep_best(found, lambda path: int(split in map(find_split, self._folders(path))))
        found = _keep_uppermost(found)
        if len(found) > 1:
            listed = " and ".join(str(path) for path in found[:2])
            raise EntryError(f"{name!r} may be {listed}. Set import.images to the folder with the right one")
        self._refuse_other(name, parts, found[0])
        self._refuse_other_split(name, parts, found[0], split)
        return found[0]

    def _choose_spelling(self, name: str) -> tuple[str, ...]:
        """The parts of a name as it is, or percent-decoded if an image agrees with more parts then."""
        plain, decoded = _split_name(name), _split_name(unquote(name))
        if plain == decoded or not decoded:
            return plain
        return max(plain, decoded, key=self._count_agreeing)

    def _count_agreeing(self, parts: tuple[str, ...]) -> int:
        """The largest number of parts at the end that an image has."""
        best = self._images.find_best(parts)
        return _count_common_end(_compose_parts(best[0]), parts) if best else 0

    def find_stem(self, stem: str, without: Sequence[str]) -> list[Path]:
        """The image files with this path without suffix, or, of all with its last part, those that agree best.

        Args:
            without: patterns of the names of folders of masks, whose files are not images.

        Raises:
            EntryError: if there is only one in another case, or that of another name of the export (`expect`).
        """
        stems = self._index_stems(without)
        parts = [_compose(part) for part in PurePosixPath(stem).parts]
        found = stems.find_best(parts)
        similar = self._stems_by_case.get(parts[-1].casefold())
        if not found and similar is not None:
            raise EntryError(f"its image is called {similar.name}: upper and lower case differ. Rename one")
        found = _keep_uppermost(found)
        if len(found) == 1:
            self._refuse_other(stem, parts, found[0], found[0].with_suffix(""))
        return found

    def count_stems(self, without: Sequence[str]) -> int:
        """The number of image files that `find_stem` chooses from."""
        return len(self._index_stems(without))

    def _index_stems(self, without: Sequence[str]) -> EndIndex[Path]:
        """The images without their suffixes; not those in folders of masks."""
        if self._stems is None:
            self._stems = EndIndex()
            for path in leave_out_arrays_beside_images(list(self._paths), self.unused):
                folders = path.relative_to(self.folder).parts[:-1]
                if not any(fnmatchcase(folder, pattern) for folder in folders for pattern in without):
                    self._stems.add(path, _compose_parts(path.with_suffix("")))
                    self._stems_by_case.setdefault(_compose(path.stem).casefold(), path)
        return self._stems

    def has(self, path: Path) -> bool:
        """Whether a path is one of the images."""
        return path in self._paths

    @property
    def paths(self) -> Iterable[Path]:
        """The images below the folder."""
        return self._paths

    @property
    def count(self) -> int:
        """The number of images below the folder."""
        return len(self._paths)

    def relative(self, path: Path) -> str:
        """The path of an image below the folder, with /."""
        return path.relative_to(self.folder).as_posix()

    def _refuse_other(self, name: str, parts: Sequence[str], found: Path, path: Path | None = None) -> None:
        """Refuse a file if another name of the export agrees better with it than this name, which has these parts.

        Args:
            path: to compare with; the default is that of the file.

        Raises:
            EntryError: with that name.
        """
        own = _compose_parts(path or found)
        other = next(iter(self._expected.find_best(own)), ())
        if _count_common_end(own, other) > _count_common_end(own, parts):
            raise EntryError(
                f"there is no image {name} below {self.folder}, and {found} is what the export calls {'/'.join(other)}"
            )

    def _refuse_other_split(self, name: str, parts: Sequence[str], found: Path, split: str) -> None:
        """Refuse a file in a folder of another split, which the name does not name, if there are folders of this one.

        Raises:
            EntryError: with both splits.
        """
        folders = self._folders(found)
        other = find_split(*folders)
        is_wrong = split and other and split in self._splits and split not in map(find_split, folders)
        if is_wrong and find_split(*parts[:-1]) != other:
            raise EntryError(f"there is no image {name} of {split} below {self.folder}, and {found} is one of {other}")

    def _folders(self, path: Path) -> tuple[str, ...]:
        """The folders of an image below that of all."""
        return path.relative_to(self.folder).parts[:-1]

    @cached_property
    def _splits(self) -> set[str]:
        """The splits that folders of images name."""
        return {find_split(*folders) for folders in set(map(self._folders, self._paths))}

    def _refuse_missing(self, name: str, last: str) -> None:
        similar = self._by_case.get(last.casefold())
        if similar is not None:
            raise EntryError(f"there is no image {last}, but {similar.name}: upper and lower case differ. Rename one")
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


def _keep_best(paths: list[Path], rate: Callable[[Path], int]) -> list[Path]:
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
