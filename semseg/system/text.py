"""Text that comes from files, made safe for terminals and spreadsheets."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

# Controls, unpaired surrogates, line and paragraph separators, and the marks that turn the direction of text.
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
TURNING = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how spreadsheets recognise formulas


def printable(text: object) -> str:
    r"""One line of text that moves no cursor, changes no colour and hides nothing; other characters are escaped.

    >>> printable("sky\x1b[31m\n")
    'sky\\x1b[31m\\n'
    """
    return "".join(
        character.encode("unicode_escape", "surrogatepass").decode() if is_unprintable(character) else character
        for character in str(text)
    )


def is_unprintable(character: str) -> bool:
    return unicodedata.category(character) in UNPRINTABLE or character in TURNING


def shortened(value: object) -> str:
    """The start of what `value` looks like, for messages."""
    text = repr(value)
    return printable(text if len(text) <= 80 else f"{text[:80]}...")


def lines_printable(text: object) -> str:
    """`printable` for messages of several lines: line breaks and tabs stay."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in str(text).split("\n"))


def cell(text: object) -> str:
    """Text for a cell of a CSV file: a spreadsheet shows it, and never runs it as a formula.

    >>> cell("=cmd|' /C calc'!A0"), cell("sky")
    ("'=cmd|' /C calc'!A0", 'sky')
    """
    shown = printable(text)
    return f"'{shown}" if shown.startswith(FORMULA) else shown


def row_of_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a CSV file with its texts as `cell` writes them; numbers stay."""
    return {name: cell(value) if isinstance(value, str) else value for name, value in row.items()}
