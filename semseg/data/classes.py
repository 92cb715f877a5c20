"""Names and colours of classes: the tables of known data sets, and those that users write. No torch."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.data.label_map import MAX_CLASSES
from semseg.data.list_files import SEPARATORS
from semseg.data.palette import Colour, generated_palette, voc_colour
from semseg.data.store import read_text
from semseg.errors import DataError, describe_reason
from semseg.system.text import escape_unprintable, shorten_repr

BACKGROUND = "background"
CLASS_COLUMNS = {"index": "index", "name": "name", "r": "R", "g": "G", "b": "B"}  # in lower case -> of a class table
# name:red,green,blue:parts:actions
LABEL_MAP_LINE = re.compile(r"(.+):\s*((?:\d{1,3}\s*,\s*\d{1,3}\s*,\s*\d{1,3})?)\s*:[^:]*:[^:]*")


def is_background(name: str) -> bool:
    """Whether a class means pixels without an object, by its name.

    >>> is_background("Background"), is_background("_background_"), is_background("road")
    (True, True, False)
    """
    return name.strip().strip("_").lower() == BACKGROUND


class ClassTable(NamedTuple):
    """Names and colours of the classes, in the order of their indices."""

    names: tuple[str, ...]  # K
    palette: tuple[Colour, ...]  # K; two classes may share a colour (ADE20K's road and skyscraper do)

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        more = ", ..." if len(self.names) > 4 else ""
        return f"<ClassTable: {len(self.names)} classes, {', '.join(self.names[:4])}{more}>"

    def colours(self) -> NDArray[np.uint8]:
        """The palette as a (K, 3) uint8 array, RGB."""
        return np.array(self.palette, dtype=np.uint8)

    @classmethod
    def from_csv(cls, path: str | Path) -> ClassTable:
        """A table with header `index,name,R,G,B` and one row for each class, in any order of rows and columns.

        Semicolons or tabs may separate the columns; a line sep=; before the header and empty rows are skipped, as
        spreadsheets write them.

        Indices must have no gaps. The first may be 0 or 1, which implies nothing about raw ids.

        Raises:
            DataError: if the file or a column is missing, or a row is invalid, with the line number.
        """
        path = Path(path)
        lines = _read_table(path).splitlines()
        first = next((number for number, line in enumerate(lines) if not line.lower().startswith("sep=")), 0)
        header = lines[first].lower().replace('"', "") if lines else ""
        delimiter = max(SEPARATORS, key=header.count)
        names = [CLASS_COLUMNS.get(name.strip(), name.strip()) for name in header.split(delimiter)]
        rows = csv.DictReader(lines[first + 1 :], names, delimiter=delimiter, skipinitialspace=True)
        try:
            missing = set(CLASS_COLUMNS.values()) - set(names)
            if missing:
                raise DataError(
                    f"{path}:{first + 1}: columns {', '.join(sorted(missing))} are missing. The header must be "
                    "index,name,R,G,B."
                )
            entries = sorted(
                _parse_row(row, f"{path}:{rows.line_num + first + 1}")
                for row in rows
                if any(map(str.strip, filter(None, map(row.get, names))))
            )
        except csv.Error as error:  # a field that is too long
            raise DataError(f"{path}:{rows.line_num + first + 1}: the line is not valid CSV ({error}).") from None
        indices = [index for index, _, _ in entries]
        if not entries or indices[0] not in (0, 1) or indices != list(range(indices[0], indices[0] + len(entries))):
            raise DataError(
                f"{path}: indices must be 0, 1, 2, ... or 1, 2, 3, ... without gaps or repeats, "
                f"got {shorten_repr(indices)}."
            )
        return cls(tuple(name for _, name, _ in entries), tuple(colour for _, _, colour in entries))

    def as_plain(self) -> dict[str, list[Any]]:
        """The table as strings, numbers and lists, for checkpoints and JSON."""
        return {"names": list(self.names), "palette": [list(colour) for colour in self.palette]}

    @classmethod
    def from_plain(cls, plain: Any) -> ClassTable:
        """The inverse of `as_plain`, for data from any file.

        Raises:
            ValueError: if it is not an equal number of names and colours.
        """
        names, palette = (plain.get(key) if isinstance(plain, Mapping) else None for key in ("names", "palette"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("the class names are not a list of strings")
        if not isinstance(palette, list) or len(palette) != len(names) or not 0 < len(names) <= MAX_CLASSES:
            raise ValueError(f"{len(names)} classes need a list of as many colours (1 to {MAX_CLASSES} classes)")
        return cls(tuple(map(escape_unprintable, names)), tuple(map(_parse_colour, palette)))

    @classmethod
    def from_names(cls, names: Sequence[str]) -> ClassTable:
        """A table of these names with generated colours.

        >>> ClassTable.from_names(["cat", "dog"]).num_classes
        2
        """
        return cls(tuple(map(escape_unprintable, names)), generated_palette(len(names)))

    @classmethod
    def from_file(cls, path: str | Path) -> ClassTable:
        """A table from a CSV file (`from_csv`), a JSON file, or a text file with a name on each line.

        In a text file, lines that begin with # are comments; a name that begins with # is written in double quotes. If
        all lines are like those of CVAT's labelmap.txt (name:red,green,blue:parts:actions), it is one; a class without
        a colour there has that of Pascal VOC.
        JSON holds a list of {"name": ..., "color": [R, G, B]}, or an object with that list under `classes`, as
        mode=predict writes it. Colours may be omitted from all entries. If all have an `index` (0, 1, ... or 1, 2, ...)
        or else an `id`, it decides their order.

        Raises:
            DataError: if the file is missing or invalid.
        """
        path = Path(path)
        if path.suffix.lower() not in (".json", ".txt"):
            return cls.from_csv(path)
        text = _read_table(path)
        try:
            if path.suffix.lower() == ".txt":
                lines = [line for each in text.splitlines() if (line := each.strip()) and not line.startswith("#")]
                if lines and all(map(LABEL_MAP_LINE.fullmatch, lines)):
                    names, colours = zip(*(parse_label_map_line(line, i) for i, line in enumerate(lines)), strict=True)
                    return cls(tuple(map(escape_unprintable, names)), colours)
                names = [_unquote(line) for line in lines]
                return cls.from_names(_require_entries(names))
            content = json.loads(text)
            if isinstance(content, dict) and "classes" not in content:
                raise ValueError("it is neither a list of classes, nor an object with that list under `classes`")
            rows = _sort_rows(_require_entries(content["classes"] if isinstance(content, dict) else content))
            names, colours = zip(*map(_parse_entry, rows), strict=True)
            has_colours = {colour is not None for colour in colours}
            if has_colours == {False}:
                return cls.from_names(names)
            if len(has_colours) > 1:
                raise ValueError("some classes have a color, and some have none")
            return cls(tuple(map(escape_unprintable, names)), tuple(map(_parse_colour, colours)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {describe_reason(error)}"
            raise DataError(f"{path}: the class table cannot be read ({reason}).") from error


def _read_table(path: Path) -> str:
    """The text of a class table.

    Raises:
        DataError: if it cannot be read, or is not UTF-8.
    """
    try:
        return read_text(path)
    except UnicodeDecodeError as error:
        advice = "Save it as text in UTF-8, not as a workbook or in the encoding of a region"
        raise DataError(f"{path}: the class table is not UTF-8 text (byte {error.start}). {advice}.") from None
    except OSError as error:
        raise DataError(f"{path}: the class table cannot be read ({describe_reason(error)}).") from error


def find_moved_class(names: Sequence[str], trained: Sequence[str]) -> int | None:
    """The index of the first class that another one has the place of, if the same classes are in another order.

    >>> find_moved_class(["sky", "road", "car"], ["sky", "car", "road"]), find_moved_class(["sky"], ["road"])
    (1, None)
    """
    if sorted(names) != sorted(trained):
        return None
    return next((index for index, pair in enumerate(zip(names, trained, strict=True)) if pair[0] != pair[1]), None)


def _sort_rows(rows: Sequence[Any]) -> list[Any]:
    """Entries of a JSON table in the order of their numbers, if they have any.

    Raises:
        ValueError: for indices that are not 0, 1, ... or 1, 2, ..., and for an id that stands twice.
    """
    key = next((key for key in ("index", "id") if any(isinstance(row, dict) and key in row for row in rows)), None)
    numbers: list[Any] = [row.get(key) if isinstance(row, dict) else None for row in rows]
    are_integers = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    if key is None or (key == "id" and not are_integers):  # an id may be any text
        return list(rows)
    expected = [list(range(first, first + len(rows))) for first in (0, 1)]
    if key == "index" and not (are_integers and sorted(numbers) in expected):
        raise ValueError(
            f"indices must be 0, 1, 2, ... or 1, 2, 3, ... without gaps or repeats: {shorten_repr(numbers)}"
        )
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"an id stands twice: {shorten_repr(numbers)}")
    return sorted(rows, key=lambda row: row[key])


def parse_label_map_line(line: str, index: int) -> tuple[str, Colour]:
    """The name and the colour of a class in CVAT's labelmap.txt; names may hold colons.

    A class without a colour has that of Pascal VOC for its index.

    Raises:
        ValueError: if the line is not like name:red,green,blue:parts:actions.

    >>> parse_label_map_line("cat:250,50,83::", 0), parse_label_map_line("dog:::", 1)
    (('cat', (250, 50, 83)), ('dog', (128, 0, 0)))
    """
    match = LABEL_MAP_LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"a line of a label map is like cat:250,50,83::, got {shorten_repr(line)}")
    name, numbers = match.groups()
    return name, _parse_colour([int(part) for part in numbers.split(",")]) if numbers else voc_colour(index)


def _unquote(name: str) -> str:
    return name[1:-1] if len(name) > 2 and name[0] == name[-1] == '"' else name


def _require_entries(rows: list[Any]) -> list[Any]:
    if not isinstance(rows, list) or not rows:
        raise ValueError("it lists no classes")
    return rows


def _parse_entry(row: Any) -> tuple[str, Any]:
    """The name and the numbers of the colour, if any, of an entry of a JSON table."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str | int | float):
        raise ValueError(f'a class is {{"name": "sky", "color": [0, 0, 255]}}, got {shorten_repr(row)}')
    return str(row["name"]), row.get("color", row.get("colour"))


