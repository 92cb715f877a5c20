"""Stage 8: an evaluation as one HTML file that opens from disk, needs no network access, and can be printed. No torch.

The page shows the result of the evaluation and what belongs to it (`EvaluationReport`). Its layout is in
templates/report.html.
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
from semseg.reports.charts import draw_heat_map, draw_histogram, draw_line_chart
from semseg.reports.curves import Curves
from semseg.reports.draw import Pixels
from semseg.reports.pictures import PictureStrip, encode_strip
from semseg.reports.run_card import RunCard
from semseg.reports.templates import render_template
from semseg.storage.atomic import atomic_write

if TYPE_CHECKING:
    from semseg.evaluation.result import EvaluationResult, ImageScore

MAX_PAIRS = 15  # rows of the table of confused pairs
MAX_HEAT_MAP_CLASSES = 20
EXAMPLE_GROUPS = ("best", "median", "worst")


class Example(NamedTuple):
    """An image that the page shows."""

    group: str  # one of EXAMPLE_GROUPS
    score: ImageScore
    image: Pixels  # (H, W, 3) RGB
    label: NDArray[np.integer]  # (H, W), -1 = not scored
    prediction: NDArray[np.integer]  # (H, W)


class ConfusedPair(NamedTuple):
    """A class that was predicted as another one."""

    label: int  # class index
    predicted: int  # class index
    share: float  # fraction of the label's pixels, 0..1
    pixels: int


class LegendEntry(NamedTuple):
    """A class in the legend of an example."""

    name: str
    colour: Colour
    labelled: float  # fraction of the image, 0..1
    predicted: float  # fraction of the image, 0..1


class EvaluationReport(NamedTuple):
    """Everything that the page shows."""

    title: str
    subtitle: str  # data, split, number of images, scales
    result: EvaluationResult
    examples: tuple[Example, ...]
    curves: tuple[Curves, ...]
    card: RunCard


def write_evaluation_page(path: Path, report: EvaluationReport) -> None:
    """Write the page, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(render_evaluation_page(report), encoding="utf-8")


def render_evaluation_page(report: EvaluationReport) -> str:
    """Render the page as one self-contained HTML text."""
    result, classes = report.result, report.result.classes
    return render_template(
        "report.html",
        report=report,
        result=result,
        class_scores=result.class_scores,
        charts=[(curves, draw_curves(curves)) for curves in report.curves],
        histograms=draw_score_histograms(result.images),
        heat=draw_confusion_chart(result.confusion, classes.names),
        pairs=rank_confused_pairs(result.confusion)[:MAX_PAIRS],
        groups=[
            (group, [encode_example(e, classes) for e in report.examples if e.group == group])
            for group in EXAMPLE_GROUPS
        ],
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


def rank_confused_pairs(confusion: NDArray[np.int64]) -> list[ConfusedPair]:
    """Return all pairs of confused classes, the largest fraction of the label's pixels first."""
    fractions = normalise_rows(confusion)
    pairs = [
        ConfusedPair(int(row), int(column), float(fractions[row, column]), int(confusion[row, column]))
        for row, column in np.argwhere(confusion)
        if row != column
    ]
    return sorted(pairs, key=lambda pair: (-pair.share, -pair.pixels))


def normalise_rows(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Divide each row by its sum; rows without pixels stay 0."""
    return confusion / np.maximum(1, confusion.sum(1, keepdims=True))


def draw_confusion_chart(confusion: NDArray[np.int64], names: Sequence[str]) -> Markup | None:
    """Draw the heat map of the classes of the most confused pairs; None if no classes were confused."""
    chosen: dict[int, None] = {}
    for pair in rank_confused_pairs(confusion):
        chosen |= {pair.label: None, pair.predicted: None}
        if len(chosen) >= MAX_HEAT_MAP_CLASSES:
            break
    if not chosen:
        return None
    keep = sorted(list(chosen)[:MAX_HEAT_MAP_CLASSES])
    return draw_heat_map(
        normalise_rows(confusion)[np.ix_(keep, keep)], [names[index] for index in keep], "confusion matrix"
    )


def draw_curves(curves: Curves) -> Markup:
    """Draw one chart of the training."""
    return draw_line_chart(curves.lines, f"{curves.title} over the training steps", "step")


def draw_score_histograms(images: Sequence[ImageScore]) -> list[tuple[str, Markup]]:
    """Draw the histograms of the images' scores, each with its title; empty without scored images."""
    scores = {
        "mean IoU of each image": [score.mean_iou for score in images if score.mean_iou is not None],
        "pixel accuracy of each image": [score.pixel_accuracy for score in images if score.pixel_accuracy is not None],
    }
    return [(title, draw_histogram(values, title)) for title, values in scores.items() if values]


class EncodedExample(NamedTuple):
    """An example, encoded for the page."""

    score: ImageScore
    pictures: PictureStrip
    legend: list[LegendEntry]


def encode_example(example: Example, classes: ClassTable) -> EncodedExample:
    """Encode the pictures of an example and build its legend."""
    pictures = encode_strip(example.image, example.label, example.prediction, classes)
    return EncodedExample(example.score, pictures, build_example_legend(example.label, example.prediction, classes))


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
