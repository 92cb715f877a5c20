"""Images that stand in two splits at once, which makes scores look better than they are. No torch; decodes nothing."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from semseg.data.records import Record
from semseg.data.store import read_file, stamp
from semseg.errors import DataError


class Overlap(NamedTuple):
    """Images of the second split that are in the first one too."""

    same_path: list[str]
    same_content: list[str]  # another file with the same bytes

    def __str__(self) -> str:
        found = [*self.same_path, *self.same_content]
        return (
            f"{len(found)} validation images are training images too ({len(self.same_path)} by path, "
            f"{len(self.same_content)} by content), such as {found[0]}: scores on them say little."
        )


def overlap(train: Sequence[Record], val: Sequence[Record]) -> Overlap | None:
    """What two splits have in common; None if that is nothing.

    Contents are compared only of files whose lengths are equal. Files that cannot be read are passed over: reading
    the data says what is wrong with them.
    """
    trained = {os.path.abspath(record.image) for record in train}  # noqa: PTH100 - pathlib costs seconds on long lists
    paths = {record.image: os.path.abspath(record.image) for record in val}  # noqa: PTH100
    same_path = sorted(image for image, path in paths.items() if path in trained)
    others = [path for path in paths.values() if path not in trained]
    by_length = by_bytes(trained)
    same_length = [path for path in others if length_of(path) in by_length]
    digests = {digest_of(path) for length in {length_of(path) for path in same_length} for path in by_length[length]}
    digests.discard("")
    same_content = sorted(path for path in same_length if digest_of(path) in digests)
    return Overlap(same_path, same_content) if same_path or same_content else None


def by_bytes(paths: Iterable[str]) -> dict[int, list[str]]:
    """Files by their length."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        if (length := length_of(path)) > 0:
            found[length].append(path)
    return found


def length_of(path: str) -> int:
    """In bytes; -1 if there is no such file."""
    try:
        return stamp(path)[1]
    except (OSError, DataError):
        return -1


def digest_of(path: str) -> str:
    """Of the content; empty if it cannot be read."""
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except (OSError, DataError):
        return ""
