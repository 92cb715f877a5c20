"""Stage 8: the result of an evaluation as files: scores, tables, and what mode=compare needs of every image."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semseg.evaluation.bootstrap import CONFIDENCE_LEVEL
from semseg.evaluation.image_files import COUNTS_FILE, MAPS_FILE, write_class_maps, write_image_counts
from semseg.evaluation.label_errors import LabelError
from semseg.evaluation.metrics import Scores
from semseg.evaluation.result import ClassScore, EvaluationResult, ImageScore
from semseg.storage.atomic import atomic_write
from semseg.system.text import escape_csv_row

LABEL_ERRORS_FILE = "label_errors.csv"
THRESHOLDS_FILE = "precision_recall.csv"
OPTIONAL_FILES = (THRESHOLDS_FILE, LABEL_ERRORS_FILE, COUNTS_FILE, MAPS_FILE)  # that not every evaluation writes
LABEL_ERRORS_COLUMNS = (
    "rank", "file", "label", "predicted", "score", "margin", "confidence", "pixels", "top", "left", "height", "width",
    "label_id", "predicted_id",
)  # fmt: skip


def write_result_files(folder: Path, result: EvaluationResult, facts: Mapping[str, Any]) -> list[Path]:
    """Write all files of a result to `folder`, except the page; returns their paths.

    Scores of nothing are null in metrics.json and empty in the tables. Files of an earlier evaluation that this one
    does not write are removed, because they would be taken for its own.

    Args:
        facts: further entries for metrics.json: checkpoint, split, scales, ...
    """
    metrics, classes, images, confusion = (
        folder / name for name in ("metrics.json", "per_class.csv", "per_image.csv", "confusion.npz")
    )
    replaces_earlier = metrics.exists()
    class_rows = [class_score_row(score, with_boundary=result.boundary is not None) for score in result.class_scores]
    content = {**facts, **metrics_entries(result), "classes": class_rows}
    with atomic_write(metrics) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    write_rows(classes, class_rows)
    write_rows(images, [image_score_row(image) for image in result.images])
    with atomic_write(confusion) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            matrix=result.confusion,
            names=np.array(result.classes.names, np.str_),
            ids=np.array(result.class_ids, np.int64),
        )
    further = []
    if result.thresholds:
        further.append(folder / THRESHOLDS_FILE)
        write_rows(further[-1], [row._asdict() for row in result.thresholds])
    if result.label_errors is not None:
        further.append(folder / LABEL_ERRORS_FILE)
        write_label_errors(further[-1], result, result.label_errors)
    written = [metrics, classes, images, confusion, *further, *write_image_files(folder, result.images)]
    for path in (folder / name for name in OPTIONAL_FILES):
        if replaces_earlier and path not in written:
            path.unlink(missing_ok=True)
    return written


def write_label_errors(path: Path, result: EvaluationResult, errors: Sequence[LabelError]) -> None:
    """Write the regions whose label may be wrong, the highest score first; only the header if there are none."""
    names, ids = result.classes.names, result.class_ids
    rows = [
        {
            "rank": rank,
            "file": error.file,
            "label": names[error.label],
            "predicted": names[error.predicted],
            "score": round(error.score, 6),
            "margin": round(error.margin, 6),
            "confidence": round(error.confidence, 6),
            "pixels": error.pixels,
            **error.box._asdict(),
            "label_id": ids[error.label],
            "predicted_id": ids[error.predicted],
        }
        for rank, error in enumerate(errors, start=1)
    ]
    write_rows(path, rows, LABEL_ERRORS_COLUMNS)


def write_image_files(folder: Path, images: Sequence[ImageScore]) -> list[Path]:
    """Write the pixel counts and class maps of all images, as far as they were kept; returns the paths."""
    counts = [image.class_counts for image in images if image.class_counts is not None]
    if len(counts) < len(images):
        return []
    paths = [folder / COUNTS_FILE, folder / MAPS_FILE]
    write_image_counts(paths[0], [image.file for image in images], counts)
    write_class_maps(paths[1], [image.maps for image in images])
    return paths


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write a CSV file with a header; without `columns` there must be at least one row, which has them."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or rows[0].keys())
        writer.writeheader()
        writer.writerows(map(escape_csv_row, rows))


def metrics_entries(result: EvaluationResult) -> dict[str, Any]:
    """The entries of metrics.json, apart from the scores of each class."""
    entries: dict[str, Any] = {
        "confusion": result.confusion.tolist(),  # rows are labels
        "palette": [list(colour) for colour in result.classes.palette],
        **score_entries(result.scores),
        "mean_iou_by_rule": {
            score.rule: {"mean_iou": score.mean_iou, "classes": score.num_averaged, "absent": list(score.absent)}
            for score in result.rule_scores
        },
        "also_scales": [{"scales": scales, **score_entries(scores)} for scales, scores in result.subsets],
        "speed": result.speed._asdict(),
        "left_out": [{"file": image.path, "reason": image.reason} for image in result.unreadable],
    }
    if result.scores.own:
        entries["own_scores"] = {own.name: own.value for own in result.scores.own}
        entries["own_units"] = {own.name: own.unit for own in result.scores.own}
    best = result.best_threshold
    if best is not None:
        entries["best_threshold"] = best._asdict()
    if result.boundary is not None:
        entries["boundary_iou"] = result.boundary.mean_iou
    if result.intervals is not None:
        entries["confidence"] = {"level": CONFIDENCE_LEVEL, **result.intervals._asdict()}
    return entries


def score_entries(scores: Scores) -> dict[str, Any]:
    """The scores that are one number each, and how the mean IoU was averaged."""
    return {
        "mean_iou": scores.mean_iou,
        "mean_iou_rule": scores.rule,
        "mean_iou_classes": scores.num_averaged,
        "pixel_accuracy": scores.pixel_accuracy,
        "overall_score": scores.overall,
        "mean_accuracy": scores.mean_accuracy,
        "frequency_weighted_iou": scores.frequency_weighted_iou,
        "mean_dice": scores.mean_dice,
    }


def class_score_row(score: ClassScore, *, with_boundary: bool) -> dict[str, Any]:
    """One class, for per_class.csv and metrics.json."""
    row: dict[str, Any] = {
        "index": score.position,
        "name": score.name,
        "iou": score.iou,
        "accuracy": score.accuracy,
        "precision": score.precision,
        "dice": score.dice,
        "pixels": score.pixels,
        "share": score.fraction,
        "id": score.id,
    }
    return row | ({"boundary_iou": score.boundary_iou} if with_boundary else {}) | dict(score.own)


def image_score_row(image: ImageScore) -> dict[str, Any]:
    """One row of per_image.csv."""
    return {
        "file": image.file,
        "pixel_accuracy": image.pixel_accuracy,
        "mean_iou": image.mean_iou,
        "seconds": round(image.seconds, 6),
        "height": image.height,
        "width": image.width,
        **image.own,
    }
