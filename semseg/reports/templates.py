"""The templates of the pages, with everything escaped that is put into them. No torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

FOLDER = Path(__file__).resolve().parent / "templates"
NOT_SCORED = "n/a"


def render_template(name: str, **values: Any) -> str:
    """The page that the template `name` of this folder makes of `values`; no value can bring markup of its own."""
    return _environment().get_template(name).render(**values)


def percent(value: float | None) -> str:
    """A share in percent with two digits, or n/a.

    >>> percent(0.5314), percent(None)
    ('53.14', 'n/a')
    """
    return NOT_SCORED if value is None else f"{100 * value:.2f}"


def points(difference: float | None) -> str:
    """A difference of shares in percentage points, signed.

    >>> points(0.0123), points(-0.5), points(0.0)
    ('+1.23', '-50.00', '0.00')
    """
    if difference is None:
        return NOT_SCORED
    return f"{100 * difference:+.2f}" if round(100 * difference, 2) else "0.00"


def count(number: int) -> str:
    """A whole number with commas.

    >>> count(1234567)
    '1,234,567'
    """
    return f"{number:,}"


def sort_value(value: float | str | None) -> str:
    """What a sortable cell is sorted by; the empty text stays at the end in both directions."""
    return "" if value is None else str(value)


def style_colour(colour: tuple[int, int, int]) -> str:
    """A colour as CSS writes it.

    >>> style_colour((255, 160, 0))
    '#ffa000'
    """
    return "#{:02x}{:02x}{:02x}".format(*colour)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {
        "percent": percent,
        "points": points,
        "count": count,
        "sort_value": sort_value,
        "style_colour": style_colour,
    }
    environment.filters.update(filters)
    return environment
