"""Keywords of a call become overrides in the words of the command line. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from semseg.config.groups import list_groups
from semseg.config.overrides import LIST_KEYS, OPEN_PREFIXES, PATH_KEYS, quote_value
from semseg.config.schema import Config, get_sections
from semseg.errors import ArgumentError

RAW_KEYS = (*PATH_KEYS, "trainer.devices", "data.group")  # their text is quoted where the command line is read


def list_words(overrides: Sequence[str], keywords: Mapping[str, Any]) -> list[str]:
    """The words of the command line that say the same as the arguments of a call.

    Args:
        overrides: words of the command line, such as "optim.lr=0.01".
        keywords: values by key, with two underscores for a dot: `optim__lr=0.01`; or sections: `optim={"lr": 0.01}`.

    Raises:
        ArgumentError: for an override that is no text or is an option, and for a value that no key can have.

    >>> list_words(["seed=1"], {"data": "folder", "data__root": "my photos", "model": {"encoder": "resnet18"}})
    ['seed=1', 'data=folder', 'data.root=my photos', 'model/encoder=resnet18']
    """
    for override in overrides:
        if not isinstance(override, str) or override.startswith("-"):
            raise ArgumentError(f"{override!r}: an override is text such as 'optim.lr=0.01', and no option.")
    return [*overrides, *flatten_keywords({name.replace("__", "."): value for name, value in keywords.items()})]


def flatten_keywords(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The overrides of a section and of those in it."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        group = key.replace(".", "/")
        if isinstance(value, Mapping) and (group in list_groups() or is_section_key(key)):
            yield from flatten_keywords(value, f"{key}.")
        elif group in list_groups() and isinstance(value, str | os.PathLike):
            yield f"{group}={os.fspath(value)}"
        elif key in RAW_KEYS and isinstance(value, str | os.PathLike):
            text = os.fspath(value)
            is_path = text[:1] in ("[", "{") and key in PATH_KEYS and key not in LIST_KEYS  # such as [0-9]*.jpg
            yield f"{key}={quote_value(text) if is_path else text}"
        elif f"{key}." in OPEN_PREFIXES and isinstance(value, Mapping):
            yield from flatten_keywords(value, f"{key}.")
        else:
            yield f"{key}={format_literal(key, value)}"


def is_section_key(key: str) -> bool:
    """Whether a dotted key names a section of the configuration."""
    cls: type = Config
    for part in key.split("."):
        sections = get_sections(cls)
        if part not in sections:
            return False
        cls = sections[part]
    return True


def escape_name(name: object) -> str:
    """The name of an entry in Hydra's grammar.

    >>> escape_name("http://a.org/")
    'http\\\\://a.org/'
    """
    return re.sub(r"([\\()\[\]{}:=,\s])", r"\\\1", str(name))


def format_literal(key: str, value: object) -> str:
    """A value in Hydra's grammar.

    Raises:
        ArgumentError: if it is neither text, a path, a number, a boolean, None, nor a list or mapping of these.

    >>> format_literal("data.map", {0: 0, 255: None})
    '{0:0,255:null}'
    """
    plain = value.item() if isinstance(value, np.generic) else value
    match plain:
        case None:
            text = "null"
        case bool():
            text = str(plain).lower()
        case Integral():
            text = str(int(plain))
        case Real():
            text = repr(float(plain))
        case str() | os.PathLike():
            text = quote_value(os.fspath(plain))
        case Mapping():
            entries = (f"{escape_name(name)}:{format_literal(key, each)}" for name, each in plain.items())
            text = "{" + ",".join(entries) + "}"
        case list() | tuple() | set() | np.ndarray():
            text = "[" + ",".join(format_literal(key, each) for each in plain) + "]"
        case _:
            raise ArgumentError(
                f"{key}={value!r}: must be text, a path, a number, True, False, None, or a list or dictionary of these."
            )
    return text
