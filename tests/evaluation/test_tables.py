from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console
from rich.table import Table

from semseg.config.schema import MIOU_RULES
from semseg.data.classes import ClassTable
from semseg.errors import DataError
from semseg.evaluation.bootstrap import ConfidenceIntervals
from semseg.evaluation.evaluator import ImageRecord, Speed, SplitCounts, shrink_maps
from semseg.evaluation.image_files import decode_maps, encode_maps, read_class_maps, read_image_counts
from semseg.evaluation.metrics import Counts, scores_from
from semseg.evaluation.result import EvaluationResult, build_result, relative_name
from semseg.evaluation.result_files import write_result_files
from semseg.evaluation.tables import (
    class_score_table,
    describe_rule,
    format_speed,
    scales_table,
    select_rows,
    summary_table,
)

CLASSES = ClassTable.from_names(["sky", "road", "boat"])
MATRIX = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])  # the boat is neither labelled nor predicted
SPEED = Speed(2.5, {"reading": 0.01, "network": 0.3, "scoring": 0.09})
COUNTS = np.array([[3, 4, 0], [4, 4, 0], [3, 5, 0]], np.int32)  # correct, labelled, predicted
MAPS = encode_maps(np.array([[0, 1], [-1, 2]]), np.array([[0, 0], [1, 2]]))
IMAGES = [
    ImageRecord(0, "/data/images/a.jpg", 2, 2, 0.75, 0.5, 0.4, COUNTS, MAPS),
    ImageRecord(1, "/elsewhere/b.jpg", 2, 2, None, None, 0.2, np.zeros_like(COUNTS), None),
]


def result(intervals: ConfidenceIntervals | None = None) -> EvaluationResult:
    counts = SplitCounts([Counts(MATRIX, 2), Counts(torch.diag(torch.tensor([4, 4, 0])), 2)], None, IMAGES, SPEED)
    return build_result(
        counts,
        CLASSES,
        [7, 8, 11],
        rule="present",
        root=Path("/data"),
        subsets=[[450]],
        intervals=intervals,
    )


def text_of(table: Table) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.reliability
def test_c13_the_table_has_a_row_for_each_class_and_says_what_was_not_scored() -> None:
    rows = {
        line.split("│")[1].strip(): line
        for line in text_of(class_score_table(result(), "a title")).splitlines()
        if "│" in line
    }
    assert "75.00" in rows["sky"] and "50.00" in rows["sky"]  # IoU 3/4, half of the pixels
    assert "80.00" in rows["road"] and "100.00" in rows["road"]
    assert rows["boat"].count("n/a") == 4


def test_only_the_best_and_the_worst_of_many_classes_are_shown() -> None:
    best, worst = select_rows([index / 100 for index in range(100)], [1] * 100)
    assert best == list(range(99, 79, -1)) and worst == list(range(19, -1, -1))
    assert select_rows([None] * 40, [0] * 40) == (list(range(40)), [])


def test_the_largest_classes_without_any_overlap_are_the_worst() -> None:
    pixels = [1000 if position == 3 else position for position in range(100)]
    _, worst = select_rows([0.0 if position < 90 else 0.5 for position in range(100)], pixels)
    assert worst == [*range(71, 90), 3]


def test_the_summary_gives_the_mean_under_every_rule_and_names_the_absent() -> None:
    text = text_of(summary_table(result(ConfidenceIntervals(100, (0.7, 0.8), None))))
    assert "95 % interval 70.00 to 80.00" in text
    assert "77.50" in text  # (0.75 + 0.80) / 2
    assert "51.67" in text and "over all 3 classes; an absent class counts as 0; 1 absent: boat" in text


def test_the_rules_are_listed_only_if_they_differ() -> None:
    some_absent = result()
    none_absent = some_absent._replace(scores_by_rule=[scores_from(torch.eye(3).long(), rule) for rule in MIOU_RULES])
    assert "ground_truth" in text_of(summary_table(some_absent))
    assert "ground_truth" not in text_of(summary_table(none_absent))


