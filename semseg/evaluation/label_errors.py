"""Stage 8: regions where the network contradicts the label with confidence, ranked for annotators. No torch.

The idea is that of confident learning (Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in
Dataset Labels", JAIR 70): an example whose label a network finds improbable, and whose other class it is sure of, is
likely to be labelled wrongly. Pixels are not independent examples, so the unit here is a connected region of pixels
with the same label and the same predicted class.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from semseg.data.objects import MIN_AREA, find_box
from semseg.data.windows import Window

MAX_ERRORS = 1000  # regions of a split that are kept, those with the highest scores
BORDER_RATIO = 0.005  # width of the zone beside borders of the label, as a fraction of the diagonal of the image


class LabelError(NamedTuple):
    """A region whose label may be wrong."""

    score: float  # 0..1, see `find_label_errors`
    position: int  # of the image in the list of the split
    file: str  # of the image
    label: int  # class index
    predicted: int  # class index
    margin: float  # mean of p(predicted) - p(label) over its inner pixels, 0..1
    confidence: float  # mean of p(predicted) over its inner pixels, 0..1
    pixels: int  # all of its pixels
    box: Window  # around them
    mask: bytes  # PNG of the box, 255 = pixel of the region

    @property
    def rank_key(self) -> tuple[float, int, int, int, Window]:
        """Sorts regions by descending score, and equal ones in the same order on any number of devices."""
        return (-self.score, self.position, self.label, self.predicted, self.box)


def find_label_errors(
    label: NDArray[np.integer],
    prediction: NDArray[np.integer],
    confidence: NDArray[np.floating],
    label_confidence: NDArray[np.floating],
    *,
    position: int,
    file: str,
    above: float = 0.0,
) -> Iterator[LabelError]:
    """The regions of an image that the network contradicts.

    The score of a region is the product of its mean margin, of the side that its inner pixels would have as a square,
    as a fraction of the same for the image, sqrt(inner pixels / pixels of the image), and of the fraction of its box
    that the region fills. Inner pixels are those that are not beside a border of the label (`find_border_zone`): there,
    networks and annotators always differ by a few pixels. A region needs MIN_AREA of them. Objects fill their box; what
    a network draws otherwise along a border is long and bent.

    Args:
        label: (H, W) class indices, -1 = not scored.
        prediction: (H, W) class indices.
        confidence: (H, W) probability of the predicted class.
        label_confidence: (H, W) probability of the class in the label; any number where it is -1.
        above: regions with a lower score are left out.
    """
    is_inner = (prediction != label) & (label >= 0) & ~find_border_zone(label)
    pairs, counts = np.unique(
        np.stack([label[is_inner], prediction[is_inner]]).astype(np.int64), axis=1, return_counts=True
    )
    for (given, predicted), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
        if count < MIN_AREA or math.sqrt(count / label.size) < above:
            continue
        is_pair = ((label == given) & (prediction == predicted)).astype(np.uint8)
        top, left, height, width = find_box(is_pair)
        place = (slice(top, top + height), slice(left, left + width))
        _, numbers, stats, _ = cv2.connectedComponentsWithStats(is_pair[place], connectivity=8)
        chosen = is_inner[place] & (numbers > 0)
        of_region, sure = numbers[chosen], confidence[place][chosen]
        sums = [
            np.bincount(of_region, weights, minlength=len(stats))
            for weights in (None, sure - label_confidence[place][chosen], sure)
        ]
        for number, (inner, margin, total) in enumerate(zip(*(values.tolist() for values in sums), strict=True)):
            if inner < MIN_AREA:
                continue
            x, y, w, h, area = stats[number].tolist()
            score = margin / inner * math.sqrt(inner / label.size) * area / (w * h)
            if score < above:
                continue
            yield LabelError(
                score=score,
                position=position,
                file=file,
                label=given,
                predicted=predicted,
                margin=margin / inner,
                confidence=total / inner,
                pixels=area,
                box=Window(top + y, left + x, h, w),
                mask=encode_region_mask(numbers[y : y + h, x : x + w] == number),
            )


def find_border_zone(label: NDArray[np.integer]) -> NDArray[np.bool_]:
    """(H, W): whether a pixel is at most BORDER_RATIO of the diagonal, and at least 1 pixel, from another label.

    The edge of the image is no border.
    """
    is_border = np.zeros(label.shape, np.uint8)
    across, down = label[:, 1:] != label[:, :-1], label[1:] != label[:-1]
    for side in (is_border[:, 1:], is_border[:, :-1]):
        side[across] = 1
    for side in (is_border[1:], is_border[:-1]):
        side[down] = 1
    width = max(1, round(BORDER_RATIO * math.hypot(*label.shape)))  # pixels of the zone on each side
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width - 1, 2 * width - 1))
    return cv2.dilate(is_border, kernel).astype(np.bool_)


class LabelErrorList:
    """The regions with the highest scores, at most `limit` of them, in memory that does not grow further."""

    def __init__(self, limit: int = MAX_ERRORS) -> None:
        self.limit = limit
        self.kept: list[LabelError] = []

    @property
    def threshold(self) -> float:
        """Regions with a lower score cannot be among those with the highest."""
        return self.kept[-1].score if len(self.kept) == self.limit else 0.0

    def add(self, errors: Iterable[LabelError]) -> None:
        """Add the regions of an image."""
        self.kept = merge_label_errors([self.kept, list(errors)], self.limit)


def merge_label_errors(lists: Sequence[Sequence[LabelError]], limit: int = MAX_ERRORS) -> list[LabelError]:
    """The regions with the highest scores of several devices, the highest first."""
    return heapq.nsmallest(limit, (error for part in lists for error in part), key=lambda error: error.rank_key)


def encode_region_mask(mask: NDArray[np.bool_]) -> bytes:
    """A mask (h, w) as PNG."""
    is_encoded, data = cv2.imencode(".png", mask.astype(np.uint8) * 255)
    assert is_encoded, "a mask is a picture"
    return data.tobytes()


def decode_region_mask(data: bytes) -> NDArray[np.bool_]:
    """The mask (h, w) of `encode_region_mask`."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert pixels is not None, "encode_region_mask has written it"
    return pixels > 0
