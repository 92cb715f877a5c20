from __future__ import annotations

import numpy as np
import pytest

from semseg.data.classes import ClassTable
from semseg.reports.draw import (
    MIN_PANEL_WIDTH,
    add_legend,
    class_shares,
    colour_class_map,
    draw_legend,
    draw_overlay,
    draw_panel,
    find_borders,
    format_share,
)

CLASSES = ClassTable(("sky", "road", "car"), ((0, 0, 255), (128, 128, 128), (255, 0, 0)))


def test_unscored_pixels_are_black() -> None:
    assert colour_class_map(np.array([[0, -1, 2]]), CLASSES).tolist() == [[[0, 0, 255], [0, 0, 0], [255, 0, 0]]]


def test_shares_are_fractions_of_all_pixels_the_largest_first() -> None:
    shares = class_shares(np.array([[2, 2, 2, 0, -1]]), CLASSES)
    assert [(share.name, share.share) for share in shares] == [("car", 0.6), ("sky", 0.2)]


def test_borders_are_between_classes_only() -> None:
    assert find_borders(np.array([[0, 0, 1], [0, 0, 1]])).tolist() == [[False, True, False], [False, True, False]]


def test_the_overlay_mixes_image_and_colour() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    mixed = draw_overlay(image, np.zeros((2, 2), int), CLASSES, opacity=0.5)
    assert mixed[0, 0].tolist() == [50, 50, 178]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (40, 300), (300, 40), (700, 900)])
def test_a_panel_fits_image_overlay_and_legend_at_any_size(height: int, width: int) -> None:
    ids = np.arange(height * width).reshape(height, width) % 3
    picture = draw_panel(np.zeros((height, width, 3), np.uint8), ids, CLASSES)
    assert picture.shape[1] >= min(MIN_PANEL_WIDTH, 2 * width)
    assert picture.shape[1] % (2 * width) == 0
    assert picture.shape[0] > height


@pytest.mark.parametrize(("height", "width"), [(20000, 8), (20000, 1), (8, 20000)])
def test_long_pictures_and_their_legends_stay_small(height: int, width: int) -> None:
    classes = ClassTable(tuple(f"class {index}" for index in range(150)), ((0, 0, 0),) * 150)
    image, ids = np.zeros((height, width, 3), np.uint8), np.arange(height * width).reshape(height, width) % 150
    for picture, sides in ((draw_panel(image, ids, classes), 2), (add_legend(image, ids, classes), 1)):
        assert picture.shape[1] >= sides * MIN_PANEL_WIDTH / 2
        assert picture.shape[0] * picture.shape[1] < sides * (240 * height + 5_000_000)


def test_the_legend_shows_every_class_present_in_its_colour() -> None:
    strip = draw_legend(class_shares(np.array([[0, 1, 2]]), CLASSES), CLASSES, 600, 12)
    colours = {tuple(pixel) for pixel in strip.reshape(-1, 3).tolist()}
    assert set(CLASSES.palette) <= colours


def test_an_image_of_another_size_is_rejected() -> None:
    with pytest.raises(ValueError, match="differ in size"):
        draw_panel(np.zeros((3, 4, 3), np.uint8), np.zeros((4, 3), int), CLASSES)


def test_small_shares_are_not_shown_as_zero() -> None:
    assert format_share(0.0001) == "<0.1 %"