def test_each_rule_is_described() -> None:
    for score, averaged in zip(result().rule_scores, ("all 3", "2 of 3", "2 of 3"), strict=True):
        assert averaged in describe_rule(score, 3) and "1 absent: boat" in describe_rule(score, 3)
        assert "no class is absent" in describe_rule(score._replace(absent=()), 3)


def test_each_subset_of_the_scales_has_a_row() -> None:
    text = text_of(scales_table(result(), [300, 450]))
    assert "300, 450" in text and "77.50" in text and "100.00" in text


def test_the_speed_lists_the_time_of_each_stage() -> None:
    text = format_speed(SPEED)
    assert "2.50 images per second" in text
    assert "reading 10.0 ms, network 300.0 ms, scoring 90.0 ms" in text


def test_files_hold_the_numbers_and_null_for_what_was_not_scored(tmp_path: Path) -> None:
    metrics, classes, images, confusion, *_ = write_result_files(tmp_path, result(), {"split": "val"})
    content = json.loads(metrics.read_text())
    assert (content["split"], content["pixel_accuracy"], content["mean_iou"]) == ("val", 0.875, (0.75 + 0.8) / 2)
    assert content["classes"][2]["iou"] is None
    assert content["mean_iou_by_rule"]["ade20k"]["absent"] == ["boat"]
    assert content["also_scales"][0]["scales"] == [450] and content["also_scales"][0]["mean_iou"] == 1.0
    rows = list(csv.DictReader(classes.open()))
    assert [row["name"] for row in rows] == ["sky", "road", "boat"]
    assert rows[0]["iou"] == "0.75" and rows[2]["iou"] == ""
    assert [row["id"] for row in rows] == ["7", "8", "11"]
    rows = list(csv.DictReader(images.open()))
    assert [row["file"] for row in rows] == ["images/a.jpg", "/elsewhere/b.jpg"]
    assert rows[1]["mean_iou"] == ""
    saved = np.load(confusion)
    assert saved["matrix"].tolist() == MATRIX.tolist() and saved["names"].tolist() == ["sky", "road", "boat"]
    assert saved["ids"].tolist() == [7, 8, 11]


def test_what_a_comparison_needs_of_each_image_is_written_and_read_back(tmp_path: Path) -> None:
    *_, counts_path, maps_path = write_result_files(tmp_path, result(), {})
    read = read_image_counts(counts_path, 3)
    assert read is not None and read.files == ("images/a.jpg", "/elsewhere/b.jpg")
    assert np.array_equal(read.counts, [COUNTS, np.zeros_like(COUNTS)])
    (row, encoded), *others = read_class_maps(maps_path).items()
    maps = decode_maps(encoded, 3)
    assert row == 0 and not others
    assert maps.label.tolist() == [[0, 1], [-1, 2]] and maps.prediction.tolist() == [[0, 0], [1, 2]]
    assert read_class_maps(tmp_path / "none.zip") == {}
    assert read_image_counts(tmp_path / "none.npz", 3) is None


def test_damaged_files_of_images_are_named(tmp_path: Path) -> None:
    *_, counts_path, maps_path = write_result_files(tmp_path, result(), {})
    with pytest.raises(DataError, match=r"per_image\.npz"):
        read_image_counts(counts_path, 2)
    with pytest.raises(ValueError, match="2 classes"):
        decode_maps(MAPS, 2)
    for path in (counts_path, maps_path):
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"per_image\.npz"):
        read_image_counts(counts_path, 3)
    with pytest.raises(DataError, match=r"class_maps\.zip"):
        read_class_maps(maps_path)


def test_maps_of_many_classes_and_large_images_are_small() -> None:
    label = torch.arange(300).repeat_interleave(4).reshape(1, 1200).repeat(900, 1)
    maps = shrink_maps(label, label)
    values = cv2.imdecode(np.frombuffer(maps.label, np.uint8), cv2.IMREAD_UNCHANGED)
    assert values.shape == (240, 320) and values.max() == 300  # class 299, by the pixels under the centres
    assert np.array_equal(values[0], 1 + (np.arange(320) + 0.5) * 3.75 // 4)


def test_an_image_is_named_by_its_path_in_the_data_set() -> None:
    assert relative_name("/data/x/../images/a.jpg", Path("/data")) == "images/a.jpg"
