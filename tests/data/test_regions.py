"""Polygons and run lengths: one rule for drawing, COCO's encodings as pycocotools has them, Label Studio's brush."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from semseg.data.brush_runs import decode_brush, encode_brush
from semseg.data.geometry import Size
from semseg.data.regions import (
    Patch,
    decode_runs,
    decode_text,
    encode_patch_runs,
    encode_runs,
    encode_text,
    fill_disc,
    fill_rings,
    trace_rings,
    unite,
)


def whole(patch: Patch, size: Size) -> NDArray[np.bool_]:
    """The patch in its image."""
    mask = np.zeros(size, np.bool_)
    mask[patch.top : patch.top + patch.mask.shape[0], patch.left : patch.left + patch.mask.shape[1]] = patch.mask
    return mask


def plainly_inside(rings: list[NDArray[np.float64]], size: Size) -> NDArray[np.bool_]:
    """Every pixel centre by itself: a ray to the left crosses an odd number of edges."""
    y, x = np.mgrid[: size.height, : size.width] + 0.5
    crossings = np.zeros(size, int)
    for ring in rings:
        for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if y1 != y2:
                spans = (np.minimum(y1, y2) <= y) & (y < np.maximum(y1, y2))
                crossings += spans & (x >= x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return crossings % 2 == 1


def test_a_polygon_is_the_pixels_whose_centres_are_inside_an_odd_number_of_rings() -> None:
    chance = np.random.default_rng(0)
    for number in range(300):
        size = Size(*chance.integers(1, 40, 2).tolist())
        rings = [chance.uniform(-10, 50, (chance.integers(3, 9), 2)) for _ in range(chance.integers(1, 4))]
        if number % 3 == 0:
            rings = [np.round(ring) for ring in rings]
        assert np.array_equal(whole(fill_rings(rings, size), size), plainly_inside(rings, size))


def test_areas_are_unbiased_and_neighbours_share_no_pixel() -> None:
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    for radius in (3, 8, 20, 80):
        ring = 100.3 + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        own = fill_rings([ring], Size(200, 200)).area
        oracle = int(coco_mask.area(coco_mask.frPyObjects([ring.ravel().tolist()], 200, 200))[0])  # pyright: ignore
        assert abs(own - np.pi * radius**2) < 0.02 * np.pi * radius**2 + 2
        assert abs(own - oracle) <= 6 + radius / 3
    left, right = (
        np.array([[0.0, 0], [10.3, 0], [4.7, 20], [0, 20]]),
        np.array([[10.3, 0], [20, 0], [20, 20], [4.7, 20]]),
    )
    sides = [whole(fill_rings([ring], Size(20, 20)), Size(20, 20)) for ring in (left, right)]
    assert (sides[0].astype(int) + sides[1] == 1).all()


@pytest.mark.parametrize("ring", [[[0, 0], [1, 1]], [[0, 0], [np.nan, 1], [1, 1]], [[0, 0], [1e300, 1], [1, 1]]])
def test_numbers_that_are_no_polygon_are_refused(ring: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="a polygon has"):
        fill_rings([np.array(ring, float)], Size(10, 10))


def test_a_polygon_with_absurdly_many_long_edges_is_refused_instead_of_filling_the_memory() -> None:
    zigzag = np.array([[0, 0], [1, 10_000], [2, 0]] * 12_000, float)
    with pytest.raises(ValueError, match="too many long edges"):
        fill_rings([zigzag], Size(10_000, 10))


def test_an_ellipse_is_the_pixels_whose_centres_are_inside() -> None:
    y, x = np.mgrid[:30, :40] + 0.5
    expected = ((x - 12.2) / 7) ** 2 + ((y - 3.9) / 9) ** 2 <= 1
    assert np.array_equal(whole(fill_disc(12.2, 3.9, 7, 9, Size(30, 40)), Size(30, 40)), expected)
    united = unite(
        [fill_disc(5, 5, 2, 2, Size(30, 40)), fill_disc(30, 20, 2, 2, Size(30, 40)), fill_rings([], Size(1, 1))]
    )
    assert united.area == 2 * fill_disc(5, 5, 2, 2, Size(30, 40)).area


def oracle_text(mask: NDArray[np.bool_]) -> str:
    return str(coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"], "ascii")  # pyright: ignore


def test_run_lengths_and_outlines_of_random_masks_are_those_of_pycocotools() -> None:
    chance = np.random.default_rng(0)
    for _ in range(200):
        size = Size(*chance.integers(1, 30, 2).tolist())
        mask = chance.random(size) < chance.random()
        counts, text = encode_runs(mask), oracle_text(mask)
        assert encode_text(counts) == text and decode_text(text).tolist() == counts
        assert np.array_equal(decode_runs(counts, size), mask)
        rings = [ring.astype(float) for ring in trace_rings(mask)]
        assert np.array_equal(whole(fill_rings(rings, size), size), mask)
        top, left = chance.integers(0, size.height), chance.integers(0, size.width)
        patch = Patch(int(top), int(left), mask[top:, left:])
        assert encode_patch_runs(patch, size) == encode_runs(whole(patch, size))
        assert np.array_equal(decode_brush(bytes(encode_brush(mask)), size), mask)


@pytest.mark.parametrize("text", ["", "zz", "o", "\x7f0", "P" * 40, "é0"])
def test_damaged_text_of_run_lengths_never_gives_a_mask(text: str) -> None:
    with pytest.raises(ValueError, match="run lengths"):
        decode_runs(decode_text(text), Size(4, 5))


@pytest.mark.parametrize("counts", [[3, 4], [30, -10], [10.0, 10], [2**62, 2**62, 20], [[20]], []])
def test_run_lengths_must_sum_to_the_pixels(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="run lengths"):
        decode_runs(counts, Size(4, 5))


def test_a_brush_may_list_values_one_by_one_and_is_alpha() -> None:
    alpha = [0, 255, 1, 0, 0, 7]
    bits = f"{24:032b}{8 - 1:05b}" + "".join(f"{bits - 1:04b}" for bits in (3, 4, 8, 16))
    for position in range(0, 6, 2):  # runs of two pixels, 8 values
        values = [value for each in alpha[position : position + 2] for value in (9, 0, 9, each)]
        bits += f"000{8 - 1:03b}" + "".join(f"{value:08b}" for value in values)
    data = np.packbits([int(bit) for bit in bits]).tobytes()
    assert decode_brush(data, Size(2, 3)).tolist() == [[False, True, True], [False, False, True]]
    for damaged in (data[:-1], data[:5], b"", data[:4] + b"\0" + data[5:], b"\xff" * 30):
        with pytest.raises(ValueError, match="brush"):
            decode_brush(damaged, Size(2, 3))
    with pytest.raises(ValueError, match="for 24 values"):
        decode_brush(data, Size(2, 4))
