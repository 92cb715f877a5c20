"""Stage 8: scores as a table on the console and as files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from semseg.data.classes import ClassTable
from semseg.metrics import Scores

NOT_SCORED = "n/a"
RULES = {
    "ade20k": "over all {total} classes, an absent one counts 0",
    "present": "over {averaged} of {total} classes: those in the labels or predicted",
    "ground_truth": "over {averaged} of {total} classes: those in the labels",
}


def shown(value: float | None) -> str:
    """A share in percent with two digits, or n/a."""
    return NOT_SCORED if value is None else f"{100 * value:.2f}"


def rule_in_words(scores: Scores) -> str:
    """What the mean IoU is the mean of."""
    return RULES[scores.rule].format(averaged=scores.averaged_classes, total=len(scores.iou))


def score_table(scores: Scores, classes: ClassTable, title: str) -> Table:
    """Per-class rows and a summary, in percent."""
    table = Table(title=title, caption=f"mean IoU {rule_in_words(scores)}")
    table.add_column("class")
    for column in ("IoU %", "accuracy %", "pixels"):
        table.add_column(column, justify="right")
    rows = zip(classes.names, scores.iou, scores.accuracy, scores.pixels, strict=True)
    for name, iou, accuracy, pixels in rows:
        table.add_row(name, shown(iou), shown(accuracy), f"{pixels:,}")
    table.add_section()
    for name, value in summary(scores).items():
        table.add_row(name, shown(value), "", "", style="bold")
    return table


def summary(scores: Scores) -> dict[str, float | None]:
    """The headline scores by the names they are printed with."""
    return {
        "mean IoU": scores.mean_iou,
        "pixel accuracy": scores.pixel_accuracy,
        "overall score": scores.overall,
        "mean accuracy": scores.mean_accuracy,
    }


def write_scores(folder: Path, scores: Scores, classes: ClassTable, facts: dict[str, Any]) -> list[Path]:
    """Write metrics.json and per_class.csv below `folder`; None stands for what was not scored.

    Args:
        facts: further entries for metrics.json: checkpoint, split, scales, ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    per_class = [
        {"index": index, "name": name, "iou": iou, "accuracy": accuracy, "pixels": pixels}
        for index, (name, iou, accuracy, pixels) in enumerate(
            zip(classes.names, scores.iou, scores.accuracy, scores.pixels, strict=True)
        )
    ]
    content = {
        **facts,
        "mean_iou": scores.mean_iou,
        "mean_iou_rule": scores.rule,
        "mean_iou_classes": scores.averaged_classes,
        "pixel_accuracy": scores.pixel_accuracy,
        "overall_score": scores.overall,
        "mean_accuracy": scores.mean_accuracy,
        "classes": per_class,
    }
    metrics, table = folder / "metrics.json", folder / "per_class.csv"
    metrics.write_text(json.dumps(content) + "\n")
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, per_class[0].keys())
        writer.writeheader()
        writer.writerows(per_class)
    return [metrics, table]
