"""Stage 7: exact pixel counts, and every score computed from them."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from semseg.errors import ConfigError
from semseg.evaluation.own_scores import OwnScore
from semseg.system.memory import get_free_memory

OUTSIDE = -2  # value of the pixels around an image; differs from every class and from -1


# ---- counts


def confusion_counts(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Count the pairs (class in the label, class predicted) over all scored pixels.

    Args:
        prediction: integer tensor of any shape, values 0..num_classes-1.
        label: integer tensor of the same shape, values -1 (not scored) .. num_classes-1.

    Returns:
        (num_classes, num_classes) int64; rows are labels.

    >>> confusion_counts(torch.tensor([0, 1, 1]), torch.tensor([0, 1, -1]), 2).tolist()
    [[1, 0], [0, 1]]
    """
    num_cells = (num_classes + 1) * num_classes
    # The narrowest type that can index a cell: the time goes mostly into memory traffic.
    narrow = torch.int16 if num_cells <= 2**15 else torch.int32
    # An extra row counts the pixels that are not scored, which saves a mask and a copy.
    cell = torch.add(prediction.to(narrow), label.to(narrow), alpha=num_classes).add_(num_classes)
    return count_values(cell, num_cells).view(num_classes + 1, num_classes)[1:]


def count_values(values: Tensor, num_values: int) -> Tensor:
    """How often each of the integers 0..num_values-1 occurs in a tensor that holds no others: (num_values) int64."""
    if values.device.type == "cpu":
        return torch.bincount(values.flatten(), minlength=num_values)
    # The same counts; bincount asks the device for the largest value and waits for the answer.
    ones = values.new_ones(1, dtype=torch.int64).expand(values.numel())
    return ones.new_zeros(num_values).scatter_add_(0, values.flatten().long(), ones)


class Counts(NamedTuple):
    """A confusion matrix and the number of images in it, over all ranks."""

    matrix: Tensor  # (num_classes, num_classes) int64; rows are labels
    images: int
    own: tuple[OwnScore, ...] = ()  # custom scores


