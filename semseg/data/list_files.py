"""Stage 1: records from list files: odgt, CSV and JSON lines. Opens headers at most. No torch."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from semseg.data import store
from semseg.data.geometry import Size
from semseg.data.header_cache import scan_headers
from semseg.data.records import (
    Problem,
    Record,
    has_swapped_sides,
    hint_sentence,
    is_below,
    record_from_headers,
    require_path,
    separate_problems,
)
from semseg.errors import DataError

# Accepted names of columns, and of splits in the column `split`. Case and separators within names do not matter.
COLUMNS = {
    "image": (
        "image", "img", "images", "filename", "file_name", "file", "filepath", "file_path", "path", "image_path",
        "img_path", "image_file", "image_filename", "image_name", "img_name", "imagepath", "fpath_img",
    ),
    "mask": (
        "mask", "label", "annotation", "masks", "labels", "annotations", "segmentation", "seg", "segmap", "gt",
        "ground_truth", "target", "mask_path", "mask_file", "mask_filename", "mask_name", "maskpath", "label_path",
        "label_file", "label_filename", "label_name", "annotation_path", "annotation_file", "seg_path",
        "segmentation_path", "segmentation_mask", "gt_path", "fpath_segm",
    ),
    "split": ("split", "set", "subset", "partition", "phase", "usage", "dataset", "stage"),
}  # fmt: skip
SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "validation", "valid", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
SEPARATORS = (",", ";", "\t")


# ---- odgt lists


def read_odgt_list(list_file: str | Path, root: str | Path, *, hint: str = "") -> Iterator[Record | Problem]:
    """Records of an odgt list: one JSON object per line with fpath_img, fpath_segm, width, height.

    Paths are relative to `root` and must stay inside it; absolute paths are accepted if they lie inside. fpath_segm may
    be null. Sizes are trusted here and checked when the image is read. Blank lines, lines that begin with #, a byte
    order mark and CRLF are accepted; an image that is listed twice counts twice.

    Args:
        hint: ends messages about missing data: the command or page that gets it.

    Yields:
        A record or a problem for each line; messages begin with "file:line: ".

    Raises:
        DataError: if the root or the list is missing, or the list is empty.
    """
    list_file, root = Path(list_file), Path(root)
    _require_list(list_file, root, hint)
    base = os.path.normpath(root.absolute())
    is_empty = True
    for number, line in enumerate(store.read_file(list_file).removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        is_empty = False
        try:
            item = _parse_odgt_line(line, base, f"{list_file}:{number}")
        except DataError as error:
            item = Problem(str(error))
        yield item
    if is_empty:
        raise DataError(f"{list_file}: the list names no image.{hint_sentence(hint)}")


def _require_list(list_file: Path, root: Path, hint: str) -> None:
    require_path(store.is_folder(root), "data folder", root, hint)
    require_path(store.is_file(list_file), "list of images", list_file, hint)


def _parse_odgt_line(line: bytes, base: str, where: str) -> Record:
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: the line is not UTF-8 text (byte {error.start}). Save the list as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not one JSON object ({_describe_json_error(error)}). Each line is a separate object, "
            'without a comma after it: {"fpath_img": "a.jpg", "fpath_segm": "a.png", "width": 640, "height": 480}.'
        ) from None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a line must be a JSON object, this is a {type(entry).__name__}.")
    missing = [key for key in ("fpath_img", "fpath_segm", "width", "height") if key not in entry]
    if missing:
        raise DataError(f"{where}: key {', '.join(missing)} is missing; found {', '.join(entry) or 'none'}.")
    size = Size(_parse_length(entry, "height", where), _parse_length(entry, "width", where))
    label = None if entry["fpath_segm"] is None else _parse_path(entry, "fpath_segm", base, where)
    return Record(_parse_path(entry, "fpath_img", base, where), label, size, where)


def _describe_json_error(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"


def _parse_length(entry: dict[str, object], key: str, where: str) -> int:
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"{where}: {key} must be a whole number of pixels above 0, got {value!r}.")
    return value


def _parse_path(entry: Mapping[str, object], key: str, base: str, where: str) -> str:
    """The file that an entry names; it must lie below `base`, but need not exist."""
    value = entry[key]
    if not isinstance(value, str) or not value or "\0" in value or not store.is_utf8(value):
        raise DataError(f"{where}: {key} must be a path, got {value!r}.")
    path = _join(base, value)
    if "\\" in value and not (is_below(path, base) and store.is_file(path)):
        path = _join(base, value.replace("\\", "/"))  # written on Windows
    if not (is_below(path, base) or is_below(os.path.realpath(path), os.path.realpath(base))):
        raise DataError(f"{where}: {key} {value!r} leaves the data folder {base}. Set data.root to a folder above it.")
    return store.match_unicode_form(path)


def _join(base: str, path: str) -> str:
    return os.path.normpath(os.path.join(base, path))  # noqa: PTH118 (pathlib costs seconds on long lists)


# ---- tables


class _TableRow(NamedTuple):
    line: int  # line number in the file
    values: dict[str, object]  # "image", "mask" and perhaps "split"


class _TablePair(NamedTuple):
    image: str
    mask: str | None
    origin: str


def read_table_list(
    list_file: str | Path, root: str | Path, split: str, *, hint: str = "", cache_dir: str | Path | None = None
) -> Iterator[Record | Problem]:
    """Records of a CSV file with columns image and mask, or of a file with a JSON object {"image", "mask"} per line.

    Paths are relative to `root` and must stay inside it; an empty mask means that the image has none. An optional third
    column, or key, `split` assigns each row to a split; rows of other splits are skipped. Columns, keys and splits may
    be spelled as in `COLUMNS` and `SPLIT_NAMES`; any of `SEPARATORS` may separate the columns. Lines that begin with #
    are comments. Sizes come from the headers, as in `read_folder_pairs`.

    Yields:
        A record or a problem for each row of the split.

    Raises:
        DataError: as `read_odgt_list`; if columns are missing or ambiguous.
    """
    list_file, root = Path(list_file), Path(root)
    _require_list(list_file, root, hint)
    base = os.path.normpath(root.absolute())
    rows, problems = separate_problems(_read_rows(list_file))
    yield from problems
    pairs: list[_TablePair] = []
    other_splits: Counter[str] = Counter()
    has_problems = bool(problems)
    for row in rows:
        where = f"{list_file}:{row.line}"
        try:
            row_split = _parse_split(row.values.get("split"), where)
            if row_split not in ("", split):
                other_splits[row_split] += 1
                continue
            mask = _parse_path(row.values, "mask", base, where) if row.values.get("mask") else None
            pairs.append(_TablePair(_parse_path(row.values, "image", base, where), mask, where))
        except DataError as error:
            has_problems = True
            yield Problem(str(error))
    if not pairs and not has_problems:
        others = "".join(f" It has {count} of {name}." for name, count in other_splits.items())
        raise DataError(f"{list_file}: the list names no image of {split}.{others}{hint_sentence(hint)}")
    headers, unreadable = scan_headers([pair.image for pair in pairs], root, cache_dir)
    yield from map(Problem, unreadable)
    swapped = [
        pair.mask for pair in pairs if pair.mask and pair.image in headers and has_swapped_sides(headers[pair.image])
    ]
    mask_headers, unreadable = scan_headers(swapped, root, cache_dir)
    yield from map(Problem, unreadable)
    for image, mask, origin in pairs:
        if image in headers:
            yield record_from_headers(image, mask, origin, headers[image], mask_headers.get(mask or ""))


def find_row_splits(list_file: Path) -> set[str]:
    """The splits that rows of a table name; empty without a column for them, or if the list cannot be read."""
    try:
        rows, _ = separate_problems(_read_rows(list_file))
    except (DataError, OSError):
        return set()
    return {match_split(str(value)) for row in rows if (value := row.values.get("split"))} - {""}


def _parse_split(value: object, where: str) -> str:
    """The split that a row names; empty if it names none.

    Raises:
        DataError: if there is no such split.
    """
    name = "" if value is None else str(value).strip()
    split = match_split(name)
    if name and not split:
        allowed = "; ".join(f"{split}: {', '.join(spellings)}" for split, spellings in SPLIT_NAMES.items())
        raise DataError(f"{where}: there is no split {value!r}. Allowed spellings: {allowed}.")
    return split


def match_split(name: str) -> str:
    """The split that a name stands for, ignoring case; empty if there is none.

    >>> match_split("Validation")
    'val'
    """
    return next((split for split, spellings in SPLIT_NAMES.items() if name.strip().lower() in spellings), "")


def _read_rows(list_file: Path) -> Iterator[_TableRow | Problem]:
    """The rows of a CSV or JSON-lines file."""
    try:
        text = store.read_text(list_file)
    except UnicodeDecodeError as error:
        raise DataError(f"{list_file}: not UTF-8 text (byte {error.start}). Save the list as UTF-8.") from None
    try:
        yield from (
            _read_json_rows(text, list_file)
            if list_file.suffix.lower() == ".jsonl"
            else _read_csv_rows(text, list_file)
        )
    except csv.Error as error:
        raise DataError(f"{list_file}: not a table of comma-separated values ({error}).") from None


def _read_json_rows(text: str, list_file: Path) -> Iterator[_TableRow | Problem]:
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            item = _TableRow(number, _parse_json_row(line, f"{list_file}:{number}"))
        except DataError as error:
            item = Problem(str(error))
        yield item


def _parse_json_row(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not one JSON object ({_describe_json_error(error)}).") from None
    columns = _match_columns([key for key in row if isinstance(key, str)], where) if isinstance(row, dict) else {}
    if "image" not in columns:
        raise DataError(f'{where}: a line must be an object like {{"image": "a.jpg", "mask": "a.png"}}.')
    return {name: row[key] for name, key in columns.items()}


def _read_csv_rows(text: str, list_file: Path) -> Iterator[_TableRow | Problem]:
    # Comments become blank lines, so that line numbers stay right.
    lines = ["\n" if line.startswith(("#", "sep=")) else line for line in io.StringIO(text, newline=None)]
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    header = lines[first] if lines else ""
    columns: dict[str, str] = {}
    for separator in SEPARATORS:
        names = next(csv.reader([header], delimiter=separator, skipinitialspace=True), [])
        columns = _match_columns(names, list_file)
        if {"image", "mask"} <= set(columns):
            break
    else:
        raise DataError(
            f"{list_file}:{first + 1}: columns image and mask are needed; found {header.strip()!r}. Allowed spellings: "
            f"{', '.join(COLUMNS['image'])}; {', '.join(COLUMNS['mask'])}."
        )
    rows = csv.DictReader(lines[first:], delimiter=separator, skipinitialspace=True)
    for row in rows:
        number = rows.line_num + first
        if any(row.get(None) or ()):  # pyright: ignore[reportCallIssue, reportArgumentType] - values without a column
            message = f"{list_file}:{number}: more values than columns. Quote names that contain {separator!r}."
            yield Problem(message)
        else:
            yield _TableRow(number, {name: (row[column] or "").strip() for name, column in columns.items()})


def _match_columns(names: Sequence[str], where: object) -> dict[str, str]:
    """Maps "image", "mask" and "split" to the names that a list uses; missing columns are left out.

    Raises:
        DataError: if several names match the same column and none is its standard name.
    """
    matched: dict[str, str] = {}
    plain = {name: "_".join(name.strip().lower().replace("-", " ").replace("_", " ").split()) for name in names}
    for column, spellings in COLUMNS.items():
        candidates = [name for name in names if plain[name] in spellings]
        exact = [name for name in candidates if plain[name] == column]
        if len(exact or candidates) > 1:
            raise DataError(f"{where}: {' and '.join(candidates)} may both be the {column}. Call one of them {column}.")
        if candidates:
            matched[column] = (exact or candidates)[0]
    return matched
