from __future__ import annotations

import numpy as np
import pytest

from semseg.data.classes import ClassTable
from semseg.reports.pictures import MAX_EDGE, draw_error_map, encode_strip, resize_nearest, shrink

CLASSES = ClassTable(("sky", "road", "car", "boat"), ((0, 0, 255), (128, 128, 128), (255, 0, 0), (0, 255, 0)))


def test_the_error_map_is_red_where_wrong_grey_where_right_and_striped_where_not_scored() -> None:
    image = np.full((8, 8, 3), (250, 100, 100), np.uint8)
    label = np.zeros((8, 8), int)
    prediction = np.zeros((8, 8), int)
    prediction[0] = 1
    label[4:] = -1
    drawn = draw_error_map(image, label, prediction)
    red, green, blue = drawn[0, 0].tolist()
    assert red > 3 * green and green == blue
    assert len(set(drawn[2, 2].tolist())) == 1 and drawn[2, 2, 0] < 150
    assert {tuple(pixel) for pixel in drawn[4:].reshape(-1, 3).tolist()} == {(20, 20, 20), (70, 70, 70)}


def test_pictures_are_shrunk_to_the_limit_and_never_enlarged() -> None:
    assert shrink(np.zeros((1000, 500, 3), np.uint8), MAX_EDGE).shape == (480, 240, 3)
    assert shrink(np.zeros((10, 20, 3), np.uint8), MAX_EDGE).shape == (10, 20, 3)


def test_class_maps_are_shrunk_without_new_values() -> None:
    ids = np.array([[0, 0, 9, 9], [0, 0, 9, 9], [5, 5, -1, -1], [5, 5, -1, -1]])
    assert resize_nearest(ids, 2, 2).tolist() == [[0, 9], [5, -1]]


def test_maps_of_another_size_than_the_image_are_rejected() -> None:
    with pytest.raises(ValueError, match="differ"):
        encode_strip(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), int), np.zeros((4, 4), int), CLASSES)
