"""The sizes of objects in a mask: its connected components, class by class. For mode=check."""

from __future__ import annotations

import math
from collections import Counter

import cv2
import numpy as np
from numpy.typing import NDArray

BINS_PER_OCTAVE = 4  # sides are counted in bins, each 19 % longer than the one before
MIN_AREA = 9  # pixels: smaller components are specks at the borders of others
MAX_IDS = 256  # a mask with more ids is taken for one of instances, whose sizes are not measured


def measure_objects(raw: NDArray[np.integer]) -> dict[int, dict[int, int]]:
    """The objects of every id in a mask (H, W): bin of the side -> number of objects.

    An object is a connected component (with diagonals) of at least MIN_AREA pixels; its side is that of a square of
    the same area, in pixels.

    >>> mask = np.zeros((40, 40), np.uint8)
    >>> mask[4:12, 4:12] = mask[20:28, 20:28] = 1
    >>> measure_objects(mask)[1] == {side_bin(8): 2}
    True
    """
    ids = np.unique(raw).tolist()
    if len(ids) > MAX_IDS:
        return {}
    found: dict[int, dict[int, int]] = {}
    for raw_id in ids:
        is_id = (raw == raw_id).astype(np.uint8)
        top, left, height, width = find_box(is_id)
        inside = is_id[top : top + height, left : left + width]
        *_, stats, _ = cv2.connectedComponentsWithStats(inside, connectivity=8)
        areas = stats[1:, cv2.CC_STAT_AREA]
        sides = Counter(side_bin(math.sqrt(area)) for area in areas.tolist() if area >= MIN_AREA)
        if sides:
            found[int(raw_id)] = dict(sorted(sides.items()))
    return found


def find_box(is_id: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the box around the pixels of a mask (H, W) that are not 0; it has some."""
    left, top, width, height = cv2.boundingRect(is_id)
    return top, left, height, width


def side_bin(side: float) -> int:
    """The bin of a side in pixels."""
    return round(BINS_PER_OCTAVE * math.log2(side))


def bin_side(number: int) -> float:
    """The side in the middle of a bin, in pixels."""
    return 2 ** (number / BINS_PER_OCTAVE)
