"""Stage 1: what is known of the images of a data set before any of them is decoded. No torch.

`list_files.py` and `folders.py` yield `Record | Problem`: training stops at the first problem (`require_records`),
mode=check reports all of them (`separate_problems`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from semseg.data import store
from semseg.data.geometry import Size
from semseg.data.headers import Header
from semseg.data.label_map import LabelMap
from semseg.data.store import UnusedFiles
from semseg.errors import DataError
from semseg.storage.commands import entry_command

T = TypeVar("T")
_COPY_MARK = re.compile(r"\.rf\.\w+\.\w+$", re.ASCII)  # that Roboflow appends to each augmented copy, with the suffix


MIN_IMAGES = 100  # the fraction of bad images is taken of at least this many


class Record(NamedTuple):
    """One image of a data set and what is known of it without decoding."""

    image: str  # path
    label: str | None  # path; None if the image has no mask
    size: Size  # at which the image is read; from the list, or from the file header
    origin: str  # where the record comes from, for messages: "train.odgt:12" or a folder
    orientation: int = 1  # EXIF orientation of the image, 1..8, if its header was read
    is_upright: bool = False  # whether the label is drawn on the upright image, if both grids have the label's size
    label_map: LabelMap | None = None  # of its label, if it is not that of the main data set (data.mix)
    source: int = 0  # number of its data set; 0: the main one


class Problem(NamedTuple):
    """A line or file that gives no record."""

    message: str
    summary: str = ""  # replaces `message` in the error of `require_records`, where several problems share a cause


def require_records(items: Iterable[T | Problem]) -> list[T]:
    """All items, if none of them is a problem.

    Raises:
        DataError: with the first problem.
    """
    records: list[T] = []
    for item in items:
        if isinstance(item, Problem):
            raise DataError(item.summary or item.message)
        records.append(item)
    return records


def separate_problems(items: Iterable[T | Problem]) -> tuple[list[T], list[Problem]]:
    """The items that are no problems, and the problems."""
    records: list[T] = []
    problems: list[Problem] = []
    for item in items:
        if isinstance(item, Problem):
            problems.append(item)
        else:
            records.append(item)
    return records, problems


def take_evenly(items: Sequence[T], count: int) -> Sequence[T]:
    """At most `count` items, the first one and others at equal distances.

    >>> take_evenly("abcdefg", 3), take_evenly("ab", 3)
    ('adg', 'ab')
    """
    return items[:: -(-len(items) // count) or 1]


def check_bad_fraction(left_out: int, seen: int, limit: float) -> None:
    """Stop if so many images cannot be read that it is no accident.

    Raises:
        DataError: if `left_out` is more than the fraction `limit` of the images seen, or of MIN_IMAGES.
    """
    if left_out > limit * max(seen, MIN_IMAGES):
        raise DataError(
            f"{left_out} of {seen} images could not be read, more than data.max_bad={limit:g} allows; they are named "
            "above. Fix or remove them, or raise data.max_bad."
        )


def record_from_headers(image: str, label: str | None, origin: str, header: Header, mask: Header | None) -> Record:
    """The record of an image, with the size at which it is read with this mask.

    Args:
        mask: the header of the mask; needed if `has_swapped_sides(header)`.
    """
    size = header.upright if mask is not None and mask.upright == header.upright else header.stored
    return Record(image, label, size, origin, header.orientation)


def has_swapped_sides(header: Header) -> bool:
    """Whether the EXIF orientation exchanges height and width of the stored image."""
    return header.stored != header.upright


# ---- splitting


def split_by_hash(
    records: Sequence[Record], fraction: float, root: str | Path, groups: Sequence[str] | None = None
) -> tuple[list[Record], list[Record]]:
    """Split records into (kept, held out), with about `fraction` of them held out.

    The side of a record depends only on its path below `root`: adding or removing other files does not move it, nor
    does moving the whole data set. Copies of one photograph by Roboflow (a.rf.<digits>.jpg) are on one side. Neither
    side is empty if there are records of two or more photographs.

    Args:
        groups: the group of each record, whose records are all on one side; None: each photograph by itself.

    Raises:
        ValueError: if fraction is not between 0 and 1.
        DataError: if there are fewer than two records.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be above 0 and below 1, got {fraction}")
    if len(records) < 2:
        raise DataError(f"{root}: {len(records)} image cannot be split into training and validation: add images.")
    names = [name_photograph(record.image, root) for record in records] if groups is None else groups
    hashes = [_unit_hash(name) for name in names]
    if min(hashes) == max(hashes):
        what = "are copies of one photograph" if groups is None else "belong to one group (data.group)"
        raise DataError(
            f"{root}: all {len(records)} images {what}, which cannot be split into training and validation: add images."
        )
    threshold = min(max(fraction, min(hashes)), max(hashes) - 2.0**-53)
    kept = [record for record, value in zip(records, hashes, strict=True) if value > threshold]
    held_out = [record for record, value in zip(records, hashes, strict=True) if value <= threshold]
    return kept, held_out


def name_photograph(image: str, root: str | Path) -> str:
    """The path of an image below `root`, with /; the same for copies of a photograph by Roboflow (a.rf.<digits>.jpg).

    >>> name_photograph("/set/images/a.rf.22bb.jpg", "/set")
    'images/a'
    """
    try:
        path = os.path.relpath(image, root)
    except ValueError:  # on another drive of Windows
        path = os.path.abspath(image)  # noqa: PTH100 - one of text, not of a Path
    return _COPY_MARK.sub("", path.replace(os.sep, "/"))


def _unit_hash(name: str) -> float:
    """A number in [0, 1) that depends only on a name."""
    digest = hashlib.sha256(name.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


# ---- missing files


def require_path(exists: bool, kind: str, path: Path, hint: str) -> None:
    """Stop if a file or folder of the data set is missing.

    Args:
        kind: what it is, for the message: "data folder".
        hint: ends the message: the command or page that gets the data; may be empty.

    Raises:
        DataError: if `exists` is False, with what the nearest existing folder contains.
    """
    if not exists:
        nearby = _describe_nearest_folder(path)
        raise DataError(f"{kind} not found: {path} (looked at {path.absolute()}).{nearby}{hint_sentence(hint)}")


def _describe_nearest_folder(path: Path) -> str:
    """A sentence about the nearest existing folder above a missing path: what it contains instead."""
    parents = (parent for parent in path.absolute().parents if os.path.lexists(parent) or store.is_folder(parent))
    folder = next(parents, None)
    if folder is None or folder == folder.parent:
        return ""
    if not store.is_folder(folder):
        return f" {folder} is a file; of archives, only whole .zip files are read in place."
    unused = UnusedFiles()
    names = store.list_folder(folder, unused)
    contents = f" In {folder} there are: {', '.join(names[:8])}{', ...' if names[8:] else ''}." if names else ""
    return contents + (f" Not used: {unused.describe()}." if unused.count else "")


def hint_sentence(hint: str) -> str:
    """`hint` to append to a sentence, with the command by which this program was started; empty if there is none."""
    return f" {hint.replace('python run.py', entry_command())}" if hint else ""


def is_below(path: str, folder: str) -> bool:
    """Whether a normalised path leads below a normalised folder."""
    return path.startswith(folder.rstrip(os.sep) + os.sep)
