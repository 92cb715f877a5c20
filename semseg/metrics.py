"""Stage 7: one matrix of exact counts, and every score from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


def confusion_counts(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Counts of (class in the label, class predicted) over all scored pixels.

    Args:
        prediction: integer tensor of any shape, values 0..num_classes-1.
        label: integer tensor of the same shape, values -1 (not scored) .. num_classes-1.

    Returns:
        (num_classes, num_classes) int64; rows are labels.

    >>> confusion_counts(torch.tensor([0, 1, 1]), torch.tensor([0, 1, -1]), 2).tolist()
    [[1, 0], [0, 1]]
    """
    # One spare row takes the pixels that are not scored: no mask, no copy.
    cell = (label.flatten().long() + 1) * num_classes + prediction.flatten()
    counts = torch.bincount(cell, minlength=(num_classes + 1) * num_classes)
    return counts.view(num_classes + 1, num_classes)[1:]


class Counts(NamedTuple):
    """What a ConfusionMatrix has counted over all ranks."""

    matrix: Tensor  # (num_classes, num_classes) int64; rows are labels
    images: int


class ConfusionMatrix(Metric):
    """The confusion matrix and the number of images, summed over batches and ranks in int64."""

    full_state_update = False
    matrix: Tensor
    images: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count one image: both (H, W)."""
        self.matrix += confusion_counts(prediction, label, self.num_classes)
        self.images += 1

    def compute(self) -> Counts:
        """The counts of all ranks together."""
        return Counts(self.matrix, int(self.images))


class Scores(NamedTuple):
    """Scores as shares (0..1); None where nothing was scored."""

    pixel_accuracy: float | None
    mean_iou: float | None
    overall: float | None  # mean of mean_iou and pixel_accuracy
    mean_accuracy: float | None
    iou: list[float | None]  # per class; None: neither in the labels nor predicted
    accuracy: list[float | None]  # per class; None: not in the labels
    pixels: list[int]  # labelled pixels per class
    averaged_classes: int  # over how many classes mean_iou is the mean
    rule: str


def scores_from(matrix: Tensor, rule: str = "present") -> Scores:
    """All scores of a confusion matrix.

    Args:
        matrix: (K, K) int64, rows are labels.
        rule: what an absent class is to the mean IoU. "ade20k": all K classes are averaged, one that
            is neither labelled nor predicted counts 0 (the published tables); "present": such a class
            is left out; "ground_truth": only classes in the labels are averaged.

    >>> scores_from(torch.tensor([[3, 1], [0, 4]])).pixel_accuracy
    0.875
    """
    counts = matrix.double()
    correct, labelled, predicted = counts.diag(), counts.sum(1), counts.sum(0)
    union = labelled + predicted - correct
    iou = [_ratio(c, u) for c, u in zip(correct.tolist(), union.tolist(), strict=True)]
    accuracy = [_ratio(c, n) for c, n in zip(correct.tolist(), labelled.tolist(), strict=True)]
    averaged = averaged_ious(iou, labelled.tolist(), rule)
    total = float(labelled.sum())
    pixel_accuracy = _ratio(float(correct.sum()), total)
    mean_iou = sum(averaged) / len(averaged) if averaged and total else None
    overall = None if mean_iou is None or pixel_accuracy is None else (mean_iou + pixel_accuracy) / 2
    seen = [value for value in accuracy if value is not None]
    return Scores(
        pixel_accuracy=pixel_accuracy,
        mean_iou=mean_iou,
        overall=overall,
        mean_accuracy=sum(seen) / len(seen) if seen else None,
        iou=iou,
        accuracy=accuracy,
        pixels=matrix.sum(1).tolist(),
        averaged_classes=len(averaged),
        rule=rule,
    )


def averaged_ious(iou: list[float | None], labelled: list[float], rule: str) -> list[float]:
    """The IoUs that a rule averages."""
    if rule == "ade20k":
        return [value or 0.0 for value in iou]
    if rule == "ground_truth":
        return [value for value, count in zip(iou, labelled, strict=True) if count and value is not None]
    return [value for value in iou if value is not None]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
