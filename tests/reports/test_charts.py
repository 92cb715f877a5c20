from __future__ import annotations

import re

import numpy as np

from semseg.reports.charts import (
    TOP,
    Line,
    Mark,
    average_points,
    draw_distribution,
    draw_heat_map,
    draw_histogram,
    draw_line_chart,
    round_ticks,
)


def test_the_histogram_counts_every_image_once() -> None:
    drawn = draw_histogram([0.0, 0.02, 0.5, 1.0], "scores")
    assert "0 to 5 %: 2 images" in drawn and "50 to 55 %: 1 image<" in drawn and "95 to 100 %: 1 image<" in drawn
    assert "median: 26 %" in drawn


def test_the_groups_of_a_histogram_are_on_top_of_each_other() -> None:
    drawn = draw_distribution({"train": [7, 8, 8, 8], "val": [8]}, "ids", "different ids", "different ids")
    assert "train, 8 different ids: 3 images" in drawn and "val, 8 different ids: 1 image<" in drawn
    assert drawn.count('class="bar line-0"') == 2 and drawn.count('class="bar line-1"') == 1
    assert ">7</text>" in drawn and "7.2" not in drawn  # whole numbers have a bin each
    top = re.search(r'class="bar line-1"[^>]* y="([\d.]+)"', drawn)
    assert top is not None and float(top[1]) == TOP  # the four images of 8 fill the height


def test_a_flat_curve_and_a_single_point_can_be_drawn() -> None:
    flat = draw_line_chart([Line("loss", (1, 2), (0.0, 0.0))], "loss", "step")
    assert "polyline" in flat and "nan" not in flat
    assert "circle" in draw_line_chart([Line("loss", (1,), (2.0,))], "loss", "step")


def test_validations_are_dots_and_the_best_one_has_a_line() -> None:
    lines = [
        Line("train", (0, 5, 10), (3.0, 2.0, 1.0)),
        Line("val", (5, 10), (2.5, 1.5), has_dots=True),
    ]
    drawn = draw_line_chart(lines, "loss", "step", limits=(0, 20), mark=Mark(10, "best: epoch 2"))
    assert drawn.count("<circle") == 2 and "val: 2.5 at 5" in drawn
    middle = (46 + 440 - 14) / 2  # 10 of 20
    assert f'class="best" x1="{middle:g}"' in drawn and "best: epoch 2" in drawn


def test_long_curves_are_averaged_in_groups() -> None:
    line = average_points(Line("loss", tuple(range(10)), tuple(range(10))), max_points=5)
    assert line.x == line.y == (0.5, 2.5, 4.5, 6.5, 8.5)


def test_ticks_are_round_numbers_inside_the_range() -> None:
    assert round_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert round_ticks(130, 171, 4) == [140, 160]
    assert round_ticks(3, 3) == [3]


def test_cells_of_the_heat_map_have_tooltips() -> None:
    drawn = draw_heat_map(np.array([[0.7, 0.3], [0.0001, 0.0]]), ["sky", "<b>"], "confusion")
    assert "sky predicted as &lt;b&gt;: 30.0 % of its pixels" in drawn
    assert "&lt;b&gt; predicted as sky: &lt;0.1 % of its pixels" in drawn
