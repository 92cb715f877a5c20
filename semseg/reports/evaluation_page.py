"""Stage 8: an evaluation as one HTML file that opens from disk, asks nothing of a network, and prints. No torch.

Takes plain numbers and arrays (`ReportData`); `headline`, `rule_scores` and `class_rows` make them of what the
evaluation counted. Layout is in pages/*.html, drawing in pages/charts.py and pages/pictures.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from semseg.data.classes import ClassTable
from semseg.data.palette import Colour
from semseg.reports.charts import heat_map, histogram, line_chart
from semseg.reports.curves import Curves
from semseg.reports.draw import Pixels
from semseg.reports.pictures import Strip, strip
from semseg.reports.run_card import RunCard
from semseg.reports.templates import render_template
from semseg.storage.atomic import replacing

if TYPE_CHECKING:
    from semseg.evaluation.metrics import Scores

NUM_PAIRS = 15  # rows of the table of confused pairs
NUM_HEAT_CLASSES = 20
GROUPS = ("best", "median", "worst")


class Tile(NamedTuple):
    """One headline score."""

    name: str
    value: float | None  # 0..1; None: nothing was scored
    note: str = ""
    interval: tuple[float, float] | None = None  # 95 % confidence, 0..1


class RuleScore(NamedTuple):
    """The mean IoU under one rule for absent classes."""

    rule: str
    mean_iou: float | None  # 0..1
    num_averaged: int  # classes
    absent: tuple[str, ...]  # names of the classes that the rule treats as absent


class ClassRow(NamedTuple):
    """The scores of one class, 0..1; None where there was nothing to score."""

    name: str
    colour: Colour
    iou: float | None
    accuracy: float | None
    precision: float | None
    dice: float | None
    share: float  # of all scored pixels, by the labels
    id: int  # in the label files


class ImageScore(NamedTuple):
    """The scores of one image, 0..1."""

    file: str
    pixel_accuracy: float | None
    mean_iou: float | None


class Example(NamedTuple):
    """One image to be shown."""

    group: str  # one of GROUPS
    score: ImageScore
    image: Pixels  # (H, W, 3) RGB
    label: NDArray[np.integer]  # (H, W), -1 = not scored
    prediction: NDArray[np.integer]  # (H, W)


class Pair(NamedTuple):
    """One class taken for another."""

    label: int
    predicted: int
    share: float  # of the label's pixels, 0..1
    pixels: int


class Present(NamedTuple):
    """One class of an example's legend."""

    name: str
    colour: Colour
    labelled: float  # share of the image, 0..1
    predicted: float


class ReportData(NamedTuple):
    """All that the page shows."""

    title: str
    subtitle: str  # data, split, number of images, scales
    headline: tuple[Tile, ...]
    rules: tuple[RuleScore, ...]
    classes: ClassTable
    rows: tuple[ClassRow, ...]  # one for each class
    confusion: NDArray[np.int64]  # (K, K); rows are labels
    images: tuple[ImageScore, ...]
    examples: tuple[Example, ...]
    curves: tuple[Curves, ...]
    card: RunCard


