"""Stage 7 for a whole split: what is counted of every image, in validation and in an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg.data.batch import EvalSample
from semseg.evaluation.inference import ClassMap
from semseg.evaluation.metrics import ConfusionMatrix, Counts, confusion_counts
from semseg.evaluation.own_scores import NO_SCORES, ImageMeans, score_image, score_split
from semseg.evaluation.thresholds import ThresholdCounts, count_probabilities
from semseg.evaluation.window_counts import WindowCounts


class CountedImage(NamedTuple):
    """What was counted in one image."""

    matrix: Tensor  # (K, K) int64, rows are labels
    own: Mapping[str, float | None]  # custom scores by name


class SplitCounter:
    """Counts the pixels of the images of one rank, and adds up all ranks at the end.

    Args:
        device: of predictions and labels.

    Raises:
        ConfigError: if the matrices of `num_classes` classes do not fit in memory.
    """

    subsets: Sequence[Sequence[int]] = ()  # of the scales, which `add` takes predictions of
    takes_label_confidence = False  # whether `add` takes the probabilities of the labels

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.confusion = ConfusionMatrix(num_classes).to(device)
        self.image_means = ImageMeans().to(device)
        self.thresholds = ThresholdCounts().to(device) if num_classes == 2 else None
        self.num_unreadable = 0
        self.num_undefined = torch.zeros((), dtype=torch.int64, device=device)  # images with probabilities that are NaN

    def add(self, samples: Sequence[EvalSample], predictions: Sequence[Sequence[ClassMap]]) -> None:
        """Count images right after they were predicted together.

        Args:
            predictions: for each image that of all scales, then that of each subset.
        """
        for sample, (class_map, *_) in zip(samples, predictions, strict=True):
            self.count_image(sample, class_map)

    def count_image(self, sample: EvalSample, class_map: ClassMap) -> CountedImage:
        """Count one image that was predicted as a whole."""
        matrix = confusion_counts(class_map.ids, sample.label, self.num_classes)
        self.num_undefined += torch.isnan(class_map.confidence).any()
        self.confusion.update(matrix)
        if self.thresholds is not None:
            self.thresholds.update(count_probabilities(class_map, sample.label))
        own = score_image(class_map.ids, sample.label)
        self.image_means.update(own)
        return CountedImage(matrix, own)

    def add_counted(self, sample: EvalSample, counts: WindowCounts) -> None:
        """Add an image that was read, predicted and counted by window."""
        self.confusion.update(counts.matrix)
        if self.thresholds is not None and counts.thresholds is not None:
            self.thresholds.update(counts.thresholds)
        self.image_means.update(NO_SCORES)

    def add_unreadable(self, sample: EvalSample) -> None:
        """Count an image that could not be read."""
        self.num_unreadable += 1

    def sum_counts(self) -> Counts:
        """The counts of all ranks. Every rank must call it, and each gets the whole result."""
        counts = self.confusion.compute()
        return counts._replace(own=score_split(counts.matrix, self.image_means.compute()))

    def sum_threshold_counts(self) -> NDArray[np.int64] | None:
        """The counts of all ranks by threshold, (2, NUM_THRESHOLDS), like `sum_counts`; None for more classes."""
        return None if self.thresholds is None else self.thresholds.compute().cpu().numpy()
