"""Stage 8: an evaluation as tables on the console and as files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from semseg.config.schema import MIOU_RULES
from semseg.data.classes import ClassTable
from semseg.evaluation.evaluator import LEVEL, Evaluation, ImageRecord, Intervals, LeftOut, Speed
from semseg.evaluation.metrics import BoundaryCounts, Scores, scores_from
from semseg.storage.atomic import replacing
from semseg.system.text import escape_csv_row, escape_unprintable

NOT_SCORED = "n/a"
RULES = {
    "ade20k": "over all {total} classes, an absent one counts 0",
    "present": "over {averaged} of {total} classes: those in the labels or predicted",
    "ground_truth": "over {averaged} of {total} classes: those in the labels",
}
MAX_ROWS = 40  # classes on the console; of more, only the best and the worst are shown
NUM_NAMES = 3  # of absent classes in a sentence


class Findings(NamedTuple):
    """All that is told of one evaluation."""

    classes: ClassTable
    confusion: NDArray[np.int64]  # (K, K); rows are labels
    scores: Scores  # of eval.scales, under the rule of the data set
    by_rule: list[Scores]  # the same counts under every rule
    parts: list[tuple[list[int], Scores]]  # of each part of the scales in eval.also_scales
    boundary: BoundaryCounts | None
    intervals: Intervals | None
    images: list[ImageRecord]
    speed: Speed
    left_out: Sequence[LeftOut] = ()
    class_ids: Sequence[int] | None = None  # of the classes in the label files, by class index


def findings_of(
    evaluation: Evaluation,
    classes: ClassTable,
    rule: str,
    also_scales: Sequence[list[int]] = (),
    intervals: Intervals | None = None,
    *,
    class_ids: Sequence[int] | None = None,
) -> Findings:
    """All scores of what was counted."""
    matrix, *parts = (counts.matrix.cpu() for counts in evaluation.counts)
    return Findings(
        classes=classes,
        confusion=matrix.numpy(),
        scores=scores_from(matrix, rule),
        by_rule=[scores_from(matrix, name) for name in MIOU_RULES],
        parts=[(scales, scores_from(part, rule)) for scales, part in zip(also_scales, parts, strict=True)],
        boundary=evaluation.boundary,
        intervals=intervals,
        images=evaluation.images,
        speed=evaluation.speed,
        left_out=evaluation.left_out,
        class_ids=class_ids,
    )


# ---- on the console


def shown(value: float | None) -> str:
    """A share in percent with two digits, or n/a."""
    return NOT_SCORED if value is None else f"{100 * value:.2f}"


def class_table(findings: Findings, title: str) -> Table:
    """One row for each class, in percent; of more than MAX_ROWS classes, the best and the worst."""
    scores, names = findings.scores, findings.classes.names
    columns = {
        "IoU": scores.iou,
        "accuracy": scores.accuracy,
        "precision": scores.precision,
        "Dice": scores.dice,
        **({"boundary IoU": findings.boundary.iou} if findings.boundary else {}),
        "pixels": scores.shares,
    }
    best, worst = rows_to_show(scores.iou)
    num_shown = len(best) + len(worst)
    told = f"; {num_shown} of {len(names)} classes, the best and the worst" if num_shown < len(names) else ""
    table = Table("class", title=Text(title), caption=f"percent{told}; pixels: share of the labelled ones")
    for column in columns:
        table.add_column(column, justify="right")
    for rows in (best, worst):
        for index in rows:
            table.add_row(
                Text(escape_unprintable(names[index])), *(shown(values[index]) for values in columns.values())
            )
        table.add_section()
    return table


def rows_to_show(iou: Sequence[float | None]) -> tuple[list[int], list[int]]:
    """The classes that fit on a screen: all in their order, or the best and the worst by IoU of those scored."""
    if len(iou) <= MAX_ROWS:
        return list(range(len(iou))), []
    scored = [(-value, index) for index, value in enumerate(iou) if value is not None]
    order = [index for _, index in sorted(scored)]
    half = MAX_ROWS // 2
    return order[:half], order[half:][-half:]


def summary_table(findings: Findings) -> Table:
    """The headline scores in percent, each with what it means."""
    table = Table("score", title="summary")
    table.add_column("%", justify="right")
    table.add_column("meaning")
    for name, value, meaning in summary_rows(findings):
        table.add_row(name, shown(value), Text(meaning))
    return table


def summary_rows(findings: Findings) -> Iterator[tuple[str, float | None, str]]:
    """Name, value and meaning of each headline score."""
    scores, intervals, boundary = findings.scores, findings.intervals, findings.boundary
    yield "mean IoU", scores.mean_iou, f"rule {scores.rule}{in_words(intervals and intervals.mean_iou)}"
    right = "share of the scored pixels that are right"
    yield "pixel accuracy", scores.pixel_accuracy, right + in_words(intervals and intervals.pixel_accuracy)
    yield "overall score", scores.overall, "mean of mean IoU and pixel accuracy"
    yield "mean accuracy", scores.mean_accuracy, "over the classes in the labels"
    yield "frequency-weighted IoU", scores.frequency_weighted_iou, "each class by its share of the pixels"
    yield "mean Dice", scores.mean_dice, f"rule {scores.rule}"
    if boundary is not None:
        yield "mean boundary IoU", boundary.mean_iou, "over the classes in the labels or predicted"
    for by_rule in findings.by_rule:
        yield f"mean IoU, {by_rule.rule}", by_rule.mean_iou, rule_in_words(by_rule, findings.classes.names)


def in_words(interval: tuple[float, float] | None) -> str:
    """A confidence interval as the end of a sentence."""
    return f"; {100 * LEVEL:.0f} % interval {shown(interval[0])} to {shown(interval[1])}" if interval else ""


def rule_in_words(scores: Scores, names: Sequence[str]) -> str:
    """What the mean IoU is the mean of, and which classes are absent."""
    rule = RULES[scores.rule].format(averaged=scores.averaged_classes, total=len(scores.iou))
    if not scores.absent:
        return f"{rule}; none is absent"
    listed = ", ".join(names[index] for index in scores.absent[:NUM_NAMES])
    return f"{rule}; {len(scores.absent)} absent: {listed}{', ...' if len(scores.absent) > NUM_NAMES else ''}"


def scales_table(findings: Findings, scales: list[int]) -> Table:
    """One row for eval.scales and one for each part of them, in percent."""
    table = Table("scales", title="scales, from one pass")
    for column in ("mean IoU", "pixel accuracy", "overall score"):
        table.add_column(column, justify="right")
    for edges, scores in [(scales, findings.scores), *findings.parts]:
        values = (scores.mean_iou, scores.pixel_accuracy, scores.overall)
        table.add_row(", ".join(map(str, edges)), *map(shown, values))
    return table


def speed_line(speed: Speed) -> str:
    """How fast it went, and what the time was spent on."""
    told = ", ".join(f"{stage} {1000 * seconds:.1f} ms" for stage, seconds in speed.seconds_per_image.items())
    return f"{speed.images_per_second:.2f} images per second; an image takes {told}"


# ---- as files


def write_findings(folder: Path, findings: Findings, root: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write metrics.json, per_class.csv, per_image.csv and confusion.npz below `folder`; returns their paths.

    What was not scored is null in the one and empty in the tables.

    Args:
        root: of the data set; images are named by their place below it.
        facts: further entries for metrics.json: checkpoint, split, scales, ...
    """
    metrics, classes, images, confusion = (
        folder / name for name in ("metrics.json", "per_class.csv", "per_image.csv", "confusion.npz")
    )
    per_class = class_rows(findings)
    content = {**facts, **as_plain(findings), "classes": per_class}
    with replacing(metrics) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    write_rows(classes, per_class)
    write_rows(images, [image_row(image, root) for image in findings.images])
    with replacing(confusion) as temporary, temporary.open("wb") as file:
        ids: dict[str, Any] = {} if findings.class_ids is None else {"ids": np.array(findings.class_ids, np.int64)}
        np.savez_compressed(file, matrix=findings.confusion, names=np.array(findings.classes.names, np.str_), **ids)
    return [metrics, classes, images, confusion]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file of at least one row, with a header."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(map(escape_csv_row, rows))


