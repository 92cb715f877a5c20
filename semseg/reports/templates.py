"""Render the templates of the pages; every inserted value is escaped. No torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATE_FOLDER = Path(__file__).resolve().parent / "templates"
NOT_AVAILABLE = "n/a"


def render_template(name: str, **values: Any) -> str:
    """Render the template `name` with `values`; markup in a value is escaped."""
    return _create_environment().get_template(name).render(**values)


def format_percent(value: float | None) -> str:
    """Format a fraction in percent with two digits, or as n/a.

    >>> format_percent(0.5314), format_percent(None)
    ('53.14', 'n/a')
    """
    return NOT_AVAILABLE if value is None else f"{100 * value:.2f}"


def format_number(value: float | None, unit: str) -> str:
    """Format a fraction in percent if its unit is %, and any other number with four digits.

    >>> format_number(0.5314, "%"), format_number(12.3456, "px")
    ('53.14', '12.35')
    """
    return format_percent(value) if value is None or unit == "%" else f"{value:.4g}"


def format_points(difference: float | None) -> str:
    """Format a difference of fractions in percentage points, with its sign.

    >>> format_points(0.0123), format_points(-0.5), format_points(0.0)
    ('+1.23', '-50.00', '0.00')
    """
    if difference is None:
        return NOT_AVAILABLE
    return f"{100 * difference:+.2f}" if round(100 * difference, 2) else "0.00"


def format_count(number: int) -> str:
    """Format a whole number with commas.

    >>> format_count(1234567)
    '1,234,567'
    """
    return f"{number:,}"


def format_sort_value(value: float | str | None) -> str:
    """Return the text by which the page sorts a cell; cells with an empty text are last in both directions."""
    return "" if value is None else str(value)


def format_css_colour(colour: tuple[int, int, int]) -> str:
    """Format a colour for CSS.

    >>> format_css_colour((255, 160, 0))
    '#ffa000'
    """
    return "#{:02x}{:02x}{:02x}".format(*colour)


@cache
def _create_environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {
        "percent": format_percent,
        "number": format_number,
        "points": format_points,
        "count": format_count,
        "sort_value": format_sort_value,
        "css_colour": format_css_colour,
    }
    environment.filters.update(filters)
    return environment
