"""Stage 7 for an image that is read by window: its scores, counted row by row, without a whole class map or label."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg.data.geometry import Size
from semseg.data.open_pairs import OpenPair
from semseg.data.windows import FinishedRows, Window, row_strips
from semseg.evaluation.image_files import MAP_EDGE, ClassMaps, encode_maps
from semseg.evaluation.inference import ClassMap
from semseg.evaluation.metrics import confusion_counts
from semseg.evaluation.thresholds import NUM_THRESHOLDS, count_probabilities

COUNTED_PIXELS = 2**18  # at once: counting takes about 100 bytes for each


class ShrunkenGrid(NamedTuple):
    """The pixels of an image that its small maps consist of, by row and column."""

    rows: Tensor  # int64
    columns: Tensor  # int64


def plan_shrinking(size: Size, device: torch.device | None = None) -> ShrunkenGrid:
    """The pixels under the centres of those of a map whose long edge is at most MAP_EDGE, so that no classes are mixed.

    >>> plan_shrinking(Size(960, 640)).rows[:3].tolist()
    [1, 4, 7]
    """
    scale = min(1.0, MAP_EDGE / max(size))
    rows, columns = (
        ((torch.arange(max(1, round(scale * length)), device=device) + 0.5) / scale).long().clamp(max=length - 1)
        for length in size
    )
    return ShrunkenGrid(rows, columns)


class WindowCounts(NamedTuple):
    """What was counted in one image, the same numbers as from its whole class map."""

    size: Size
    matrix: Tensor  # (K, K) int64, rows are labels
    thresholds: Tensor | None  # (2, NUM_THRESHOLDS) int64 of two classes, see thresholds.py
    maps: ClassMaps  # small label and prediction


class CountingSink:
    """Compares the rows of a prediction with those of the label.

    Args:
        pair: the image, whose label is read for each strip of rows.
        num_classes: K.
        device: where the pixels are counted.
    """

    takes_probabilities = False

    def __init__(self, pair: OpenPair, num_classes: int, device: torch.device) -> None:
        self.pair, self.num_classes, self.device = pair, num_classes, device
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.thresholds = self.matrix.new_zeros(2, NUM_THRESHOLDS) if num_classes == 2 else None
        self.grid_rows, self.grid_columns = (positions.numpy() for positions in plan_shrinking(pair.size))
        self.small: list[tuple[NDArray[np.int16], NDArray[np.int16]]] = []  # rows of label and prediction

    def write_rows(self, rows: FinishedRows) -> None:
        """Count the next rows.

        Raises:
            DataError: if the image or its label is damaged there.
        """
        height, width = rows.ids.shape
        label = self.pair.read_label(Window(rows.top, 0, height, width))
        inside = self.grid_rows[(self.grid_rows >= rows.top) & (self.grid_rows < rows.top + height)] - rows.top
        place = np.ix_(inside, self.grid_columns)
        self.small.append((label[place], rows.ids[place]))
        for strip in row_strips(Size(height, width), COUNTED_PIXELS):
            part = slice(strip.top, strip.top + strip.height)
            ids, given = (torch.from_numpy(values[part]).to(self.device) for values in (rows.ids, label))
            given = given.long()
            self.matrix += confusion_counts(ids, given, self.num_classes)
            if self.thresholds is not None:
                confidence = torch.from_numpy(rows.confidence[part]).to(self.device)
                self.thresholds += count_probabilities(ClassMap(ids, confidence), given)

    def finish(self) -> WindowCounts:
        """The counts, after the last rows."""
        label, prediction = (np.concatenate(parts) for parts in zip(*self.small, strict=True))
        return WindowCounts(self.pair.size, self.matrix, self.thresholds, encode_maps(label, prediction))
