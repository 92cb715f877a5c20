"""Write semseg/data/palette.csv, the colours of classes that have none of their own.

    python tools/make_palette.py semseg/data/palette.csv

Greedy selection from a 12 x 12 x 12 grid of sRGB colours: the next colour is the one whose nearest selected colour is
furthest away in OKLab, as seen with normal vision, or at half that distance as seen without red or green cones. Black
and white count as selected from the start (ignored pixels and text use them), and the darkest colours are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NUM_COLOURS = 512
LEVELS = 12  # values of each channel in the grid
MIN_LIGHTNESS = 0.4  # OKLab overrates how well dark colours are told apart
# Half the distance is enough for colour-blind viewers: more would cost everybody else too many colours.
COLOUR_BLIND_WEIGHT = 2.0
# Linear RGB as people without red (protanopia) or green (deuteranopia) cones see it: Vienot, Brettel and Mollon 1999.
PROTANOPIA = ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0))
DEUTERANOPIA = ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0))
# Linear RGB to OKLab: Ottosson 2020.
RGB_TO_CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
CONES_TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def select_colours(count: int = NUM_COLOURS) -> NDArray[np.int64]:
    """The first `count` colours (count, 3), sRGB 0..255."""
    levels = np.linspace(0, 255, LEVELS).round().astype(np.int64)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    linear = to_linear(grid)
    views = [to_oklab(linear)]
    for simulation in (PROTANOPIA, DEUTERANOPIA):
        views.append(COLOUR_BLIND_WEIGHT * to_oklab(np.clip(linear @ np.array(simulation).T, 0, 1)))
    lab = np.stack(views)  # (views, colours, 3)
    distance = np.minimum(distances_to(lab, 0), distances_to(lab, len(grid) - 1))  # to black and to white
    distance[lab[0, :, 0] < MIN_LIGHTNESS] = 0
    selected = []
    for _ in range(count):
        furthest = int(distance.argmax())
        selected.append(furthest)
        distance = np.minimum(distance, distances_to(lab, furthest))
    return grid[selected]


def distances_to(lab: NDArray[np.float64], index: int) -> NDArray[np.float64]:
    """Distance of every colour of (views, n, 3) to colour `index`: the smallest over the views."""
    # Rounded so that machines whose cube roots differ in the last bit select the same colours.
    return np.linalg.norm(lab - lab[:, index, None], axis=-1).min(axis=0).round(6)


def to_linear(rgb: NDArray[np.int64]) -> NDArray[np.float64]:
    """sRGB 0..255 to linear light 0..1."""
    value = rgb / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def to_oklab(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear RGB (..., 3) to OKLab, in which equal distances look equally different."""
    return np.cbrt(linear @ np.array(RGB_TO_CONES).T) @ np.array(CONES_TO_LAB).T


def palette_table(colours: NDArray[np.int64]) -> str:
    """The content of palette.csv."""
    return "R,G,B\n" + "".join(f"{red},{green},{blue}\n" for red, green, blue in colours.tolist())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(palette_table(select_colours()))
