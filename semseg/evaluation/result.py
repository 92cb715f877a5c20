"""Stage 8: the result of an evaluation, as console tables, files and pages read it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.config.schema import MIOU_RULES
from semseg.data.classes import ClassTable
from semseg.data.palette import Colour
from semseg.evaluation.bootstrap import ConfidenceIntervals
from semseg.evaluation.evaluator import Speed, SplitCounts, UnreadableImage
from semseg.evaluation.image_files import ClassMaps
from semseg.evaluation.label_errors import LabelError
from semseg.evaluation.metrics import BoundaryCounts, Scores, scores_from
from semseg.evaluation.own_scores import FRACTION, NO_SCORES
from semseg.evaluation.thresholds import ThresholdScore, compute_curve, find_best


class SummaryScore(NamedTuple):
    """One score of the whole split."""

    name: str
    value: float | None  # 0..1 unless it has a unit; None: nothing was scored
    meaning: str
    interval: tuple[float, float] | None = None  # confidence interval, 0..1
    unit: str = FRACTION  # another one: `value` is no fraction, but a number with this unit


class RuleScore(NamedTuple):
    """The mean IoU under one rule for absent classes."""

    rule: str
    mean_iou: float | None  # 0..1
    num_averaged: int  # classes
    absent: tuple[str, ...]  # names of the classes that the rule treats as absent


class ClassScore(NamedTuple):
    """The scores of one class, 0..1; None where nothing was scored."""

    position: int  # class index of the network
    id: int  # value in the label files
    name: str
    colour: Colour
    iou: float | None
    accuracy: float | None
    precision: float | None
    dice: float | None
    boundary_iou: float | None  # None too if eval.boundary_iou=false
    pixels: int  # by the labels
    fraction: float  # fraction of all scored pixels, by the labels
    own: Mapping[str, float | None] = NO_SCORES  # custom scores by name


class ImageScore(NamedTuple):
    """The scores of one image, 0..1; None where nothing was scored."""

    file: str  # path below the root of the data set, with /
    pixel_accuracy: float | None
    mean_iou: float | None
    seconds: float = 0.0  # network and scoring
    height: int = 0  # pixels
    width: int = 0
    class_counts: NDArray[np.signedinteger] | None = None  # (3, K), see bootstrap.class_counts
    maps: ClassMaps | None = None  # small label and prediction
    own: Mapping[str, float | None] = NO_SCORES  # custom scores by name


COPIED_FIELDS = [name for name in ImageScore._fields if name != "file"]  # of an ImageRecord


class SubsetScores(NamedTuple):
    """The scores of a subset of the scales (eval.also_scales)."""

    scales: list[int]  # short edges, pixels
    scores: Scores


class EvaluationResult(NamedTuple):
    """Every score of one evaluation."""

    classes: ClassTable
    class_ids: Sequence[int]  # value of each class in the label files, by class index
    confusion: NDArray[np.int64]  # (K, K); rows are labels
    scores: Scores  # for all scales in eval.scales, under the mIoU rule of the data set
    scores_by_rule: list[Scores]  # from the same counts, under every rule
    subsets: list[SubsetScores]
    boundary: BoundaryCounts | None
    intervals: ConfidenceIntervals | None
    images: list[ImageScore]  # in the order of the split, without those that could not be read
    speed: Speed
    unreadable: Sequence[UnreadableImage]
    thresholds: Sequence[ThresholdScore] = ()  # of two classes; ascending
    label_errors: Sequence[LabelError] | None = None  # the highest score first; None: nobody asked for them

    @property
    def best_threshold(self) -> ThresholdScore | None:
        """The threshold of the highest F1 score; None for more than two classes, and without pixels of the second."""
        return find_best(self.thresholds)

    @property
    def summary_scores(self) -> list[SummaryScore]:
        """The scores that are one number each, the most important first."""
        return list(summarise(self.scores, self.boundary, self.intervals))

    @property
    def rule_scores(self) -> list[RuleScore]:
        """The mean IoU under every rule."""
        names = self.classes.names
        return [
            RuleScore(
                scores.rule, scores.mean_iou, scores.num_averaged, tuple(names[position] for position in scores.absent)
            )
            for scores in self.scores_by_rule
        ]

    @property
    def rules_differ(self) -> bool:
        """Whether the rules average over different classes, because some are absent."""
        return len({scores.num_averaged for scores in self.scores_by_rule}) > 1

    @property
    def class_scores(self) -> list[ClassScore]:
        """The scores of every class, by class index."""
        scores, num_classes = self.scores, self.classes.num_classes
        columns = (
            range(num_classes),
            self.class_ids,
            self.classes.names,
            self.classes.palette,
            scores.iou,
            scores.accuracy,
            scores.precision,
            scores.dice,
            [None] * num_classes if self.boundary is None else self.boundary.iou,
            scores.pixels,
            scores.pixel_fractions,
            [
                {own.name: own.per_class[position] for own in scores.own if own.per_class is not None}
                for position in range(num_classes)
            ],
        )
        return [ClassScore(*row) for row in zip(*columns, strict=True)]


def build_result(
    counts: SplitCounts,
    classes: ClassTable,
    class_ids: Sequence[int],
    *,
    rule: str,
    root: Path,
    subsets: Sequence[list[int]] = (),
    intervals: ConfidenceIntervals | None = None,
) -> EvaluationResult:
    """Compute all scores of a split from its counts.

    Args:
        class_ids: value of each class in the label files.
        rule: the mIoU rule of the data set, see `scores_from`.
        root: the data set's; images are named by their paths below it.
        subsets: eval.also_scales, whose counts follow those of eval.scales.
    """
    matrix, *subset_matrices = (scale_counts.matrix.cpu() for scale_counts in counts.counts)
    images = [
        ImageScore(file=relative_name(image.path, root), **{name: getattr(image, name) for name in COPIED_FIELDS})
        for image in counts.images
    ]
    return EvaluationResult(
        classes=classes,
        class_ids=class_ids,
        confusion=matrix.numpy(),
        scores=scores_from(matrix, rule)._replace(own=counts.counts[0].own),
        scores_by_rule=[scores_from(matrix, name) for name in MIOU_RULES],
        subsets=[
            SubsetScores(scales, scores_from(subset, rule))
            for scales, subset in zip(subsets, subset_matrices, strict=True)
        ],
        boundary=counts.boundary,
        intervals=intervals,
        images=images,
        speed=counts.speed,
        unreadable=counts.unreadable,
        thresholds=() if counts.thresholds is None else compute_curve(counts.thresholds),
        label_errors=None
        if counts.label_errors is None
        else [error._replace(file=relative_name(error.file, root)) for error in counts.label_errors],
    )


def summarise(
    scores: Scores, boundary: BoundaryCounts | None = None, intervals: ConfidenceIntervals | None = None
) -> Iterator[SummaryScore]:
    """The scores that are one number each, with what each of them means."""
    rule = f"rule {scores.rule}: {scores.num_averaged} of {len(scores.iou)} classes"
    yield SummaryScore("mean IoU", scores.mean_iou, rule, intervals and intervals.mean_iou)
    yield SummaryScore(
        "pixel accuracy",
        scores.pixel_accuracy,
        "fraction of the scored pixels that are correct",
        intervals and intervals.pixel_accuracy,
    )
    yield SummaryScore(
        "overall score",
        scores.overall,
        "mean of mean IoU and pixel accuracy",
        intervals and intervals.overall_score,
    )
    yield SummaryScore("mean accuracy", scores.mean_accuracy, "over the classes in the labels")
    yield SummaryScore(
        "frequency-weighted IoU", scores.frequency_weighted_iou, "each class weighted by its fraction of the pixels"
    )
    yield SummaryScore("mean Dice", scores.mean_dice, f"rule {scores.rule}")
    if boundary is not None:
        yield SummaryScore("mean boundary IoU", boundary.mean_iou, "over the classes in the labels or predicted")
    for own in scores.own:
        yield SummaryScore(own.name, own.value, own.meaning, unit=own.unit)


def relative_name(path: str | Path, root: Path) -> str:
    """The path of a file below `root`, with /; its absolute path if it is elsewhere."""
    # Symbolic links are not followed: two names of one file are two images.
    file, folder = Path(os.path.abspath(path)), Path(os.path.abspath(root))  # noqa: PTH100 - pathlib keeps ".."
    return (file.relative_to(folder) if file.is_relative_to(folder) else file).as_posix()
