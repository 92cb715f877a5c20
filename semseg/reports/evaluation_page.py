"""Stage 8: an evaluation as one HTML file that opens from disk, needs no network access, and can be printed. No torch.

The page shows the result of the evaluation and what belongs to it (`EvaluationReport`). Its layout is in
templates/report.html.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from semseg.data.classes import ClassTable
from semseg.data.palette import Colour
from semseg.reports.charts import Line, Mark, draw_heat_map, draw_histogram, draw_line_chart
from semseg.reports.curves import Curves
from semseg.reports.draw import Pixels
from semseg.reports.label_error_pictures import LabelErrorPictures
from semseg.reports.pictures import MAX_EDGE, PictureStrip, encode_strip
from semseg.reports.run_card import RunCard
from semseg.reports.templates import render_template
from semseg.storage.atomic import atomic_write

if TYPE_CHECKING:
    from semseg.evaluation.own_scores import OwnScore
    from semseg.evaluation.result import ClassScore, EvaluationResult, ImageScore

MAX_PAIRS = 15  # rows of the table of confused pairs
MAX_HEAT_MAP_CLASSES = 20
EXAMPLE_GROUPS = ("best", "median", "worst")


class ConfusedPair(NamedTuple):
    """A class that was predicted as another one."""

    label: int  # class index
    predicted: int  # class index
    share: float  # fraction of the label's pixels, 0..1
    pixels: int
    error_share: float  # fraction of all wrong pixels, 0..1


class LegendEntry(NamedTuple):
    """A class in the legend of an example."""

    name: str
    colour: Colour
    labelled: float  # fraction of the image, 0..1
    predicted: float  # fraction of the image, 0..1


class Example(NamedTuple):
    """An image that the page shows, encoded for it."""

    group: str  # under which heading: best, median or worst
    score: ImageScore
    pictures: PictureStrip
    legend: list[LegendEntry]


class ClassRow(NamedTuple):
    """A row of the table of classes."""

    score: ClassScore
    missed: float  # fraction of all scored pixels that have this label and another prediction, 0..1


class EvaluationReport(NamedTuple):
    """Everything that the page shows."""

    title: str
    subtitle: str  # data, split, number of images, scales
    result: EvaluationResult | None  # None: nothing was scored yet
    num_images: int  # that were scored
    examples: tuple[Example, ...]
    curves: tuple[Curves, ...]
    card: RunCard
    label_errors: tuple[LabelErrorPictures, ...] = ()  # those of result.label_errors that are shown
    is_training: bool = False  # whether this is the page of a training, which begins with the curves


def write_evaluation_page(path: Path, report: EvaluationReport) -> None:
    """Write the page, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(render_evaluation_page(report), encoding="utf-8")


def render_evaluation_page(report: EvaluationReport) -> str:
    """Render the page as one self-contained HTML text."""
    result = report.result
    groups = dict.fromkeys(example.group for example in report.examples)
    return render_template(
        "report.html",
        report=report,
        result=result,
        scores=None if result is None else build_score_tables(result),
        histograms=[] if result is None else draw_score_histograms(result.images),
        thresholds=() if result is None else draw_thresholds(result),
        charts=[(curves, draw_curves(curves)) for curves in report.curves],
        best=next((curves.best for curves in report.curves), None),
        groups=[(group, [example for example in report.examples if example.group == group]) for group in groups],
    )


def draw_thresholds(result: EvaluationResult) -> list[tuple[str, Markup]]:
    """Draw the precision-recall curve of two classes, and precision, recall and F1 by threshold, with their titles."""
    best = result.best_threshold
    if best is None:
        return []
    name = result.classes.names[1]
    scored = [row for row in result.thresholds if None not in row]
    curve = sorted((row.recall or 0.0, row.precision or 0.0) for row in scored)
    steps = tuple(row.threshold for row in scored)
    columns = {
        "precision": tuple(row.precision or 0.0 for row in scored),
        "recall": tuple(row.recall or 0.0 for row in scored),
        "F1": tuple(row.f1 or 0.0 for row in scored),
    }
    recall, precision = zip(*curve, strict=True)
    return [
        (
            f"Precision of {name} by recall",
            draw_line_chart([Line("precision", recall, precision)], "precision by recall", "recall", limits=(0, 1)),
        ),
        (
            f"By the threshold of its probability; best: {best.threshold:g} with F1 {best.f1 or 0:.2%}",
            draw_line_chart(
                [Line(key, steps, values) for key, values in columns.items()],
                "precision, recall and F1 by threshold",
                "threshold",
                limits=(0, 1),
                mark=Mark(best.threshold, "best threshold"),
            ),
        ),
    ]


class ScoreTables(NamedTuple):
    """The classes and their confusions, as the page shows them."""

    classes: list[ClassScore]  # by class index
    rows: list[ClassRow]  # the classes with a score, the largest first
    absent: list[ClassScore]  # the others
    has_boundary: bool
    own: list[OwnScore]  # custom scores of classes
    heat: Markup | None  # None if no classes were confused
    rankings: list[tuple[str, str, list[ConfusedPair]]]  # key, name, the first pairs of the order


