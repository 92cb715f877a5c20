"""Building blocks of the schema: fields with a range or choices, and checks that several sections share."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, field
from numbers import Integral, Real
from typing import Any

from omegaconf import BooleanNode, FloatNode, IntegerNode, ValidationError

from semseg.errors import ConfigError, suggest

MAX_EDGE_LENGTH = 2**15  # pixels, of an image after scaling
MAX_INT, MAX_FLOAT = 2**63 - 1, (2 - 2**-23) * 2.0**127  # the largest int64 and the largest float32
MAX_STRIDE = 1024  # pixels; images are padded to multiples of it
MAX_SEED = 2**32 - 1  # accepted by every generator; NumPy's global one is the strictest
# Metadata of a field: words for the bound, and the comparison that a value must pass.
BOUNDS = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def number_field(
    default: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with a range: value >= low, value > above, value <= high, value < below."""
    return field(default=default, metadata={"low": low, "above": above, "high": high, "below": below})


def choice_field(default: Any, choices: tuple[str, ...]) -> Any:
    """A field whose value is one of `choices`, or None if its type allows that."""
    return field(default=default, metadata={"choices": choices})


def free_field(default: Any, accepts: str) -> Any:
    """A field of several types, which its section checks; `accepts` describes them for the documentation."""
    return field(default=default, metadata={"accepts": accepts})


AUTO = "auto"  # the value with which a run chooses a key by itself
AUTO_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


def auto_field(default: Any, kind: type, *, low: float | None = None, above: float | None = None) -> Any:
    """A field of type int, float or bool that may be AUTO as well, and null if that is its default."""
    accepts = " or ".join([kind.__name__, AUTO, *(["null"] if default is None else [])])
    return field(default=default, metadata={"accepts": accepts, "kind": kind, "low": low, "above": above})


def convert_auto_value(key: str, value: Any, item: Field[Any]) -> Any:
    """The value of an `auto_field` in its own type, as OmegaConf converts the values of other fields.

    Raises:
        ConfigError: if it has another type.
    """
    kind = item.metadata["kind"]
    if value == AUTO or (value is None and item.default is None):
        return value
    node = {int: IntegerNode, float: FloatNode, bool: BooleanNode}[kind]
    try:
        return node(value, is_optional=False)._value()
    except ValidationError:
        raise ConfigError(f"{key}={value}: must be {AUTO_KINDS[kind]}, or {AUTO}.") from None


def interpolated_field(interpolation: str) -> Any:
    """A text field whose default in configs/ is an interpolation; without a configuration file it is empty."""
    return field(default="", metadata={"interpolation": interpolation})


def network_field(keys: type) -> Any:
    """A section whose keys depend on the chosen network; `keys` documents those that are always the same."""
    return field(default_factory=dict, metadata={"keys": keys})


def open_field() -> Any:
    """Entries that programs add to a section (see semseg/config/tables.py); in files they are beside its other keys."""
    return field(default_factory=dict, metadata={"is_open": True})


def key_of(item: Field[Any]) -> str:
    """The key of a field on the command line and in files; a keyword of Python cannot be the name of the field."""
    return item.metadata.get("key", item.name)


def describe_range(metadata: Mapping[str, Any]) -> str:
    """The bounds of a field in words; empty if it has none.

    >>> describe_range({"low": 0, "below": 1})
    'at least 0 and below 1'
    """
    bounds = [f"{words} {metadata[name]}" for name, (words, _) in BOUNDS.items() if metadata.get(name) is not None]
    return " and ".join(bounds)


def find_bound_problems(key: str, value: float, metadata: Mapping[str, Any]) -> Iterator[str]:
    """A sentence if a number violates the bounds of its field, or those of the type it is stored in."""
    limits = dict(metadata)
    largest = MAX_FLOAT if isinstance(value, float) else MAX_INT
    if not value <= largest and limits.get("high") is None and limits.get("below") is None:  # includes NaN
        limits["high"] = largest
    if value < -largest and limits.get("low") is None and limits.get("above") is None:
        limits["low"] = -largest
    if not all(holds(value, limits[name]) for name, (_, holds) in BOUNDS.items() if limits.get(name) is not None):
        yield f"{key}={value}: must be {describe_range(limits)}."


def format_wrong_choice(key: str, value: Any, choices: tuple[str, ...]) -> str:
    """A sentence for a value that is not one of `choices`, with the nearest one."""
    hint = suggest(str(value), choices, prefix=f"{key}=")
    return f"{key}={value}: not known.{hint} Valid: {', '.join(choices)}."


def find_edge_problems(key: str, edges: object) -> Iterator[str]:
    """A sentence if `edges` is not a list of short edges."""
    listed = list(edges) if isinstance(edges, Iterable) and not isinstance(edges, str) else []
    if not listed or not all(is_int_between(edge, low=1, high=MAX_EDGE_LENGTH) for edge in listed):
        yield (
            f"{key}={edges}: must be a list of short edges in pixels, each at least 1 and at most {MAX_EDGE_LENGTH}, "
            "such as [300,450,600]."
        )


def find_crop_problems(key: str, crop: Any) -> Iterator[str]:
    """A sentence if `crop` is neither null nor a height and a width."""
    sides = crop if isinstance(crop, list) else []
    is_valid = len(sides) == 2 and all(is_int_between(side, low=1, high=MAX_EDGE_LENGTH) for side in sides)
    if crop is not None and not is_valid:
        yield f"{key}={crop}: must be [height, width] in pixels, each from 1 to {MAX_EDGE_LENGTH}, or null."


def find_view_problems(section: str, scales: object, window: int | None, stride: int | None) -> Iterator[str]:
    """A sentence for every problem with scales and windows; their keys begin with `section`, such as `eval.`."""
    yield from find_edge_problems(f"{section}scales", scales)
    if stride and window is None:
        yield f"{section}stride={stride}: needs {section}window=<pixels>."
    elif stride and window and stride > window:
        yield f"{section}stride={stride}: must not exceed {section}window={window}."


def is_fraction(value: object) -> bool:
    """Whether `value` is a number, NumPy's included, from 0 to 1."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def is_int_between(value: object, *, low: int, high: float = math.inf) -> bool:
    """Whether `value` is an integer, NumPy's included, from `low` to `high`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high
