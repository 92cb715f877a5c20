"""Stage 1: folds of a data set for cross-validation, and groups of images that must not be separated. No torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from semseg.data.records import Record, name_photograph
from semseg.errors import DataError


def name_group(path: str, root: str | Path, pattern: str | None) -> str:
    """The group of an image: what `pattern` finds in its path below `root`, or the photograph itself.

    Copies of one photograph by Roboflow (a.rf.<digits>.jpg) are one photograph.

    Args:
        pattern: data.group, a regular expression; its first group in brackets counts, if that took part in the match.

    Raises:
        DataError: if the pattern is not found, or matches no character.

    >>> name_group("/set/images/p07_a.png", "/set", r"p\\d+"), name_group("/set/p07/a.png", "/set", r"p(\\d+)")
    ('p07', '07')
    """
    name = name_photograph(path, root)
    if pattern is None:
        return name
    found = re.search(pattern, name)
    if found is None:
        raise DataError(f"{path}: data.group={pattern} is not found in {name}. Every image must belong to a group.")
    group = found[1] if found.re.groups and found[1] is not None else found[0]
    if not group:
        raise DataError(
            f"{path}: data.group={pattern} matches no character of {name}. Give a pattern that names a group."
        )
    return group


def assign_folds(records: Sequence[Record], root: str | Path, num_folds: int, pattern: str | None) -> list[int]:
    """The fold of each record, 0 .. num_folds - 1: groups stay together, and folds have about the same size.

    It depends on nothing but the paths below `root`: the largest groups come first, equal ones in the order of a hash,
    and each goes to the fold with the fewest images so far.

    Raises:
        DataError: if there are fewer groups than folds, or an image belongs to none.
    """
    groups = [name_group(record.image, root, pattern) for record in records]
    counts: dict[str, int] = {}
    for group in groups:
        counts[group] = counts.get(group, 0) + 1
    if len(counts) < num_folds:
        what = "images" if pattern is None else f"groups by data.group={pattern}"
        raise DataError(f"{root}: {len(counts)} {what} cannot be split into data.folds={num_folds}.")
    sizes, fold_of = [0] * num_folds, {}
    for group in sorted(counts, key=lambda name: (-counts[name], hashlib.sha256(name.encode()).digest())):
        fold = min(range(num_folds), key=lambda index: (sizes[index], index))
        fold_of[group] = fold
        sizes[fold] += counts[group]
    return [fold_of[group] for group in groups]
