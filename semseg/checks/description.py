"""The description of a checked data set, as the section `data` of a recipe. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from semseg.config.schema import BUILT_IN_CLASSES, SPLITS, DataConfig


def describe_data_set(data: DataConfig, base: DataConfig, file: Path) -> dict[str, Any]:
    """The keys of `data` that differ from `base` (data=folder), with paths for a description in `file`.

    Paths below the folder of the file are relative to it, others absolute; paths relative to data.root stay.
    """
    content = find_changed_values(asdict(data), asdict(base))
    content.pop("hint", None)
    if content.get("name") == file.stem:
        del content["name"]
    if data.map is not None:
        content.pop("first_id", None)  # not used with a map
    folder = file.absolute().parent
    if data.images is None:
        content["root"] = shorten_below(data.root, folder)
    else:
        content.pop("root", None)
        if data.classes not in (None, *BUILT_IN_CLASSES):  # below the working directory, as lists and folders
            content["classes"] = shorten_below(data.classes, folder)
        for split in set(SPLITS) & set(content):
            content[split] = {key: value and shorten_below(value, folder) for key, value in content[split].items()}
    for key in ("images", "masks", "label_cache"):
        if content.get(key):
            content[key] = shorten_below(content[key], folder)
    if content.get("mix"):
        content["mix"] = [
            {
                key: shorten_below(value, folder) if value and key in ("root", "images", "masks") else value
                for key, value in entry.items()
            }
            for entry in content["mix"]
        ]
    first = ("name", "root", "images", "masks")
    return {key: content[key] for key in (*first, *content) if key in content}


def find_changed_values(values: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of nested mappings that differ from those of `base`."""
    changed = {}
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict) and key != "map":
            inner = find_changed_values(value, base[key])
            changed |= {key: inner} if inner else {}
        elif value != base.get(key):
            changed[key] = value
    return changed


def shorten_below(path: str, folder: Path) -> str:
    """`path`, which may be relative to the working directory, relative to `folder` if it lies below, else absolute."""
    absolute = Path(path).expanduser().absolute()
    return absolute.relative_to(folder).as_posix() if absolute.is_relative_to(folder) else str(absolute)
