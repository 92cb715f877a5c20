from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from rich.console import Console

from semseg.data.classes import ClassTable
from semseg.metrics import scores_from
from semseg.report import rule_in_words, score_table, write_scores

CLASSES = ClassTable.generated(["sky", "road", "boat"])
SCORES = scores_from(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), "present")


def test_the_table_names_classes_and_says_what_the_mean_is_over() -> None:
    console = Console(width=100, record=True, quiet=False, file=None)
    with console.capture() as capture:
        console.print(score_table(SCORES, CLASSES, "a title"))
    text = capture.get()
    assert "boat" in text and "n/a" in text
    assert "75.00" in text and "80.00" in text and "87.50" in text
    assert "2 of 3 classes" in text


def test_each_rule_is_put_into_words() -> None:
    matrix = torch.eye(3, dtype=torch.int64)
    for rule in ("ade20k", "present", "ground_truth"):
        assert "3 classes" in rule_in_words(scores_from(matrix, rule))


def test_files_hold_the_numbers_and_null_for_what_was_not_scored(tmp_path: Path) -> None:
    metrics, table = write_scores(tmp_path, SCORES, CLASSES, {"split": "val"})
    content = json.loads(metrics.read_text())
    assert content["split"] == "val"
    assert content["pixel_accuracy"] == 0.875
    assert content["mean_iou"] == (0.75 + 0.8) / 2
    assert content["classes"][2]["iou"] is None
    rows = list(csv.DictReader(table.open()))
    assert [row["name"] for row in rows] == ["sky", "road", "boat"]
    assert rows[0]["iou"] == "0.75" and rows[2]["iou"] == ""
