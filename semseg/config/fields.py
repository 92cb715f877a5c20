"""Fields of the configuration with a range or choices, and the checks that several sections share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import field
from numbers import Integral
from typing import Any

from semseg.errors import find_nearest

MAX_EDGE_LENGTH = 2**15  # pixels, of an image after scaling
MAX_INT, MAX_FLOAT = 2**63 - 1, (2 - 2**-23) * 2.0**127  # of int64 and float32, in which numbers are used
MAX_STRIDE = 1024  # pixels; images are padded to multiples of it
MAX_SEED = 2**32 - 1  # that every generator takes; NumPy's global one is the strictest


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


def format_wrong_choice(key: str, value: Any, choices: tuple[str, ...]) -> str:
    meant = find_nearest(str(value), choices)
    hint = f" Did you mean {key}={meant}?" if meant else ""
    return f"{key}={value}: not known.{hint} Valid: {', '.join(choices)}."


def find_edge_problems(key: str, edges: object) -> Iterator[str]:
    """A sentence if `edges` is no list of short edges."""
    listed = list(edges) if isinstance(edges, Iterable) and not isinstance(edges, str) else []
    if not listed or not all(is_int_between(edge, low=1, high=MAX_EDGE_LENGTH) for edge in listed):
        yield (
            f"{key}={edges}: must be a list of short edges in pixels, each at least 1 and at most {MAX_EDGE_LENGTH}, "
            "such as [300,450,600]."
        )


def find_view_problems(section: str, scales: object, window: int | None, stride: int | None) -> Iterator[str]:
    """A sentence for every reason why images cannot be looked at like this; keys begin with `section`."""
    yield from find_edge_problems(f"{section}scales", scales)
    if stride and stride > (window or 0):
        yield f"{section}stride={stride}: is for windows of at least that side; {section}window={window}."


def is_int_between(value: object, *, low: int, high: float = math.inf) -> bool:
    """Whether `value` is a whole number, NumPy's included, from `low` to `high`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high
