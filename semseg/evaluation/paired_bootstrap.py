"""Stage 8: is a difference of two evaluations larger than the choice of images explains? A paired bootstrap. No torch.

The percentile interval of Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13: images are drawn
with replacement, and every drawn image counts in both evaluations. So what makes an image easy or hard for both is not
mistaken for a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.evaluation.bootstrap import divide, draw_totals, mean_ious, percentile_interval

NUM_RESAMPLES = 2000
# With five images, a difference of the same sign on all of them still happens by chance in 1 of 16 cases (sign test).
MIN_INTERVAL_IMAGES = 6

Interval = tuple[float, float]  # low, high


class CountedScores(NamedTuple):
    """Scores of several sets of images, 0..1; NaN where nothing was scored."""

    headline: dict[str, NDArray[np.float64]]  # (rows,) each, by their names in metrics.json
    iou: NDArray[np.float64]  # (rows, K)


class DifferenceIntervals(NamedTuple):
    """95 % intervals of the differences of one evaluation to the base; None where there are too few images."""

    headline: dict[str, Interval | None]
    iou: tuple[Interval | None, ...]  # K


def score_counts(counts: NDArray[np.number], rule: str) -> CountedScores:
    """Score sets of images.

    Args:
        counts: (rows, 3, K) pixels of each class that are correct, labelled, predicted, summed over a set's images.
        rule: how the mean IoU treats absent classes, as in `metrics.scores_from`.
    """
    correct, labelled, predicted = np.moveaxis(counts.astype(np.float64), 1, 0)  # each (rows, K)
    iou = divide(correct, labelled + predicted - correct)
    total = labelled.sum(1)
    accuracy = divide(correct.sum(1), total)
    mean_iou = mean_ious(correct, labelled, predicted, rule)
    recall = divide(correct, labelled)
    headline = {
        "mean_iou": mean_iou,
        "pixel_accuracy": accuracy,
        "overall_score": (mean_iou + accuracy) / 2,
        "mean_accuracy": divide(np.nansum(recall, axis=1), np.isfinite(recall).sum(1)),
        "frequency_weighted_iou": divide(np.nansum(labelled * iou, axis=1), total),
        # The IoU of these numbers is 2 correct / (labelled + predicted), the Dice.
        "mean_dice": mean_ious(2 * correct, labelled + correct, predicted + correct, rule),
    }
    return CountedScores(headline, iou)


def compute_difference_intervals(
    base: NDArray[np.signedinteger],
    others: Sequence[NDArray[np.signedinteger]],
    rules: Sequence[str],
    generator: np.random.Generator,
    resamples: int = NUM_RESAMPLES,
) -> list[DifferenceIntervals]:
    """Compute the intervals of the differences of `others` to `base`, from the same resamples for all.

    Args:
        base: (N, 3, K) counts of each image, from `class_counts`; those of `others` are of the same images in the same
            order.
        rules: of the mean IoU, of the base and of each other evaluation.
    """
    num_images, _, num_classes = base.shape
    if num_images < MIN_INTERVAL_IMAGES:
        none = DifferenceIntervals(dict.fromkeys(score_counts(base[:1], rules[0]).headline), (None,) * num_classes)
        return [none] * len(others)
    drawn: list[list[CountedScores]] = []  # by chunk and evaluation
    for totals in draw_totals([base, *others], generator, resamples):
        drawn.append([score_counts(counts, rule) for counts, rule in zip(totals, rules, strict=True)])
    intervals = []
    for position, other in enumerate(others, start=1):
        headline = {
            name: percentile_interval(
                np.concatenate([chunk[position].headline[name] - chunk[0].headline[name] for chunk in drawn])
            )
            for name in drawn[0][0].headline
        }
        differences = np.concatenate([chunk[position].iou - chunk[0].iou for chunk in drawn])  # (resamples, K)
        is_supported = count_images_of_classes(base, other) >= MIN_INTERVAL_IMAGES
        iou = (
            percentile_interval(values) if supported else None
            for values, supported in zip(differences.T, is_supported, strict=True)
        )
        intervals.append(DifferenceIntervals(headline, tuple(iou)))
    return intervals


def count_images_of_classes(base: NDArray[np.signedinteger], other: NDArray[np.signedinteger]) -> NDArray[np.int64]:
    """(K,) number of images in whose label or predictions each class occurs."""
    return ((base[:, 1:] > 0) | (other[:, 1:] > 0)).any(1).sum(0)
