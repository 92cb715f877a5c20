"""Names, colours and raw ids of classes. No torch.

A label file holds raw ids; the network, the loss and the scores know class indices 0 .. K - 1 and -1 = not scored.
`LabelMap` is the only place where one becomes the other.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.errors import ConfigError, DataError

IGNORED = -1
_UNKNOWN = -2
_MAX_CLASSES = 2**15 - 1  # class indices are kept as int16
_MAX_ID = 2**16 - 1
_MAX_COLOURS = 512

Colour = tuple[int, int, int]  # red, green, blue, each 0..255


class ClassTable(NamedTuple):
    """What the classes are called and drawn with, in the order of their indices."""

    names: tuple[str, ...]  # K
    palette: tuple[Colour, ...]  # K; two classes may share a colour (ADE20K's road and skyscraper do)

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def colours(self) -> NDArray[np.uint8]:
        """The palette as a (K, 3) uint8 array, RGB."""
        return np.array(self.palette, dtype=np.uint8)

    @classmethod
    def from_csv(cls, path: str | Path) -> ClassTable:
        """A table with header `index,name,R,G,B` and one row for each class, in any order of rows.

        Indices must run without a gap; the first one may be 0 or 1 and says nothing about raw ids.

        Raises:
            DataError: if the file is missing, a column is missing, or a row does not fit, with the line number.
        """
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: the table of classes cannot be read ({error}).") from error
        rows = csv.DictReader(lines)
        missing = {"index", "name", "R", "G", "B"} - set(rows.fieldnames or ())
        if missing:
            raise DataError(f"{path}:1: columns {', '.join(sorted(missing))} are missing. Needed: index,name,R,G,B.")
        found = sorted(_parse_row(row, f"{path}:{rows.line_num}") for row in rows)
        indices = [index for index, _, _ in found]
        if not found or indices[0] not in (0, 1) or indices != list(range(indices[0], indices[0] + len(found))):
            raise DataError(f"{path}: indices must be 0, 1, 2, ... or 1, 2, 3, ... without gaps or repeats: {indices}.")
        return cls(tuple(name for _, name, _ in found), tuple(colour for _, _, colour in found))

    def as_plain(self) -> dict[str, list[Any]]:
        """Words, numbers and lists only, for checkpoints and JSON."""
        return {"names": list(self.names), "palette": [list(colour) for colour in self.palette]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ClassTable:
        """The inverse of `as_plain`."""
        return cls(tuple(plain["names"]), tuple((r, g, b) for r, g, b in plain["palette"]))

    @classmethod
    def generated(cls, names: Sequence[str]) -> ClassTable:
        """A table for classes that have names but no colours.

        >>> ClassTable.generated(["cat", "dog"]).num_classes
        2
        """
        return cls(tuple(names), generated_palette(len(names)))


def _parse_row(row: dict[str, str], where: str) -> tuple[int, str, Colour]:
    try:
        index, red, green, blue = (int(row[column]) for column in ("index", "R", "G", "B"))
    except (TypeError, ValueError):
        raise DataError(f"{where}: index, R, G and B must be whole numbers.") from None
    if not all(0 <= part <= 255 for part in (red, green, blue)):
        raise DataError(f"{where}: a colour is three numbers 0..255, got {red},{green},{blue}.")
    return index, (row["name"] or "").strip() or f"class {index}", (red, green, blue)


@lru_cache
def ade20k_classes() -> ClassTable:
    """The 150 classes of the ADE20K scene-parsing challenge, with the published colours.

    >>> ade20k_classes().names[:3], ade20k_classes().palette[2]
    (('wall', 'building', 'sky'), (6, 230, 230))
    """
    return ClassTable.from_csv(Path(__file__).with_name("ade20k_classes.csv"))


@lru_cache
def camvid_classes() -> ClassTable:
    """The 11 classes of CamVid as the SegNet papers group them.

    >>> camvid_classes().names[-1]
    'Bicyclist'
    """
    return ClassTable.from_csv(Path(__file__).with_name("camvid_classes.csv"))


@lru_cache
def generated_palette(num_classes: int) -> tuple[Colour, ...]:
    """Colours as far from each other, and from black and white, as eyes allow. K colours are the first K of more.

    Greedy: each next colour is the one of a 12 x 12 x 12 grid, the darkest left out, whose nearest taken colour is
    furthest away in OKLab: as everybody sees it, or at half the distance as people without red or green cones do. From
    the 513th on they repeat.

    >>> generated_palette(2)
    ((93, 0, 255), (0, 139, 0))
    """
    levels = np.linspace(0, 255, 12).round().astype(np.int64)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)  # (1728, 3)
    views = np.stack([weight * _oklab(_seen(grid, kind)) for kind, weight in (("", 1), *_COLOUR_BLIND)])
    taken = [0, len(grid) - 1]  # black and white belong to ignored pixels and to writing
    distance = np.minimum(*(_distance(views, index) for index in taken))
    distance[views[0, :, 0] < 0.4] = 0  # lightness; OKLab overrates how well dark colours are told apart
    palette: list[Colour] = []
    for _ in range(min(num_classes, _MAX_COLOURS)):
        furthest = int(distance.argmax())
        red, green, blue = grid[furthest].tolist()
        palette.append((red, green, blue))
        distance = np.minimum(distance, _distance(views, furthest))
    return tuple(palette[index % _MAX_COLOURS] for index in range(num_classes))


# What colour-blind people confuse is allowed half the distance: more would cost everybody else too many colours.
_COLOUR_BLIND = (("protanopia", 2.0), ("deuteranopia", 2.0))
_SIMULATIONS = {  # of linear RGB, Vienot, Brettel and Mollon 1999
    "protanopia": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deuteranopia": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
}


def _distance(views: NDArray[np.float64], index: int) -> NDArray[np.float64]:
    """From every colour (n) to one of them: the smallest of the distances in all views (views, n, 3)."""
    # Rounded so that two machines whose cube roots differ in the last bit still choose the same colours.
    return np.linalg.norm(views - views[:, index, None], axis=-1).min(axis=0).round(6)


def _seen(rgb: NDArray[np.int64], kind: str = "") -> NDArray[np.float64]:
    """sRGB 0..255 (..., 3) as linear light 0..1, as somebody with this kind of colour blindness sees it."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return np.clip(linear @ np.array(_SIMULATIONS[kind]).T, 0, 1) if kind else linear


