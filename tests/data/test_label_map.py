"""From raw ids to class indices and back."""

from __future__ import annotations

import numpy as np
import pytest

from semseg.data.label_map import LabelMap
from semseg.errors import ConfigError, DataError


def test_by_default_ids_are_those_of_ade20k() -> None:
    index = LabelMap(num_classes=150)(np.array([[0, 1, 150]], np.uint8), "a.png")
    assert index.dtype == np.int16
    assert index.tolist() == [[-1, 0, 149]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_first_id_and_ignored_ids_can_be_set(dtype: type) -> None:
    label_map = LabelMap(num_classes=3, first_id=0, ignore=[255, 254])
    raw = np.array([[0, 2], [254, 255]], dtype)
    assert label_map(raw, "a.png").tolist() == [[0, 2], [-1, -1]]
    assert label_map.to_raw(np.array([0, 2])).tolist() == [0, 2]


def test_sixteen_bits_are_enough_for_a_thousand_classes() -> None:
    assert LabelMap(num_classes=1000)(np.array([1000], np.uint16), "a.png").tolist() == [999]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_an_unknown_id_names_file_ids_and_keys(dtype: type) -> None:
    raw = np.array([1, 2, 3, 151, 151, 160], dtype)
    with pytest.raises(DataError, match=r"a\.png: label ids 151 \(2 pixels\), 160 \(1 pixels\) are neither") as caught:
        LabelMap(num_classes=150)(raw, "a.png")
    for key in ("data.num_classes=150", "data.first_id=1", "data.ignore=[0]", "1..150"):
        assert key in str(caught.value)


@pytest.mark.parametrize("worst", [-1, 70000])
def test_ids_beyond_sixteen_bits_are_unknown(worst: int) -> None:
    with pytest.raises(DataError, match=rf"label ids {worst} \(1 pixels\)"):
        LabelMap(num_classes=3)(np.array([1, worst], np.int32), "a.png")


def test_an_id_cannot_be_a_class_and_ignored() -> None:
    with pytest.raises(ConfigError, match=r"data.ignore contains 0, but data.first_id=0"):
        LabelMap(num_classes=3, first_id=0)


@pytest.mark.parametrize("numbers", [(0, 1, (0,)), (40000, 1, (0,)), (3, -1, ()), (3, 65534, ()), (3, 1, (-1,))])
def test_numbers_that_do_not_fit_are_refused(numbers: tuple[int, int, tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match=r"data\.num_classes=.* is out of range"):
        LabelMap(*numbers)


def test_checking_ids_refuses_what_translating_refuses() -> None:
    label_map = LabelMap(3, first_id=5, ignore=[0, 255])
    for known in ([5, 6, 7], [0, 5, 255], [7]):
        label_map.check_ids(np.array([known], np.uint8), "a.png")
    for unknown in ([4, 5], [0, 3, 255], [8], [-1, 5], [70000, 5]):
        with pytest.raises(DataError, match="label ids"):
            label_map.check_ids(np.array([unknown], np.int32), "a.png")


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ([3], r"data\.ignore contains 3, which data\.map makes a class"),
        ([-1], r"data\.ignore: -1 is out of range: raw ids are 0 to 65535"),
        ([70000], r"data\.ignore: 70000 is out of range"),
    ],
)
def test_ignored_ids_beside_a_map_must_be_others_and_in_range(ignore: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LabelMap(3, ids={1: 0, 2: 1, 3: 2}, ignore=ignore)
    LabelMap(2, ids={0: 0, 1: 1})  # 0 is ignored by default, and may be a class
