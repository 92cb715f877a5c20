"""Colours for classes that have none of their own: the rows of palette.csv, which tools/make_palette.py wrote."""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path

Colour = tuple[int, int, int]  # red, green, blue, each 0..255


@lru_cache(maxsize=1)
def _load_palette() -> tuple[Colour, ...]:
    with Path(__file__).with_name("palette.csv").open(newline="") as file:
        return tuple((int(row["R"]), int(row["G"]), int(row["B"])) for row in csv.DictReader(file))


def generated_palette(num_classes: int) -> tuple[Colour, ...]:
    """Colours that are easy to tell apart; none is black or white.

    Classes with neighbouring ids differ clearly. The first 24 also differ for viewers with colour blindness. The
    colours of K classes are the first K of any longer palette. The table has 512 rows; later classes repeat them.

    >>> generated_palette(2)
    ((196, 0, 255), (216, 59, 0))
    """
    table = _load_palette()
    return tuple(table[index % len(table)] for index in range(num_classes))
