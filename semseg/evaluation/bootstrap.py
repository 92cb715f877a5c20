"""Stage 8: how much scores would vary with other images of the same kind (Efron's percentile bootstrap). No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

CONFIDENCE_LEVEL = 0.95
RESAMPLES_PER_CHUNK = 64  # bounds the memory that a bootstrap takes
AUTOMATIC_RESAMPLES = 1000
FEW_IMAGES = 500  # fewer images than this get intervals unless eval.bootstrap says otherwise


class ConfidenceIntervals(NamedTuple):
    """Percentile confidence intervals (low, high); None if no resample had a scored pixel."""

    resamples: int
    mean_iou: tuple[float, float] | None
    pixel_accuracy: tuple[float, float] | None
    overall_score: tuple[float, float] | None = None


def choose_resamples(setting: int | None, num_images: int) -> int:
    """The number of resamples for eval.bootstrap: as set, or for None 1000 if there are few images.

    One image has no spread, so it has no interval.

    >>> choose_resamples(None, 8), choose_resamples(None, 500), choose_resamples(100, 500), choose_resamples(100, 1)
    (1000, 0, 100, 0)
    """
    if num_images < 2:
        return 0
    if setting is None:
        return AUTOMATIC_RESAMPLES if num_images < FEW_IMAGES else 0
    return setting


def class_counts(matrix: Tensor) -> NDArray[np.signedinteger]:
    """(K, K) confusion matrix of one image -> (3, K) pixels of each class: correct, labelled, predicted.

    IoU and accuracy need no more than these margins of the matrix, which take 1 / 50 of its memory for 150 classes.
    They are int32, and int64 for rasters with a class of 2^31 pixels or more.
    """
    counts = matrix.numpy()
    margins = np.stack([counts.diagonal(), counts.sum(1), counts.sum(0)])
    return margins.astype(np.int32) if margins.max(initial=0) < 2**31 else margins


def bootstrap(
    counts: Sequence[NDArray[np.signedinteger]], rule: str, resamples: int, generator: np.random.Generator
) -> ConfidenceIntervals:
    """Confidence intervals of mean IoU, pixel accuracy and their mean, the overall score.

    Each resample draws as many images as there are, with replacement, and is scored exactly, from the summed counts of
    the images drawn.

    Args:
        counts: one array per image, from `class_counts`.
        rule: how the mean IoU treats classes that are absent from a resample, as in `scores_from`.
    """
    means, accuracies = [], []
    for (totals,) in draw_totals([np.stack(counts)], generator, resamples):
        correct, labelled, predicted = totals.swapaxes(0, 1)  # each (draws, K)
        means.append(mean_ious(correct, labelled, predicted, rule))
        accuracies.append(divide(correct.sum(1), labelled.sum(1)))
    mean_iou, accuracy = np.concatenate(means), np.concatenate(accuracies)
    intervals = map(percentile_interval, (mean_iou, accuracy, (mean_iou + accuracy) / 2))
    return ConfidenceIntervals(resamples, *intervals)


def draw_totals(
    evaluations: Sequence[NDArray[np.signedinteger]], generator: np.random.Generator, resamples: int
) -> Iterator[list[NDArray[np.float64]]]:
    """Draw as many images as there are, with replacement; yields the summed counts (draws, 3, K) of each evaluation."""
    num_images, _, num_classes = evaluations[0].shape
    # Integers below 2^53 are exact in float64, in any order of summation, and BLAS sums them fast.
    pixels = [counts.reshape(num_images, -1).astype(np.float64) for counts in evaluations]  # (N, 3 K) each
    for start in range(0, resamples, RESAMPLES_PER_CHUNK):
        draws = generator.integers(num_images, size=(min(RESAMPLES_PER_CHUNK, resamples - start), num_images))
        multiplicities = np.stack([np.bincount(draw, minlength=num_images) for draw in draws]).astype(np.float64)
        yield [(multiplicities @ counts).reshape(-1, 3, num_classes) for counts in pixels]


def mean_ious(
    correct: NDArray[np.float64], labelled: NDArray[np.float64], predicted: NDArray[np.float64], rule: str
) -> NDArray[np.float64]:
    """Mean IoU of each row of (rows, K) pixel counts; NaN for rows without a scored pixel."""
    iou = divide(correct, labelled + predicted - correct)
    if rule == "ground_truth":
        iou[labelled == 0] = np.nan
    num_averaged = np.isfinite(iou).sum(1) if rule != "ade20k" else np.full(len(iou), iou.shape[1])
    is_scored = labelled.sum(1) > 0
    return divide(np.nansum(iou, axis=1), np.where(is_scored, num_averaged, 0))


def divide(part: NDArray[np.float64], whole: NDArray[np.number]) -> NDArray[np.float64]:
    """Quotients; NaN where `whole` is 0."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def percentile_interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """The central CONFIDENCE_LEVEL of the finite values; None if there are none."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    low, high = np.quantile(finite, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return float(low), float(high)
