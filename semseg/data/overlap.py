"""Images that belong to two splits, which makes scores look better than they are. Decodes nothing. No torch."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from semseg.data.records import Record
from semseg.data.store import file_stamp, read_file
from semseg.errors import DataError
from semseg.system.text import format_quantity


class Overlap(NamedTuple):
    """Images of the second split that are in the first one too."""

    same_path: list[str]
    same_content: list[str]  # another file with the same bytes

    def __str__(self) -> str:
        images = [*self.same_path, *self.same_content]
        count = format_quantity(len(images), "validation image")
        return (
            f"{count} also used for training ({len(self.same_path)} by path, {len(self.same_content)} by content), "
            f"such as {images[0]}: scores of such images do not measure generalisation."
        )


def find_overlap(train: Sequence[Record], val: Sequence[Record]) -> Overlap | None:
    """The images that two splits have in common; None if there are none.

    Contents are compared only for files of equal length. Unreadable files are skipped: reading the data reports them.
    """
    trained = {os.path.abspath(record.image) for record in train}  # noqa: PTH100 - pathlib costs seconds on long lists
    paths = {record.image: os.path.abspath(record.image) for record in val}  # noqa: PTH100
    same_path = sorted(image for image, path in paths.items() if path in trained)
    others = [path for path in paths.values() if path not in trained]
    trained_by_length = group_by_length(trained)
    candidates = {path: length for path in others if (length := file_length(path)) in trained_by_length}
    digests = {content_digest(path) for length in set(candidates.values()) for path in trained_by_length[length]}
    digests.discard("")
    same_content = sorted(path for path in candidates if content_digest(path) in digests)
    return Overlap(same_path, same_content) if same_path or same_content else None


def group_by_length(paths: Iterable[str]) -> dict[int, list[str]]:
    """Files by their length in bytes; empty and missing ones are left out."""
    groups: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        if (length := file_length(path)) > 0:
            groups[length].append(path)
    return groups


def file_length(path: str) -> int:
    """Length of a file in bytes; -1 if it does not exist."""
    try:
        return file_stamp(path)[1]
    except (OSError, DataError):
        return -1


def content_digest(path: str) -> str:
    """SHA-256 of the content of a file; empty if it cannot be read."""
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except (OSError, DataError):
        return ""