def _oklab(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear light (..., 3) to OKLab, where equal distances look equally different (Ottosson 2020)."""
    to_cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_cones.T) @ to_lab.T


class LabelMap:
    """Raw ids of label files to class indices: id `first_id` is class 0, ids in `ignore` are not scored.

    The defaults are ADE20K's: 0 = unlabelled, 1 .. K = classes.

    Raises:
        ConfigError: if an id is both a class and ignored, or a number is out of range.

    >>> LabelMap(num_classes=3)(np.array([[0, 1, 3]], np.uint8), "label.png")
    array([[-1,  0,  2]], dtype=int16)
    """

    def __init__(self, num_classes: int, first_id: int = 1, ignore: Iterable[int] = (0,)) -> None:
        self.num_classes, self.first_id, self.ignore = num_classes, first_id, tuple(sorted(set(ignore)))
        last_id = first_id + num_classes - 1
        fits = 1 <= num_classes <= _MAX_CLASSES and first_id >= 0 and last_id <= _MAX_ID
        if not fits or any(not 0 <= raw_id <= _MAX_ID for raw_id in self.ignore):
            raise ConfigError(
                f"data.num_classes={num_classes} with data.first_id={first_id} and data.ignore={list(self.ignore)} "
                f"does not fit: 1 to {_MAX_CLASSES} classes, raw ids 0 to {_MAX_ID}."
            )
        both = [raw_id for raw_id in self.ignore if first_id <= raw_id <= last_id]
        if both:
            raise ConfigError(
                f"data.ignore contains {_listed(both)}, "
                f"but data.first_id={first_id} and data.num_classes={num_classes} "
                f"make raw ids {first_id}..{last_id} classes. "
                "Change data.ignore (for example [255], or []) or data.first_id."
            )
        table = np.full(_MAX_ID + 1, _UNKNOWN, np.int16)
        table[list(self.ignore)] = IGNORED
        table[first_id : last_id + 1] = np.arange(num_classes)
        self._table = table  # raw id -> class index, 128 KiB

    def __call__(self, raw: NDArray[np.integer], path: str | Path) -> NDArray[np.int16]:
        """Class indices of raw ids, any shape; -1 = not scored.

        Raises:
            DataError: if an id is neither a class nor ignored; the sentence names `path` and the worst ids.
        """
        is_small = raw.dtype in (np.uint8, np.uint16)
        clipped = raw if is_small else np.clip(raw, 0, _MAX_ID)
        index = np.take(self._table, clipped)
        has_unknown = bool((index == _UNKNOWN).any())
        if has_unknown or not (is_small or np.array_equal(clipped, raw)):
            raise self._unknown(raw, path)
        return index

    def check(self, raw: NDArray[np.integer], path: str | Path) -> None:
        """Refuse ids that are neither classes nor ignored, as calling it does, without translating the others.

        Raises:
            DataError: as for a call.
        """
        lowest, highest = int(raw.min()), int(raw.max())
        in_range = lowest >= 0 and highest <= _MAX_ID
        # Mostly all ids from the lowest to the highest are known, which is told without a look at each.
        if not in_range or (self._table[lowest : highest + 1] == _UNKNOWN).any():
            self(raw, path)

    def meaning(self, raw_id: int) -> int | None:
        """The class index of an id, -1 if it is not scored, None if it is neither."""
        index = int(self._table[raw_id]) if 0 <= raw_id <= _MAX_ID else _UNKNOWN
        return None if index == _UNKNOWN else index

    def to_raw(self, index: NDArray[np.integer]) -> NDArray[np.uint16]:
        """Class indices (none below 0) back to the raw ids of the data set, for files others will read."""
        return (index + self.first_id).astype(np.uint16)

    def _unknown(self, raw: NDArray[np.integer], path: str | Path) -> DataError:
        ids, counts = np.unique(raw, return_counts=True)
        last_id = self.first_id + self.num_classes - 1
        known = (ids >= self.first_id) & (ids <= last_id) | np.isin(ids, self.ignore)
        worst = sorted(zip(counts[~known].tolist(), ids[~known].tolist(), strict=True), reverse=True)
        shown = ", ".join(f"{raw_id} ({count} pixels)" for count, raw_id in worst[:5])
        more = f" and {len(worst) - 5} more" if len(worst) > 5 else ""
        return DataError(
            f"{path}: label ids {shown}{more} are neither classes nor ignored: data.num_classes={self.num_classes} and "
            f"data.first_id={self.first_id} allow {self.first_id}..{last_id}, data.ignore={list(self.ignore)}. "
            "Raise data.num_classes, set data.first_id to the raw id of the first class, "
            "or add the ids that shall not be scored to data.ignore."
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers[:5]) + (", ..." if len(numbers) > 5 else "")