def write_report(path: Path, report: ReportData) -> None:
    """Write the page, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(render(report), encoding="utf-8")


def render(report: ReportData) -> str:
    """The page as one self-contained HTML text."""
    return render_template(
        "report.html",
        report=report,
        charts=[(curves, curves_chart(curves)) for curves in report.curves],
        histograms=histograms(report.images),
        heat=confusion_chart(report.confusion, report.classes.names),
        pairs=confused_pairs(report.confusion)[:NUM_PAIRS],
        groups=[(group, [shown(e, report.classes) for e in report.examples if e.group == group]) for group in GROUPS],
    )


# ---- from what the evaluation counted


def headline(scores: Scores, interval: tuple[float, float] | None = None) -> tuple[Tile, ...]:
    """The scores at the top of the page; `interval` is the 95 % confidence interval of the mean IoU."""
    rule = f"rule {scores.rule}: {scores.averaged_classes} of {len(scores.iou)} classes"
    return (
        Tile("mean IoU", scores.mean_iou, rule, interval),
        Tile("pixel accuracy", scores.pixel_accuracy, "share of the scored pixels that are right"),
        Tile("overall score", scores.overall, "mean of mean IoU and pixel accuracy"),
        Tile("mean accuracy", scores.mean_accuracy, "over the classes in the labels"),
        Tile("frequency-weighted IoU", scores.frequency_weighted_iou, "each class by its share of the pixels"),
    )


def rule_scores(scores: Sequence[Scores], names: Sequence[str]) -> tuple[RuleScore, ...]:
    """The table of rules from the scores under each of them."""
    return tuple(RuleScore(s.rule, s.mean_iou, s.averaged_classes, tuple(names[n] for n in s.absent)) for s in scores)


def class_rows(scores: Scores, classes: ClassTable, class_ids: Sequence[int] | None = None) -> tuple[ClassRow, ...]:
    """The table of classes from the scores under any rule.

    Args:
        class_ids: in the label files, by class index; None: the class indices.
    """
    ids = range(classes.num_classes) if class_ids is None else class_ids
    columns = (scores.iou, scores.accuracy, scores.precision, scores.dice, scores.shares, ids)
    return tuple(ClassRow(*row) for row in zip(classes.names, classes.palette, *columns, strict=True))


def choose_examples(images: Sequence[ImageScore], per_group: int = 3) -> list[tuple[str, int]]:
    """(group, index) of the images worth showing by mean IoU; no image twice, those without a score never.

    >>> choose_examples([ImageScore(str(n), None, n / 10) for n in range(5)], per_group=1)
    [('best', 4), ('median', 2), ('worst', 0)]
    """
    scored = [(score.mean_iou, index) for index, score in enumerate(images) if score.mean_iou is not None]
    order = [index for _, index in sorted(scored, reverse=True)]
    best = order[:per_group]
    worst = order[per_group:][-per_group:][::-1]
    between = order[per_group : len(order) - len(worst)]
    start = max(0, (len(between) - per_group + 1) // 2)
    median = between[start : start + per_group]
    return [(group, index) for group, part in zip(GROUPS, (best, median, worst), strict=True) for index in part]


# ---- parts of the page


def confused_pairs(confusion: NDArray[np.int64]) -> list[Pair]:
    """All pairs of classes of which one was taken for the other, the largest share of the label's pixels first."""
    shares = row_shares(confusion)
    pairs = [
        Pair(int(row), int(column), float(shares[row, column]), int(confusion[row, column]))
        for row, column in np.argwhere(confusion)
        if row != column
    ]
    return sorted(pairs, key=lambda pair: (-pair.share, -pair.pixels))


def row_shares(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each row as shares of its sum; rows without pixels stay 0."""
    return confusion / np.maximum(1, confusion.sum(1, keepdims=True))


def confusion_chart(confusion: NDArray[np.int64], names: Sequence[str]) -> Markup | None:
    """The heat map of the classes of the most confused pairs; None if nothing was confused."""
    chosen: dict[int, None] = {}
    for pair in confused_pairs(confusion):
        chosen |= {pair.label: None, pair.predicted: None}
        if len(chosen) >= NUM_HEAT_CLASSES:
            break
    if not chosen:
        return None
    keep = sorted(list(chosen)[:NUM_HEAT_CLASSES])
    return heat_map(row_shares(confusion)[np.ix_(keep, keep)], [names[index] for index in keep], "confusion matrix")


def curves_chart(curves: Curves) -> Markup:
    """One chart of the training."""
    return line_chart(curves.lines, f"{curves.title} over the training steps", "step")


def histograms(images: Sequence[ImageScore]) -> list[tuple[str, Markup]]:
    """Title and drawing of the spread of the images' scores; none without scored images."""
    spreads = {
        "mean IoU of each image": [score.mean_iou for score in images if score.mean_iou is not None],
        "pixel accuracy of each image": [score.pixel_accuracy for score in images if score.pixel_accuracy is not None],
    }
    return [(title, histogram(values, title)) for title, values in spreads.items() if values]


class Shown(NamedTuple):
    """One example as the template wants it."""

    score: ImageScore
    pictures: Strip
    legend: list[Present]


def shown(example: Example, classes: ClassTable) -> Shown:
    """An example as pictures and legend."""
    pictures = strip(example.image, example.label, example.prediction, classes)
    return Shown(example.score, pictures, legend(example.label, example.prediction, classes))


def legend(label: NDArray[np.integer], prediction: NDArray[np.integer], classes: ClassTable) -> list[Present]:
    """The classes in the label or the prediction, largest first."""
    labelled, predicted = (
        np.bincount(ids[ids >= 0].ravel(), minlength=classes.num_classes) / ids.size for ids in (label, prediction)
    )
    order = np.argsort(-np.maximum(labelled, predicted), kind="stable")
    return [
        Present(classes.names[index], classes.palette[index], float(labelled[index]), float(predicted[index]))
        for index in order
        if labelled[index] or predicted[index]
    ]