def _parse_colour(numbers: Any) -> Colour:
    is_colour = isinstance(numbers, list | tuple) and len(numbers) == 3
    if not is_colour or not all(type(part) is int and 0 <= part <= 255 for part in numbers):
        raise ValueError(f"a colour is three integers in 0..255, got {shorten_repr(numbers)}")
    red, green, blue = numbers
    return red, green, blue


def _parse_row(row: dict[str, str], where: str) -> tuple[int, str, Colour]:
    try:
        index, red, green, blue = (int(row[column]) for column in ("index", "R", "G", "B"))
    except (TypeError, ValueError):
        raise DataError(f"{where}: index, R, G and B must be integers.") from None
    if not all(0 <= part <= 255 for part in (red, green, blue)):
        raise DataError(f"{where}: a colour is three integers in 0..255, got {red},{green},{blue}.")
    return index, escape_unprintable((row["name"] or "").strip()) or f"class {index}", (red, green, blue)


@lru_cache
def built_in_classes(name: str) -> ClassTable:
    """The classes of a data set whose table comes with the package: ade20k, camvid, cityscapes, voc2012 or cocostuff.

    Names and colours are those of the data sets; COCO-Stuff defines no colours, so its table has generated ones. ADE20K
    has the 150 classes of the scene-parsing challenge, CamVid the 11 of the SegNet papers.

    >>> built_in_classes("ade20k").names[:3], built_in_classes("camvid").num_classes
    (('wall', 'building', 'sky'), 11)
    """
    return ClassTable.from_csv(Path(__file__).with_name(f"{name}_classes.csv"))
