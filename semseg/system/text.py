"""Text that comes from files, made safe for terminals and spreadsheets."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

# Controls, unpaired surrogates, line and paragraph separators, and the marks that turn the direction of text.
UNPRINTABLE_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
DIRECTION_MARKS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # how spreadsheets recognise formulas


def escape_unprintable(text: object) -> str:
    r"""One line of text that moves no cursor, changes no colour and hides nothing; other characters are escaped.

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
    """The start of what `value` looks like, for messages."""
    text = repr(value)
    return escape_unprintable(text if len(text) <= 80 else f"{text[:80]}...")


def escape_lines(text: object) -> str:
    """`escape_unprintable` for messages of several lines: line breaks and tabs stay."""
    return "\n".join("\t".join(map(escape_unprintable, line.split("\t"))) for line in str(text).split("\n"))


def escape_csv_cell(text: object) -> str:
    """Text for a cell of a CSV file: a spreadsheet shows it, and never runs it as a formula.

    >>> escape_csv_cell("=cmd|' /C calc'!A0"), escape_csv_cell("sky")
    ("'=cmd|' /C calc'!A0", 'sky')
    """
    shown = escape_unprintable(text)
    return f"'{shown}" if shown.startswith(FORMULA_STARTS) else shown


def escape_csv_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a CSV file with its texts as `escape_csv_cell` writes them; numbers stay."""
    return {name: escape_csv_cell(value) if isinstance(value, str) else value for name, value in row.items()}
