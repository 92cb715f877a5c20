"""Make text from files safe for terminals and spreadsheets."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

UNPRINTABLE_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")  # controls, unpaired surrogates, line and paragraph separators
# Marks that change the direction of text.
DIRECTION_MARKS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets take for the start of a formula


def escape_unprintable(text: object) -> str:
    r"""Text in one line that cannot move the cursor, change colours or hide anything: such characters are escaped.

    >>> escape_unprintable("sky\x1b[31m\n")
    'sky\\x1b[31m\\n'
    """
    return "".join(
        character.encode("unicode_escape", "surrogatepass").decode() if is_unprintable(character) else character
        for character in str(text)
    )


def is_unprintable(character: str) -> bool:
    return unicodedata.category(character) in UNPRINTABLE_CATEGORIES or character in DIRECTION_MARKS


def shorten_repr(value: object) -> str:
    """The first 80 characters of `repr(value)`, for messages."""
    text = repr(value)
    return escape_unprintable(text if len(text) <= 80 else f"{text[:80]}...")


def escape_lines(text: object) -> str:
    """`escape_unprintable` for messages of several lines: line breaks and tabs are kept."""
    return "\n".join("\t".join(map(escape_unprintable, line.split("\t"))) for line in str(text).split("\n"))


def escape_csv_cell(text: object) -> str:
    """Text for a cell of a CSV file, which a spreadsheet shows and never evaluates as a formula.

    >>> escape_csv_cell("=cmd|' /C calc'!A0"), escape_csv_cell("sky")
    ("'=cmd|' /C calc'!A0", 'sky')
    """
    escaped = escape_unprintable(text)
    return f"'{escaped}" if escaped.startswith(FORMULA_STARTS) else escaped


def restore_csv_cell(text: str) -> str:
    """The text of a cell that `escape_csv_cell` wrote.

    >>> restore_csv_cell(escape_csv_cell("-1.jpg"))
    '-1.jpg'
    """
    return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA_STARTS) else text


def escape_csv_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a CSV file whose text went through `escape_csv_cell`; numbers are kept."""
    return {name: escape_csv_cell(value) if isinstance(value, str) else value for name, value in row.items()}


def format_quantity(number: int, noun: str) -> str:
    """A number of things.

    >>> format_quantity(1, "step"), format_quantity(0, "worker")
    ('1 step', '0 workers')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_subject(number: int, singular: str, plural: str) -> str:
    """A number of things with a verb that agrees.

    >>> format_subject(1, "class is", "classes are"), format_subject(2, "class is", "classes are")
    ('1 class is', '2 classes are')
    """
    return f"{number} {singular if number == 1 else plural}"
