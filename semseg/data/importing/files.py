"""Files of an export: JSON with named errors, words of splits in names. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from semseg.data import store
from semseg.data.list_files import match_split
from semseg.errors import DataError, describe_reason
from semseg.system.text import shorten_repr

Kind = TypeVar("Kind")
KIND_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}


class EntryError(ValueError):
    """Why an entry of an export cannot be read, without the name of its file."""


class RepeatedKeyError(ValueError):
    """An object of a JSON file has a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, for `json.loads`, which would take the last of several values without a word.

    Raises:
        RepeatedKeyError: if a key occurs twice.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        seen = set[str]()
        raise RepeatedKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return content


def read_json_file(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: if it cannot be read, is no JSON, or has a key twice in one object.
    """
    try:
        return json.loads(store.read_text(path), object_pairs_hook=refuse_repeated_keys)
    except RepeatedKeyError as error:
        raise DataError(
            f"{path}: an object has the key {shorten_repr(error.key)} twice, and which value is right is not known. "
            "Export it again."
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}). Export it again.") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg}, line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}: not JSON, or truncated ({where}). Export it again.") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        reason = "too many nested brackets" if isinstance(error, RecursionError) else describe_reason(error)
        raise DataError(
            f"{path}: cannot be read as JSON ({reason or type(error).__name__}). Export it again."
        ) from None


def list_json_files(files: Iterable[Path], opening: bytes, has_keys: Callable[[bytes], bool]) -> list[Path]:
    """The JSON files that begin with `opening` and whose content passes a test; a file that cannot be read is none."""
    return [path for path in files if path.suffix.lower() == ".json" and _looks_like(path, opening, has_keys)]


def _looks_like(path: Path, opening: bytes, has_keys: Callable[[bytes], bool]) -> bool:
    try:
        content = store.read_file(path)
    except (OSError, DataError):
        return False
    return content.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(opening) and has_keys(content)


def read_text_lines(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return store.read_text(path).splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}). Export it again.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({describe_reason(error)}). Export it again.") from None


def get(entry: Any, key: str, kind: type[Kind]) -> Kind:
    """The value of a key, which must be there.

    Raises:
        EntryError: if it is missing, or of another kind.
    """
    if not isinstance(entry, dict) or key not in entry:
        found = f"found {shorten_repr(list(entry))}" if isinstance(entry, dict) else f"this is {shorten_repr(entry)}"
        raise EntryError(f"has no {key!r} ({found})")
    return check_kind(entry[key], key, kind)


def get_or(entry: Any, key: str, kind: type[Kind], default: Kind) -> Kind:
    """The value of a key; `default` if it is missing or null.

    Raises:
        EntryError: if it is of another kind.
    """
    value = entry.get(key) if isinstance(entry, dict) else None
    return default if value is None else check_kind(value, key, kind)


def check_kind(value: Any, key: str, kind: type[Kind]) -> Kind:
    """Return a value if it is of a kind: a finite number for float, which may be an int.

    Raises:
        EntryError: otherwise.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number and (isinstance(value, int) or math.isfinite(value)) and abs(value) < 1e300:
        return kind(value)  # pyright: ignore[reportCallIssue]
    if kind is int and is_number and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return kind(value)  # pyright: ignore[reportCallIssue] - tools that write 640.0
    if not isinstance(value, kind) or (kind in (int, float) and not is_number) or kind is float:
        raise EntryError(f"{key} must be {KIND_NAMES[kind]}, got {shorten_repr(value)}")
    if isinstance(value, str) and not store.is_utf8(value):
        raise EntryError(f"{key} is not UTF-8 text")
    return value  # pyright: ignore[reportReturnType]


def describe_entry(entry: Any, key: str, position: int) -> str:
    """How a message calls an entry of a list: by its id, or its position from 1."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return str(value)[:40] if isinstance(value, int | str) else f"number {position + 1}"


def find_split(*names: str) -> str:
    """The split that the words of some names stand for, the last ones first; "" if there is none.

    >>> find_split("annotations", "instances_train2017"), find_split("valid/_annotations.coco"), find_split("trainer")
    ('train', 'val', '')
    """
    for name in reversed(names):
        for word in reversed(re.split(r"[\W_\d]+", name)):
            if split := match_split(word):
                return split
    return ""


def find_other_case(path: Path) -> str:
    """The name of a file beside `path`, which does not exist, that differs in upper and lower case only; "" if none."""
    return _list_by_case(path.parent).get(path.name.casefold(), "")


@lru_cache(maxsize=64)
def _list_by_case(folder: Path) -> dict[str, str]:
    names = store.list_folder(folder, store.UnusedFiles()) if store.is_folder(folder) else []
    return {name.casefold(): name for name in names}
