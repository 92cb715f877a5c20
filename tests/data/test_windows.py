"""Images that are read by window, and the plans of windows that cover an image."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.random import default_rng

from semseg.data.geometry import Size
from semseg.data.windows import WholeImage, Window, WindowReader, blend_weights, check_inside, plan_window_rows


def test_a_whole_image_gives_views_of_its_pixels() -> None:
    pixels = default_rng(1).integers(0, 255, (40, 30, 3), np.uint8)
    reader: WindowReader = WholeImage(pixels)
    assert (reader.height, reader.width, reader.num_bands, reader.dtype) == (40, 30, 3, np.uint8)
    window = reader.read(10, 5, height=8, width=20)
    assert np.array_equal(window, pixels[10:18, 5:25])
    assert window.base is pixels


@pytest.mark.parametrize("window", [(0, 0, 41, 30), (-1, 0, 5, 5), (0, 26, 5, 5), (3, 3, 0, 5)])
def test_a_window_outside_the_image_is_a_defect(window: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="not inside an image of 40 x 30 pixels"):
        WholeImage(np.zeros((40, 30, 3), np.uint8)).read(*window)


@pytest.mark.parametrize("case", range(60))
def test_windows_cover_every_pixel_and_finished_rows_are_touched_by_no_later_window(case: int) -> None:
    rng = default_rng(case)
    size = Size(int(rng.integers(1, 90)), int(rng.integers(1, 90)))
    side = int(rng.integers(1, 70))
    covered = np.zeros(size, int)
    finished = 0
    for row in plan_window_rows(size, side, int(rng.integers(1, side + 1))):
        for window in row.windows:
            check_inside(window, size)
            assert window.top >= finished
            covered[window.top : window.top + window.height, window.left : window.left + window.width] += 1
        assert finished < row.finished
        finished = row.finished
        assert covered[:finished].all()
    assert finished == size.height


def test_one_window_is_the_whole_of_a_small_image() -> None:
    (row,) = plan_window_rows(Size(20, 64), side=64, step=32)
    assert row.windows == (Window(0, 0, 20, 64),)
    assert row.finished == 20


def test_the_weights_of_windows_are_symmetric_whole_numbers_of_at_least_1() -> None:
    for length in (1, 2, 31, 512):
        weights = blend_weights(length)
        assert np.array_equal(weights, weights[::-1])
        assert np.array_equal(weights, np.round(weights))
        assert weights.min() == 1