class ConfusionMatrix(Metric):
    """The confusion matrix and the number of images, summed over images and ranks in int64.

    Raises:
        ConfigError: if the matrices of `num_classes` classes do not fit in memory.
    """

    full_state_update = False
    matrix: Tensor
    images: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        require_memory(num_classes)
        self.num_classes = num_classes
        self.add_state("matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, counts: Tensor) -> None:
        """Add the counts of one image, from `confusion_counts`."""
        self.matrix += counts
        self.images += 1

    def compute(self) -> Counts:
        """The counts summed over all ranks."""
        return Counts(self.matrix, int(self.images))


def require_memory(num_classes: int) -> None:
    """Check that confusion matrices of `num_classes` classes fit in memory.

    Raises:
        ConfigError: if they do not.
    """
    # Four matrices: the sum, its initial value, and the counts of an image twice.
    needed = 4 * torch.int64.itemsize * num_classes**2
    free = get_free_memory() if needed > 2**28 else None
    if free is not None and needed > free:
        raise ConfigError(
            f"data.num_classes={num_classes}: confusion matrices of this size take {needed / 1e9:.1f} GB, but only "
            f"{free / 1e9:.1f} GB of memory are free. Merge classes with data.map."
        )


# ---- scores


class Scores(NamedTuple):
    """Scores as fractions (0..1); None where nothing was scored."""

    pixel_accuracy: float | None
    mean_iou: float | None
    overall: float | None  # mean of mean_iou and pixel_accuracy
    mean_accuracy: float | None  # over the classes in the labels
    frequency_weighted_iou: float | None  # each class weighted by its fraction of the labelled pixels
    mean_dice: float | None  # over the same classes as mean_iou
    iou: list[float | None]  # per class; None: neither in the labels nor predicted
    accuracy: list[float | None]  # per class, the recall; None: not in the labels
    precision: list[float | None]  # per class; None: not predicted
    dice: list[float | None]  # per class; None: neither in the labels nor predicted
    pixels: list[int]  # labelled pixels per class
    num_averaged: int  # number of classes that mean_iou is the mean of
    absent: list[int]  # classes that the rule treats as absent
    rule: str
    own: tuple[OwnScore, ...] = ()  # custom scores

    @property
    def pixel_fractions(self) -> list[float]:
        """The fraction of the labelled pixels that each class has."""
        total = sum(self.pixels) or 1
        return [pixels / total for pixels in self.pixels]


def scores_from(matrix: Tensor, rule: str = "present") -> Scores:
    """All scores of a confusion matrix.

    Args:
        matrix: (K, K) int64, rows are labels.
        rule: how the mean IoU treats absent classes. "ade20k": all K classes are averaged, and a class that is neither
            labelled nor predicted counts as 0 (as in the published results); "present": such a class is left out;
            "ground_truth": only classes in the labels are averaged.

    >>> scores_from(torch.tensor([[3, 1], [0, 4]])).pixel_accuracy
    0.875
    """
    correct, labelled, predicted = (counts.tolist() for counts in (matrix.diag(), matrix.sum(1), matrix.sum(0)))
    rows = list(zip(correct, labelled, predicted, strict=True))
    iou = [_ratio(c, n + p - c) for c, n, p in rows]
    dice = [_ratio(2 * c, n + p) for c, n, p in rows]
    accuracy = [_ratio(c, n) for c, n, _ in rows]
    total = sum(labelled)
    pixel_accuracy = _ratio(sum(correct), total)
    absent = absent_classes(iou, labelled, rule)
    excluded = set() if rule == "ade20k" else set(absent)
    averaged = [index for index in range(len(iou)) if index not in excluded]
    mean_iou = mean([iou[index] or 0.0 for index in averaged]) if total else None
    overall = None if mean_iou is None or pixel_accuracy is None else (mean_iou + pixel_accuracy) / 2
    weighted = sum(n * value for n, value in zip(labelled, iou, strict=True) if value is not None)
    return Scores(
        pixel_accuracy=pixel_accuracy,
        mean_iou=mean_iou,
        overall=overall,
        mean_accuracy=mean([value for value in accuracy if value is not None]),
        frequency_weighted_iou=_ratio(weighted, total),
        mean_dice=mean([dice[index] or 0.0 for index in averaged]) if total else None,
        iou=iou,
        accuracy=accuracy,
        precision=[_ratio(c, p) for c, _, p in rows],
        dice=dice,
        pixels=labelled,
        num_averaged=len(averaged),
        absent=absent,
        rule=rule,
    )


def absent_classes(iou: list[float | None], labelled: list[int], rule: str) -> list[int]:
    """Classes without labelled pixels; under rules other than "ground_truth", only those not predicted either."""
    if rule == "ground_truth":
        return [index for index, pixels in enumerate(labelled) if not pixels]
    return [index for index, value in enumerate(iou) if value is None]


def mean(values: list[float]) -> float | None:
    """The arithmetic mean; None for an empty list."""
    return _ratio(sum(values), len(values))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


# ---- boundaries


class BoundaryCounts(NamedTuple):
    """Pixel counts of the boundary regions of every class."""

    intersection: Tensor  # (num_classes,) int64
    union: Tensor  # (num_classes,) int64

    @property
    def iou(self) -> list[float | None]:
        """Per class; None: neither in the labels nor predicted."""
        return [_ratio(i, u) for i, u in zip(self.intersection.tolist(), self.union.tolist(), strict=True)]

    @property
    def mean_iou(self) -> float | None:
        """Over the classes in the labels or predicted."""
        return mean([value for value in self.iou if value is not None])


def boundary_counts(prediction: Tensor, label: Tensor, num_classes: int, ratio: float = 0.02) -> BoundaryCounts:
    """Count the pixels for the boundary IoU of Cheng et al., "Boundary IoU" (CVPR 2021).

    The boundary region of a class is the part of it that is close to its outline: within `ratio` of the image's
    diagonal in Chebyshev distance, and at least one pixel. The edge of the image belongs to the outline, as in the
    authors' code. Pixels that are not scored belong to no class, neither in the label nor in the prediction.

    Args:
        prediction: (H, W) integers, values 0..num_classes-1.
        label: (H, W) integers, values -1 (not scored) .. num_classes-1.
    """
    labelled, predicted = (ids.to("cpu", torch.int16).numpy() for ids in (label, prediction))
    predicted = np.where(labelled < 0, labelled, predicted)
    distance = max(1, round(ratio * math.hypot(*labelled.shape)))
    labelled, predicted = (np.where(is_near_outline(ids, distance), ids, -1) for ids in (labelled, predicted))
    intersection = _class_pixels(labelled[labelled == predicted], num_classes)
    union = _class_pixels(labelled, num_classes) + _class_pixels(predicted, num_classes) - intersection
    return BoundaryCounts(torch.from_numpy(intersection), torch.from_numpy(union))


def is_near_outline(ids: NDArray[np.int16], distance: int) -> NDArray[np.bool_]:
    """(H, W): pixels within Chebyshev distance `distance` of a pixel of another value or of the edge of the image."""
    framed = cv2.copyMakeBorder(ids, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=OUTSIDE)
    neighbourhood = np.ones((3, 3), np.uint8)
    outline = (cv2.dilate(framed, neighbourhood) != cv2.erode(framed, neighbourhood)).astype(np.uint8)  # distance 1
    # All classes in one pass: dilating the outline of all classes equals eroding each class separately.
    widened = cv2.dilate(outline, np.ones((2 * distance - 1, 2 * distance - 1), np.uint8))
    return widened[1:-1, 1:-1] > 0


def _class_pixels(ids: NDArray[np.int16], num_classes: int) -> NDArray[np.int64]:
    """(num_classes,) number of pixels of each class; -1 is not counted."""
    return np.bincount(ids.ravel().astype(np.int64) + 1, minlength=num_classes + 1)[1:]


class BoundaryIoU(Metric):
    """Boundary counts, summed over images and ranks in int64."""

    full_state_update = False
    intersection: Tensor
    union: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("intersection", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("union", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, counts: BoundaryCounts) -> None:
        """Add the counts of one image."""
        self.intersection += counts.intersection.to(self.intersection.device)
        self.union += counts.union.to(self.union.device)

    def compute(self) -> BoundaryCounts:
        """The counts summed over all ranks."""
        return BoundaryCounts(self.intersection, self.union)
