"""Names, colours and raw ids of classes. No torch.

A label file holds raw ids; the network, the loss and the scores know class indices 0 .. K - 1 and -1 = not scored.
`LabelMap` is the only place where one becomes the other.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from semseg.data.store import read_text
from semseg.errors import ConfigError, DataError
from semseg.system.text import printable, shortened

IGNORED = -1
_UNKNOWN = -2
_MAX_CLASSES = 2**15 - 1  # class indices are kept as int16
_MAX_ID = 2**16 - 1
UNSCORED = _MAX_ID  # the raw id that colours get which are not scored
_MAX_COLOURS = 512
_SHOWN = 6  # classes at each end of a list

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
            lines = read_text(path).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: the table of classes cannot be read ({error}).") from error
        rows = csv.DictReader(lines)
        try:
            missing = {"index", "name", "R", "G", "B"} - set(rows.fieldnames or ())
            if missing:
                raise DataError(
                    f"{path}:1: columns {', '.join(sorted(missing))} are missing. Needed: index,name,R,G,B."
                )
            found = sorted(_parse_row(row, f"{path}:{rows.line_num}") for row in rows)
        except csv.Error as error:  # a field that is too long
            raise DataError(f"{path}:{rows.line_num}: is no line of a table ({error}).") from None
        indices = [index for index, _, _ in found]
        if not found or indices[0] not in (0, 1) or indices != list(range(indices[0], indices[0] + len(found))):
            raise DataError(
                f"{path}: indices must be 0, 1, 2, ... or 1, 2, 3, ... without gaps or repeats: {shortened(indices)}."
            )
        return cls(tuple(name for _, name, _ in found), tuple(colour for _, _, colour in found))

    def as_plain(self) -> dict[str, list[Any]]:
        """Words, numbers and lists only, for checkpoints and JSON."""
        return {"names": list(self.names), "palette": [list(colour) for colour in self.palette]}

    @classmethod
    def from_plain(cls, plain: Any) -> ClassTable:
        """The inverse of `as_plain`, from a file of whatever origin.

        Raises:
            ValueError: for anything but as many names as colours.
        """
        names, palette = (plain.get(key) if isinstance(plain, Mapping) else None for key in ("names", "palette"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("the names of the classes are not a list of texts")
        if not isinstance(palette, list) or len(palette) != len(names) or not 0 < len(names) <= _MAX_CLASSES:
            raise ValueError(f"there must be a colour for each of the {len(names)} classes")
        return cls(tuple(map(printable, names)), tuple(map(_colour, palette)))

    @classmethod
    def generated(cls, names: Sequence[str]) -> ClassTable:
        """A table for classes that have names but no colours.

        >>> ClassTable.generated(["cat", "dog"]).num_classes
        2
        """
        return cls(tuple(map(printable, names)), generated_palette(len(names)))

    @classmethod
    def from_file(cls, path: str | Path) -> ClassTable:
        """A table from a CSV file (`from_csv`), a JSON file, or a text file with a name on each line.

        Lines of a text file that begin with # are comments; a name that does is put between double quotes.
        JSON: a list of {"name": ..., "color": [R, G, B]}, or that under the key `classes`, as mode=predict writes it;
        colours may be left out everywhere.

        Raises:
            DataError: if the file is missing or does not fit.
        """
        path = Path(path)
        if path.suffix.lower() not in (".json", ".txt"):
            return cls.from_csv(path)
        try:
            text = read_text(path)
            if path.suffix.lower() == ".txt":
                lines = (line.strip() for line in text.splitlines())
                names = [_unquoted(line) for line in lines if line and not line.startswith("#")]
                return cls.generated(_required(names))
            content = json.loads(text)
            rows = _required(content["classes"] if isinstance(content, dict) else content)
            names = [str(row["name"]) for row in rows]
            if not any("color" in row for row in rows):
                return cls.generated(names)
            return cls(tuple(map(printable, names)), tuple(_colour(row["color"]) for row in rows))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}: the table of classes cannot be read ({type(error).__name__}: {error})."
            ) from error


def _unquoted(name: str) -> str:
    return name[1:-1] if len(name) > 2 and name[0] == name[-1] == '"' else name


def _required(rows: list[Any]) -> list[Any]:
    if not isinstance(rows, list) or not rows:
        raise ValueError("no classes in it")
    return rows


def _colour(numbers: Any) -> Colour:
    is_colour = isinstance(numbers, list | tuple) and len(numbers) == 3
    if not is_colour or not all(type(part) is int and 0 <= part <= 255 for part in numbers):
        raise ValueError(f"a colour is three whole numbers 0..255, got {shortened(numbers)}")
    red, green, blue = numbers
    return red, green, blue


def _parse_row(row: dict[str, str], where: str) -> tuple[int, str, Colour]:
    try:
        index, red, green, blue = (int(row[column]) for column in ("index", "R", "G", "B"))
    except (TypeError, ValueError):
        raise DataError(f"{where}: index, R, G and B must be whole numbers.") from None
    if not all(0 <= part <= 255 for part in (red, green, blue)):
        raise DataError(f"{where}: a colour is three numbers 0..255, got {red},{green},{blue}.")
    return index, printable((row["name"] or "").strip()) or f"class {index}", (red, green, blue)


@lru_cache
def built_in_classes(name: str) -> ClassTable:
    """The classes of a data set that the package knows: ade20k, camvid, cityscapes, voc2012 or cocostuff.

    Names and colours are the published ones; those of COCO-Stuff have no colours of their own. ADE20K's are the 150 of
    the scene-parsing challenge, CamVid's the 11 of the SegNet papers.

    >>> built_in_classes("ade20k").names[:3], built_in_classes("camvid").num_classes
    (('wall', 'building', 'sky'), 11)
    """
    return ClassTable.from_csv(Path(__file__).with_name(f"{name}_classes.csv"))


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


class ColourIds:
    """Masks that are coded in colours: each colour to the raw id of its class.

    Args:
        palette: K colours, no two the same.
        ids: K raw ids.
        unscored: colours that are not scored; a class of the same colour comes first.
        always: grey pictures are coded in colours too, instead of holding ids three times.

    Raises:
        ConfigError: if two classes have the same colour.
    """

    def __init__(
        self, palette: Sequence[Colour], ids: Sequence[int], unscored: Sequence[Colour], *, always: bool
    ) -> None:
        meaning = {_packed(colour): UNSCORED for colour in unscored}
        classes = {_packed(colour): raw_id for colour, raw_id in zip(palette, ids, strict=True)}
        if len(classes) < len(palette):
            twice = next(colour for colour in palette if palette.count(colour) > 1)
            raise ConfigError(
                f"data.classes: two classes have the colour {twice}, so masks in colours (data.mask_type) cannot tell "
                "them apart."
            )
        meaning |= classes
        self.always = always
        self._colours = np.array(sorted(meaning), np.uint32)
        self._ids = np.array([meaning[int(colour)] for colour in self._colours], np.uint16)
        self.fingerprint = crc32(self._colours.tobytes() + self._ids.tobytes() + bytes([always]))

    def __call__(self, pixels: NDArray[np.uint8], path: str | Path) -> NDArray[np.uint16]:
        """(H, W, 3) RGB to raw ids (H, W).

        Raises:
            DataError: for a colour that has no meaning, with its first pixel.
        """
        packed = pixels.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
        place = np.searchsorted(self._colours, packed).clip(max=len(self._colours) - 1)
        unknown = self._colours[place] != packed
        if unknown.any():
            row, column = np.argwhere(unknown)[0].tolist()
            raise DataError(
                f"{path}: the colour {tuple(pixels[row, column].tolist())} at row {row}, column {column} is no class "
                f"of data.classes ({int(unknown.sum())} such pixels). Add it there, or to data.ignore_colors."
            )
        return self._ids[place]


def _packed(colour: Colour) -> int:
    red, green, blue = colour
    return red << 16 | green << 8 | blue


class LabelMap:
    """Raw ids of label files to class indices: id `first_id` is class 0, ids in `ignore` are not scored.

    The defaults are ADE20K's: 0 = unlabelled, 1 .. K = classes.

    Args:
        ids: raw id -> class index, or None for ids that are not scored; in the place of `first_id`.
        colours: how masks in colours are read; None: they are not.

    Raises:
        ConfigError: if an id is both a class and ignored, a number is out of range, or a class has no id.

    >>> LabelMap(num_classes=3)(np.array([[0, 1, 3]], np.uint8), "label.png")
    array([[-1,  0,  2]], dtype=int16)
    """

    def __init__(
        self,
        num_classes: int,
        first_id: int = 1,
        ignore: Iterable[int] = (0,),
        ids: Mapping[int, int | None] | None = None,
        colours: ColourIds | None = None,
    ) -> None:
        self.num_classes, self.first_id, self.ignore = num_classes, first_id, tuple(sorted(set(ignore)))
        self.colours, self._is_mapped = colours, ids is not None
        table = self._ordered() if ids is None else self._mapped(ids)
        if colours is not None:
            table[UNSCORED] = IGNORED
        self._table = table  # raw id -> class index, 128 KiB
        raw_ids = np.flatnonzero(table >= 0)[::-1]
        self._raw = np.zeros(num_classes, np.uint16)
        self._raw[table[raw_ids]] = raw_ids  # the lowest of each class is written last
        self.fingerprint = crc32(table.tobytes(), 0 if colours is None else colours.fingerprint)

    def _ordered(self) -> NDArray[np.int16]:
        """The table of consecutive ids."""
        num_classes, first_id = self.num_classes, self.first_id
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
        return table

    def _mapped(self, ids: Mapping[int, int | None]) -> NDArray[np.int16]:
        """The table of `ids`."""
        table = np.full(_MAX_ID + 1, _UNKNOWN, np.int16)
        unscored = [raw_id for raw_id, index in ids.items() if index is None]
        table[[*self.ignore, *unscored]] = IGNORED
        for raw_id, index in ids.items():
            if not 0 <= raw_id < UNSCORED or not 0 <= (index or 0) < self.num_classes:
                raise ConfigError(
                    f"data.map: {raw_id}: {index} does not fit: raw ids are 0 to {UNSCORED - 1}, class indices 0 to "
                    f"{self.num_classes - 1}, null for ids that are not scored."
                )
            if index is not None:
                table[raw_id] = index
        without = sorted(set(range(self.num_classes)) - set(table.tolist()))
        if without:
            raise ConfigError(f"data.map: classes {_listed(without)} of {self.num_classes} have no raw id.")
        return table

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

    def words(self, names: Sequence[str]) -> str:
        """What the ids mean, in one line; many classes are cut in the middle.

        >>> LabelMap(2, first_id=1, ignore=[0, 255]).words(["cat", "dog"])
        '1 cat, 2 dog; not scored: 0, 255'
        """
        known = np.flatnonzero(self._table >= 0).tolist()
        words = [f"{raw_id} {names[self._table[raw_id]]}" for raw_id in known]
        if len(words) > 2 * _SHOWN:
            words = [*words[:_SHOWN], "...", *words[-_SHOWN:]]
        return f"{', '.join(words)}; not scored: {', '.join(map(str, self.ignored_ids)) or 'none'}"

    def to_raw(self, index: NDArray[np.integer]) -> NDArray[np.uint16]:
        """Class indices (none below 0) to the ids of the label files, for whatever others read.

        Where several ids mean one class, it is the smallest of them.
        """
        return self._raw[index]

    @property
    def class_ids(self) -> list[int]:
        """The id of each class as `to_raw` gives it, by class index.

        >>> LabelMap(2, ignore=[], ids={26: 0, 7: 1, 11: 1, 255: None}).class_ids
        [26, 7]
        """
        return self._raw.tolist()

    @property
    def ignored_ids(self) -> list[int]:
        """The ids that are not scored, in order: those of `ignore` and those that `ids` maps to None.

        >>> LabelMap(2, ignore=[0], ids={26: 0, 7: 1, 11: 1, 255: None}).ignored_ids
        [0, 255]
        """
        # UNSCORED is in no file: colours get it.
        return [raw_id for raw_id in np.flatnonzero(self._table == IGNORED).tolist() if raw_id != UNSCORED]

    def _unknown(self, raw: NDArray[np.integer], path: str | Path) -> DataError:
        ids, counts = np.unique(raw, return_counts=True)
        last_id = self.first_id + self.num_classes - 1
        known = np.array([self.meaning(raw_id) is not None for raw_id in ids.tolist()])
        worst = sorted(zip(counts[~known].tolist(), ids[~known].tolist(), strict=True), reverse=True)
        shown = ", ".join(f"{raw_id} ({count} pixels)" for count, raw_id in worst[:5])
        more = f" and {len(worst) - 5} more" if len(worst) > 5 else ""
        if self._is_mapped:
            return DataError(
                f"{path}: label ids {shown}{more} are in neither data.map nor data.ignore={list(self.ignore)}. "
                "Add them to one of the two."
            )
        return DataError(
            f"{path}: label ids {shown}{more} are neither classes nor ignored: data.num_classes={self.num_classes} and "
            f"data.first_id={self.first_id} allow {self.first_id}..{last_id}, data.ignore={list(self.ignore)}. "
            "Raise data.num_classes, set data.first_id to the raw id of the first class, "
            "or add the ids that shall not be scored to data.ignore."
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers[:5]) + (", ..." if len(numbers) > 5 else "")