def as_plain(findings: Findings) -> dict[str, Any]:
    """The scores of metrics.json, but for those of each class."""
    names, boundary, intervals = findings.classes.names, findings.boundary, findings.intervals
    plain: dict[str, Any] = {
        "confusion": findings.confusion.tolist(),  # rows are labels
        **headline(findings.scores),
        "mean_iou_by_rule": {
            scores.rule: {
                "mean_iou": scores.mean_iou,
                "classes": scores.averaged_classes,
                "absent": [names[index] for index in scores.absent],
            }
            for scores in findings.by_rule
        },
        "also_scales": [{"scales": scales, **headline(scores)} for scales, scores in findings.parts],
        "speed": findings.speed._asdict(),
        "left_out": [{"file": image.path, "reason": image.reason} for image in findings.left_out],
    }
    if boundary is not None:
        plain["boundary_iou"] = boundary.mean_iou
    if intervals is not None:
        plain["confidence"] = {"level": LEVEL, **intervals._asdict()}
    return plain


def headline(scores: Scores) -> dict[str, Any]:
    """The scores that are one number each, and what the mean IoU is the mean of."""
    return {
        "mean_iou": scores.mean_iou,
        "mean_iou_rule": scores.rule,
        "mean_iou_classes": scores.averaged_classes,
        "pixel_accuracy": scores.pixel_accuracy,
        "overall_score": scores.overall,
        "mean_accuracy": scores.mean_accuracy,
        "frequency_weighted_iou": scores.frequency_weighted_iou,
        "mean_dice": scores.mean_dice,
    }


def class_rows(findings: Findings) -> list[dict[str, Any]]:
    """The scores of each class, for per_class.csv and metrics.json."""
    scores, shares, boundary = findings.scores, findings.scores.shares, findings.boundary
    rows: list[dict[str, Any]] = [
        {
            "index": index,
            "name": name,
            "iou": scores.iou[index],
            "accuracy": scores.accuracy[index],
            "precision": scores.precision[index],
            "dice": scores.dice[index],
            "pixels": scores.pixels[index],
            "share": shares[index],
        }
        for index, name in enumerate(findings.classes.names)
    ]
    if findings.class_ids is not None:
        rows = [row | {"id": raw_id} for row, raw_id in zip(rows, findings.class_ids, strict=True)]
    if boundary is None:
        return rows
    return [row | {"boundary_iou": value} for row, value in zip(rows, boundary.iou, strict=True)]


def image_row(image: ImageRecord, root: Path) -> dict[str, Any]:
    """One row of per_image.csv."""
    return {
        "file": place_of(image.path, root),
        "pixel_accuracy": image.pixel_accuracy,
        "mean_iou": image.mean_iou,
        "seconds": round(image.seconds, 6),
        "height": image.height,
        "width": image.width,
    }


def place_of(path: str | Path, root: Path) -> str:
    """Where a file lies below `root`, with /; the whole path of one that lies elsewhere."""
    # Without following links: two names of one file are two images.
    place, base = Path(os.path.abspath(path)), Path(os.path.abspath(root))  # noqa: PTH100 - pathlib keeps ".."
    return (place.relative_to(base) if place.is_relative_to(base) else place).as_posix()
