"""Colours as one number, and those of classes that have none: palette.csv, which tools/make_palette.py wrote."""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]  # red, green, blue, each 0..255


def pack_colours(pixels: NDArray[np.integer]) -> NDArray[np.uint32]:
    """RGB pixels (..., 3), 0..255, as one number each (...): 0xRRGGBB."""
    return pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)


def unpack_colour(packed: int) -> Colour:
    """The colour of a number 0xRRGGBB.

    >>> unpack_colour(0x01FF00)
    (1, 255, 0)
    """
    return packed >> 16, packed >> 8 & 255, packed & 255


def voc_colour(index: int) -> Colour:
    """The colour of a class in Pascal VOC: the bits of its index, spread over the channels.

    >>> voc_colour(1), voc_colour(15)
    ((128, 0, 0), (192, 128, 128))
    """
    channels = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            channels[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return channels[0], channels[1], channels[2]


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
