"""The names in the tables that programs add to: losses, scores, augmentations, callbacks and loggers. No torch.

A table is defined by the module that uses it, which makes its names known here. Whoever adds to a table imports that
module, so the names of a program are known before its command line is read; without such a program no table is needed
to check a configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from semseg.config.schema import OPEN_SECTIONS
from semseg.errors import ConfigError

METRICS_SECTION = "metrics"  # no section of the configuration: every score of the tables is computed
SCORE_NAMES = (  # of our own scores, and of columns beside them
    "miou", "mean_iou", "pixel_accuracy", "overall", "overall_score", "mean_accuracy", "frequency_weighted_iou",
    "mean_dice", "index", "id", "name", "iou", "accuracy", "precision", "dice", "boundary_iou", "pixels", "share",
    "file", "seconds", "height", "width", "loss",
)  # fmt: skip

_tables: dict[str, list[tuple[Mapping[str, object], frozenset[str]]]] = {}  # by section; a table, and our names in it


def announce_table(section: str, table: Mapping[str, object]) -> None:
    """Make the names that are added to `table` from now on known as keys of `section`, or as scores."""
    _tables.setdefault(section, []).append((table, frozenset(table)))


def list_own_names(section: str) -> list[str]:
    """The names that programs have added to the tables of `section`.

    Raises:
        ConfigError: for a name that a key or a score cannot have.
    """
    fixed, tables = list_fixed_names(section), _tables.get(section, [])
    names = [name for table, ours in tables for name in table if name not in ours]
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or not name.isascii() or name == "own":
            raise ConfigError(f"{section}: {name!r} cannot be a name. Use letters, digits and _, and not `own`.")
        if section == METRICS_SECTION and (name in SCORE_NAMES or names.count(name) > 1):
            raise ConfigError(f"{section}: there is a score named {name} already. Choose another name.")
        if name in fixed:
            raise ConfigError(f"{section}: there is a key {section}.{name} already. Choose another name.")
    return names


def list_fixed_names(section: str) -> set[str]:
    """The names of a table that are ours, because the schema has them as keys."""
    cls = OPEN_SECTIONS.get(section)
    return set() if cls is None else {item.name for item in fields(cls) if not item.metadata.get("is_open")}


def list_own_keys() -> list[str]:
    """The dotted keys that programs have added."""
    return [
        f"{section}.{name}" for section in _tables if section != METRICS_SECTION for name in list_own_names(section)
    ]


def is_own_key(key: str) -> bool:
    """Whether `key` is one that a program has added, or an option of it."""
    return any(key == own or key.startswith(f"{own}.") for own in list_own_keys())


def is_missing_key(key: str) -> bool:
    """Whether `key` is one that a program has added to a saved configuration, and this one has not."""
    section = next((section for section in OPEN_SECTIONS if key.startswith(f"{section}.")), None)
    if section is None:
        return False
    name = key.removeprefix(f"{section}.").partition(".")[0]
    return name not in list_fixed_names(section) and name not in list_own_names(section)


def list_own_scores() -> list[str]:
    """The names in the log of the scores that programs have added."""
    return [f"val/{name}" for name in list_own_names(METRICS_SECTION)]
