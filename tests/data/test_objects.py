"""The sizes of objects in masks, and what of them training keeps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from helpers.command_line import TINY_NETWORK, run_here
from semseg.checks.dataset import NOTE, WARNING, ScannedSplit
from semseg.checks.objects import check_objects, find_quantile, kept_fraction, measure_kept, summarise_objects, view_of
from semseg.config.schema import DataConfig
from semseg.data.geometry import Size
from semseg.data.labels import resize_label, subsample_label
from semseg.data.objects import bin_side, measure_objects, side_bin
from semseg.data.records import Record
from semseg.data.scan import PairFacts

NAMES = ["background", "defect"]


def test_objects_are_connected_components_with_diagonals_and_specks_are_not_counted() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[10:18, 10:18] = 1
    mask[18:26, 18:26] = 1  # touches at a corner
    mask[50:58, 50:58] = 2
    mask[70, 70] = 2  # a speck
    found = measure_objects(mask)
    assert found[1] == {side_bin(128**0.5): 1}
    assert found[2] == {side_bin(8): 1}
    assert [round(bin_side(side_bin(side)), 1) for side in (8, 16, 100)] == [8.0, 16.0, 107.6]


def test_an_object_at_the_border_of_the_mask_is_counted_whole() -> None:
    mask = np.full((16, 16), 5, np.uint16)
    assert measure_objects(mask) == {5: {side_bin(16): 1}}
    assert measure_objects(np.arange(400, dtype=np.uint16).reshape(20, 20)) == {}  # ids of instances


@pytest.mark.parametrize(("side", "stride"), [(8, 16), (8, 8), (5, 8), (3, 4)])
def test_the_kept_fraction_is_that_of_labels_that_are_thinned_out(side: int, stride: int) -> None:
    kept = 0
    for top in range(stride):
        for left in range(stride):
            mask = np.zeros((4 * stride, 4 * stride), np.int16)
            mask[top : top + side, left : left + side] = 1
            kept += bool(subsample_label(mask, stride).any())
    assert kept / stride**2 == pytest.approx(kept_fraction(side, stride))


def test_resizing_to_short_edges_counts() -> None:
    """Squares of 8 pixels in images of 1024: 21 % are left at stride 8 with the default short edges, and 4 % at 16."""
    split = split_of(1024, {8: 50})
    for stride, expected in ((8, 0.21), (16, 0.04)):
        found = measure_kept(split, class_of, view_of(DataConfig(max_long_edge=1000), stride))[1]
        assert found == pytest.approx(expected, abs=0.03)
    rng, kept = np.random.default_rng(0), 0
    for _ in range(300):
        mask = np.zeros((1024, 1024), np.int16)
        top, left = rng.integers(0, 1016, 2)
        mask[top : top + 8, left : left + 8] = 1
        edge = int(rng.choice(DataConfig().short_edges))
        kept += bool((subsample_label(resize_label(mask, Size(edge, edge)), 8) == 1).any())
    assert kept / 300 == pytest.approx(0.21, abs=0.06)


def class_of(raw_id: int) -> int:
    return raw_id


def split_of(edge: int, sides: dict[int, int]) -> ScannedSplit:
    """A split of one image with squares of class 1 of these sides, by side."""
    record = Record("a.png", "b.png", Size(edge, edge), "list")
    objects = {1: {side_bin(side): count for side, count in sides.items()}, 0: {side_bin(edge): 1}}
    facts = PairFacts(edge, edge, "PNG RGB", "PNG L", {0: 1000, 1: 10}, {}, objects=objects)
    return ScannedSplit("train", [record], [facts], [])


def test_the_notice_names_the_class_what_is_lost_and_the_keys_that_keep_it() -> None:
    (notice,) = check_objects(split_of(1024, {8: 30, 9: 4}), class_of, NAMES, DataConfig(), 16)
    assert notice.level == WARNING
    assert "objects that leave no pixel in the labels of training" in notice.text
    assert "short edges 300/375/450/525/600, label stride 16): defect 95% of 34 (median side 8 px)" in notice.text
    assert "Of defect, model.label_stride=4 keeps" in notice.text
    assert "model.label_stride=1 keeps 100%" in notice.text
    assert "data.resize=native keeps 100%" in notice.text


def test_nothing_is_said_about_objects_that_are_kept_or_about_few_of_them() -> None:
    assert check_objects(split_of(1024, {100: 30}), class_of, NAMES, DataConfig(), 8) == []
    assert check_objects(split_of(1024, {8: 9}), class_of, NAMES, DataConfig(), 8) == []
    assert check_objects(split_of(1024, {8: 30}), class_of, NAMES, DataConfig(resize="native"), 4) == []
    (notice,) = check_objects(split_of(1024, {5: 30}), class_of, NAMES, DataConfig(resize="native"), 8)
    assert notice.level == WARNING
    assert "native resolution, label stride 8" in notice.text
    (notice,) = check_objects(split_of(1024, {7: 30}), class_of, NAMES, DataConfig(resize="native"), 8)
    assert notice.level == NOTE


def test_the_sizes_of_a_class_are_plain_numbers() -> None:
    _, row = summarise_objects(split_of(1024, {8: 10, 64: 10}), class_of, NAMES, view_of(DataConfig(), 4))
    assert (row.name, row.num_objects, row.median_side) == ("defect", 20, 8.0)
    assert find_quantile(Counter({2: 1, 3: 9}), 0.1) == 2


@pytest.mark.slow
def test_the_check_of_a_data_set_with_small_defects_says_what_is_lost(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for number in range(4):
        mask = np.zeros((600, 600), np.uint8)
        for index in range(12):
            top, left = 50 * index, int(rng.integers(0, 590))
            mask[top : top + 6, left : left + 6] = 1
        cv2.imwrite(str(tmp_path / "data" / "masks" / f"{number}.png"), mask)
        cv2.imwrite(str(tmp_path / "data" / "images" / f"{number}.png"), rng.integers(0, 255, (600, 600, 3), np.uint8))
    words = [
        "mode=check", "data=folder", "data.root=data", "data.num_classes=2", "data.first_id=0", "data.ignore=[]",
        "model/encoder=resnet18", *TINY_NETWORK, "model.encoder.weights=none", "model/decoder=c1", "run_dir=check",
    ]  # fmt: skip
    output = " ".join(run_here(tmp_path, *words).split())
    assert "objects that leave no pixel in the labels of training" in output
    assert "data.resize=native keeps 100%" in output
    output = " ".join(run_here(tmp_path, *words, "data.resize=native").split())
    assert "objects that leave no pixel" not in output
