"""Stage 8 for two classes: precision and recall of the second class at every threshold of its probability.

The probabilities of all scored pixels are counted in NUM_THRESHOLDS bins, in int64 over images and ranks. Each edge of
a bin is a threshold; 0.5 is one of them, and gives the class of the highest probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from semseg.data.label_map import IGNORED
from semseg.data.windows import FinishedRows, RowSink
from semseg.evaluation.inference import ClassMap
from semseg.evaluation.metrics import count_values

NUM_THRESHOLDS = 1000
POSITIVE = 1  # index of the class that the threshold is for


class ThresholdScore(NamedTuple):
    """The second class at one threshold; a score of nothing is None."""

    threshold: float
    precision: float | None
    recall: float | None
    f1: float | None
    iou: float | None


class ThresholdCounts(Metric):
    """The scored pixels of each class by the probability of the second one, summed over images and ranks in int64."""

    full_state_update = False
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(2, NUM_THRESHOLDS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, counts: Tensor) -> None:
        """Add the counts of one image, from `count_probabilities`."""
        self.counts += counts.to(self.counts.device)

    def compute(self) -> Tensor:
        """(2, NUM_THRESHOLDS): class of the label, bin."""
        return self.counts


def count_probabilities(prediction: ClassMap, label: Tensor) -> Tensor:
    """The scored pixels of an image: (2, NUM_THRESHOLDS) int64, class of the label, bin.

    Args:
        prediction: of two classes.
        label: (H, W) 0, 1, or -1 for pixels that are not scored.
    """
    bins = (positive_probability(prediction.ids, prediction.confidence) * NUM_THRESHOLDS).long()
    bins = bins.clamp_(0, NUM_THRESHOLDS - 1) + NUM_THRESHOLDS * label.long()
    unscored = 2 * NUM_THRESHOLDS  # one more value
    counts = count_values(bins.masked_fill_(label == IGNORED, unscored), unscored + 1)
    return counts[:unscored].view(2, NUM_THRESHOLDS)


def positive_probability(ids: Tensor, confidence: Tensor) -> Tensor:
    """The probability of the second of two classes, from the class of the higher one and its probability."""
    return torch.where(ids == POSITIVE, confidence, 1 - confidence)


def apply_threshold(ids: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """(H, W) int16: 1 where the probability of the second of two classes is at least `threshold`, else 0."""
    return (positive_probability(ids, confidence) >= threshold).to(torch.int16)


def compute_curve(counts: NDArray[np.int64]) -> list[ThresholdScore]:
    """The scores at the thresholds 0, 1 / NUM_THRESHOLDS, ..., from the counts (2, NUM_THRESHOLDS)."""
    negative, positive = counts
    found = np.cumsum(positive[::-1])[::-1]  # true positives, with the bin itself
    wrong = np.cumsum(negative[::-1])[::-1]
    total = int(positive.sum())
    rows = []
    for number, (hits, misses) in enumerate(zip(found.tolist(), wrong.tolist(), strict=True)):
        union, predicted = total + misses, hits + misses
        rows.append(
            ThresholdScore(
                number / len(positive),
                hits / predicted if predicted else None,
                hits / total if total else None,
                2 * hits / (total + predicted) if total + predicted else None,
                hits / union if union else None,
            )
        )
    return rows


def find_best(curve: Sequence[ThresholdScore]) -> ThresholdScore | None:
    """The threshold of the highest F1 score, which has the highest IoU too; None without pixels of the second class.

    Of equal ones, the nearest to 0.5.
    """
    scored = [row for row in curve if row.recall is not None and row.f1 is not None]
    return max(scored, key=lambda row: (row.f1, -abs(row.threshold - 0.5)), default=None)


def find_best_threshold(counts: NDArray[np.int64] | None) -> float | None:
    """The threshold of `find_best` by the counts (2, NUM_THRESHOLDS) of two classes; None for more classes (None)."""
    best = None if counts is None else find_best(compute_curve(counts))
    return None if best is None else best.threshold


class ThresholdSink:
    """Hands rows on to another sink with the classes of a threshold."""

    def __init__(self, sink: RowSink, threshold: float) -> None:
        self.sink, self.threshold = sink, threshold

    @property
    def takes_probabilities(self) -> bool:
        """Whether the other sink takes them."""
        return self.sink.takes_probabilities

    def write_rows(self, rows: FinishedRows) -> None:
        """Hand on the next rows."""
        ids, confidence = torch.from_numpy(rows.ids), torch.from_numpy(rows.confidence)
        chosen = apply_threshold(ids, confidence, self.threshold)
        confidence = torch.where(chosen == ids, confidence, 1 - confidence)
        self.sink.write_rows(rows._replace(ids=chosen.numpy(), confidence=confidence.numpy()))
