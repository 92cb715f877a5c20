"""Sizes equal those of the 2018 code, pixel by pixel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semseg.data.geometry import Size, canvas_size, label_size, round_up, scaled_size, stretched_size

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/dataset_shapes.json").read_text())
MAX_LONG_EDGE = 1000


def test_every_training_size_is_the_published_one() -> None:
    assert len(GOLDEN["train"]) == 168
    for case in GOLDEN["train"]:
        scaled = scaled_size(Size(*case["size"]), case["short"], MAX_LONG_EDGE)
        canvas = canvas_size([scaled], case["padding"])
        label = label_size(canvas, case["label_stride"])
        assert [list(scaled), list(canvas), list(label)] == [case["resized"], case["batch"], case["label"]], case


def test_every_evaluation_size_is_the_published_one() -> None:
    assert sum(len(case["inputs"]) for case in GOLDEN["val"]) == 120
    for case in GOLDEN["val"]:
        for short_edge, expected in case["inputs"].items():
            size = stretched_size(Size(*case["size"]), int(short_edge), MAX_LONG_EDGE, case["padding"])
            assert list(size) == expected, case


def test_every_sub_batch_has_the_published_canvas() -> None:
    for case in GOLDEN["batches"]:
        sizes = [Size(*GOLDEN["images"][name]) for name in case["members"]]
        canvas = canvas_size([scaled_size(size, case["short"], MAX_LONG_EDGE) for size in sizes], case["padding"])
        assert [len(sizes), 3, *canvas] == case["image"]
        assert [len(sizes), *label_size(canvas, case["label_stride"])] == case["label"]


@pytest.mark.parametrize("case", GOLDEN["float_truncation"], ids=lambda case: "x".join(map(str, case["size"])))
def test_sizes_lose_the_same_pixel_by_truncation(case: dict) -> None:
    size = scaled_size(Size(*case["size"]), case["short"], MAX_LONG_EDGE)
    assert list(size) == case["original"] != case["exact_arithmetic"]


def test_long_edge_wins_when_the_image_is_a_panorama() -> None:
    assert scaled_size(Size(100, 1000), short_edge=300, max_long_edge=1000) == Size(100, 1000)


def test_a_strip_keeps_at_least_one_pixel() -> None:
    assert scaled_size(Size(10000, 5), short_edge=450, max_long_edge=1000) == Size(1000, 1)


def test_round_up_leaves_multiples_alone() -> None:
    assert [round_up(length, 32) for length in (1, 31, 32, 33)] == [32, 32, 32, 64]


@pytest.mark.parametrize(("length", "multiple"), [(0, 8), (8, 0), (-1, 8)])
def test_round_up_refuses_numbers_below_one(length: int, multiple: int) -> None:
    with pytest.raises(ValueError, match="above 0"):
        round_up(length, multiple)


def test_a_label_stride_that_does_not_divide_the_canvas_is_refused() -> None:
    with pytest.raises(ValueError, match="label_stride 5"):
        label_size(Size(32, 64), label_stride=5)