def build_score_tables(result: EvaluationResult) -> ScoreTables:
    """Build the tables of classes and of confused pairs."""
    classes, confusion = result.class_scores, result.confusion
    missed = (confusion.sum(1) - confusion.diagonal()) / max(1, int(confusion.sum()))
    rows = [ClassRow(score, float(missed[score.position])) for score in classes if score.iou is not None]
    orders: list[tuple[str, str, Callable[[ConfusedPair], tuple[float, float]]]] = [
        ("pixels", "pixels", lambda pair: (-pair.pixels, -pair.share)),
        ("share", "share of the label", lambda pair: (-pair.share, -pair.pixels)),
    ]
    pairs = find_confused_pairs(confusion)
    return ScoreTables(
        classes,
        sorted(rows, key=lambda row: -row.score.pixels),
        [score for score in classes if score.iou is None],
        result.boundary is not None,
        [score for score in result.scores.own if score.per_class is not None],
        draw_confusion_chart(confusion, result.classes.names),
        [(key, name, sorted(pairs, key=order)[:MAX_PAIRS]) for key, name, order in orders],
    )


def choose_examples(images: Sequence[ImageScore], per_group: int = 3) -> list[tuple[str, int]]:
    """Choose the best, median and worst images by mean IoU, as (group, index); images without a score are skipped.

    >>> from semseg.evaluation.result import ImageScore
    >>> choose_examples([ImageScore(str(n), None, n / 10) for n in range(5)], per_group=1)
    [('best', 4), ('median', 2), ('worst', 0)]
    """
    scored = [(score.mean_iou, index) for index, score in enumerate(images) if score.mean_iou is not None]
    order = [index for _, index in sorted(scored, reverse=True)]
    best = order[:per_group]
    worst = order[per_group:][-per_group:][::-1]
    middle = order[per_group : len(order) - len(worst)]
    start = max(0, (len(middle) - per_group + 1) // 2)
    median = middle[start : start + per_group]
    return [(group, index) for group, part in zip(EXAMPLE_GROUPS, (best, median, worst), strict=True) for index in part]


# ---- parts of the page


def find_confused_pairs(confusion: NDArray[np.int64]) -> list[ConfusedPair]:
    """Return all pairs of confused classes, the most pixels first."""
    fractions = normalise_rows(confusion)
    errors = max(1, int(confusion.sum() - confusion.trace()))
    pairs = [
        ConfusedPair(int(row), int(column), float(fractions[row, column]), pixels, pixels / errors)
        for row, column in np.argwhere(confusion)
        if row != column and (pixels := int(confusion[row, column]))
    ]
    return sorted(pairs, key=lambda pair: (-pair.pixels, -pair.share))


def normalise_rows(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Divide each row by its sum; rows without pixels stay 0."""
    return confusion / np.maximum(1, confusion.sum(1, keepdims=True))


def draw_confusion_chart(confusion: NDArray[np.int64], names: Sequence[str]) -> Markup | None:
    """Draw the heat map of the classes that have the most pixels confused, the largest class first.

    Returns None if no classes were confused.
    """
    chosen: dict[int, None] = {}
    for pair in find_confused_pairs(confusion):
        chosen |= {pair.label: None, pair.predicted: None}
        if len(chosen) >= MAX_HEAT_MAP_CLASSES:
            break
    if not chosen:
        return None
    labelled = confusion.sum(1)
    keep = sorted(list(chosen)[:MAX_HEAT_MAP_CLASSES], key=lambda index: -labelled[index])
    return draw_heat_map(
        normalise_rows(confusion)[np.ix_(keep, keep)], [names[index] for index in keep], "confusion matrix"
    )


def draw_curves(curves: Curves) -> Markup:
    """Draw one chart of the training, from its first step to the last one of the log."""
    last = max(curves.last_step or 0, *(line.x[-1] for line in curves.lines))
    title = f"{curves.title} over the training steps"
    return draw_line_chart(curves.lines, title, "step", limits=(0, last), mark=curves.best)


def draw_score_histograms(images: Sequence[ImageScore]) -> list[tuple[str, Markup]]:
    """Draw the histograms of the images' scores, each with its title; empty without scored images."""
    scores = {
        "mean IoU of each image": [score.mean_iou for score in images if score.mean_iou is not None],
        "pixel accuracy of each image": [score.pixel_accuracy for score in images if score.pixel_accuracy is not None],
    }
    return [(title, draw_histogram(values, title)) for title, values in scores.items() if values]


def encode_example(
    group: str,
    score: ImageScore,
    image: Pixels,
    label: NDArray[np.integer],
    prediction: NDArray[np.integer],
    *,
    classes: ClassTable,
    edge: int = MAX_EDGE,
) -> Example:
    """Encode the pictures of an image and build its legend.

    Args:
        group: the heading of the page under which it is shown.
        image: (H, W, 3) RGB.
        label: (H, W) class indices, -1 where nothing is scored.
        prediction: (H, W) class indices.
        edge: long edge of the pictures in pixels.
    """
    pictures = encode_strip(image, label, prediction, classes, edge)
    return Example(group, score, pictures, build_example_legend(label, prediction, classes))


def build_example_legend(
    label: NDArray[np.integer], prediction: NDArray[np.integer], classes: ClassTable
) -> list[LegendEntry]:
    """Return the classes in the label or the prediction, the largest first."""
    labelled, predicted = (
        np.bincount(ids[ids >= 0].ravel(), minlength=classes.num_classes) / ids.size for ids in (label, prediction)
    )
    order = np.argsort(-np.maximum(labelled, predicted), kind="stable")
    return [
        LegendEntry(classes.names[index], classes.palette[index], float(labelled[index]), float(predicted[index]))
        for index in order
        if labelled[index] or predicted[index]
    ]
