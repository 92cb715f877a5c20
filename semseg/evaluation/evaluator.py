"""Stage 7 for a whole split: what an evaluation counts and keeps of every image, over all ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from semseg.config.schema import EvalConfig
from semseg.data.datasets import EvalSample
from semseg.evaluation.metrics import (
    BoundaryCounts,
    BoundaryIoU,
    ConfusionMatrix,
    Counts,
    boundary_counts,
    confusion_counts,
    scores_from,
)

STAGES = ("reading", "network", "scoring")  # reading: waiting for the loader
LEVEL = 0.95  # of the confidence intervals
CHUNK = 64  # resamples at a time: a bound on the memory of a bootstrap


class ImageRecord(NamedTuple):
    """What is kept of one image."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - in the list of the split; hides tuple.index
    path: str
    height: int
    width: int
    pixel_accuracy: float | None
    mean_iou: float | None  # over the classes in its label or its prediction
    seconds: float  # network and scoring
    margins: NDArray[np.int32] | None  # (3, K) pixels per class: right, labelled, predicted; kept for a bootstrap only


class LeftOut(NamedTuple):
    """An image that could not be read and was not scored."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - in the list of the split; hides tuple.index
    path: str
    reason: str


class Speed(NamedTuple):
    """How fast the images went through."""

    images_per_second: float  # of all ranks together
    seconds_per_image: dict[str, float]  # by STAGES, on the rank that had it


class Evaluation(NamedTuple):
    """All that was counted, over all ranks."""

    counts: list[Counts]  # of eval.scales, then of each part of them in eval.also_scales
    boundary: BoundaryCounts | None
    images: list[ImageRecord]  # in the order of the list
    speed: Speed
    left_out: Sequence[LeftOut] = ()  # in the order of the list


class Stopwatch:
    """Seconds of this process, by what they were spent on.

    Args:
        device: on a GPU a lap ends when its work is done, not when it is queued.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last lap."""
        self._since = self._now()

    def lap(self, stage: str) -> float:
        """Seconds since the last lap, which are added to those of `stage`."""
        now = self._now()
        seconds, self._since = now - self._since, now
        self.seconds[stage] += seconds
        return seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Evaluator:
    """Counts the images of one rank, and puts the ranks together in the end.

    Args:
        config: which parts of the scales, and what else is counted.
        device: where predictions and labels will be.
    """

    def __init__(self, config: EvalConfig, num_classes: int, device: torch.device) -> None:
        self.config = config
        self.num_classes = num_classes
        num_sets = 1 + len(config.also_scales)
        self.confusions = [ConfusionMatrix(num_classes).to(device) for _ in range(num_sets)]
        self.boundary = BoundaryIoU(num_classes).to(device) if config.boundary_iou else None
        self.images: list[ImageRecord] = []
        self.left_out: list[LeftOut] = []
        self.watch = Stopwatch(device)

    def add(self, samples: Sequence[EvalSample], predictions: Sequence[Sequence[Tensor]]) -> None:
        """Score images, right after they were predicted together.

        Args:
            predictions: of each, class indices (H, W) of eval.scales, then of each part of them in eval.also_scales.
        """
        network = self.watch.lap("network") / max(1, len(samples))
        for sample, maps in zip(samples, predictions, strict=True):
            self._add(sample, maps, network)

    def _add(self, sample: EvalSample, predictions: Sequence[Tensor], network: float) -> None:
        """Score one image, on which the network has spent so many seconds."""
        counts = [confusion_counts(prediction, sample.label, self.num_classes) for prediction in predictions]
        for confusion, added in zip(self.confusions, counts, strict=True):
            confusion.update(added)
        if self.boundary is not None:
            ratio = self.config.boundary_ratio
            self.boundary.update(boundary_counts(predictions[0], sample.label, self.num_classes, ratio))
        matrix = counts[0].cpu()
        scores = scores_from(matrix, "present")
        height, width = sample.label.shape
        margins = margins_of(matrix) if self.config.bootstrap else None
        seconds = network + self.watch.lap("scoring")
        self.images.append(
            ImageRecord(
                sample.index, sample.path, height, width, scores.pixel_accuracy, scores.mean_iou, seconds, margins
            )
        )

    def leave_out(self, sample: EvalSample) -> None:
        """Note an image that could not be read."""
        self.left_out.append(LeftOut(sample.index, sample.path, sample.bad))

    def result(self) -> Evaluation:
        """What all ranks have counted; every rank must call it, and each gets all of it."""
        ranks = gather(Share(self.images, self.left_out, self.watch.seconds))
        images = sorted((image for rank in ranks for image in rank.images), key=lambda image: image.index)
        left_out = sorted((image for rank in ranks for image in rank.left_out), key=lambda image: image.index)
        return Evaluation(
            counts=[confusion.compute() for confusion in self.confusions],
            boundary=None if self.boundary is None else self.boundary.compute(),
            images=images,
            speed=speed_of(len(images), [rank.seconds for rank in ranks]),
            left_out=left_out,
        )


class Share(NamedTuple):
    """What one rank has to tell."""

    images: list[ImageRecord]
    left_out: list[LeftOut]
    seconds: dict[str, float]


def gather(own: Share) -> list[Share]:
    """What every rank passed, in their order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    ranks = [own] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return ranks


def speed_of(num_images: int, ranks: Sequence[dict[str, float]]) -> Speed:
    """The speed of ranks that worked side by side, from the seconds of each by stage; the slowest sets the pace."""
    slowest = max(sum(seconds.values()) for seconds in ranks)
    per_image = {stage: sum(seconds[stage] for seconds in ranks) / max(1, num_images) for stage in STAGES}
    return Speed(num_images / slowest if slowest else 0.0, per_image)


# ---- confidence


class Intervals(NamedTuple):
    """Percentile confidence intervals (low, high); None where no resample had anything to score."""

    resamples: int
    mean_iou: tuple[float, float] | None
    pixel_accuracy: tuple[float, float] | None


def margins_of(matrix: Tensor) -> NDArray[np.int32]:
    """(K, K) confusion matrix of one image -> (3, K) pixels of each class: right, labelled, predicted.

    All that IoU and accuracy need, in 1 / 50 of the memory for 150 classes; an image has less than 2^31 pixels.
    """
    return torch.stack([matrix.diag(), matrix.sum(1), matrix.sum(0)]).numpy().astype(np.int32)


def bootstrap(
    margins: Sequence[NDArray[np.int32]], rule: str, resamples: int, generator: np.random.Generator
) -> Intervals:
    """How far mean IoU and pixel accuracy would move with other images of the same kind.

    As many images as there are, drawn with replacement, `resamples` times (Efron's percentile bootstrap); each draw is
    scored exactly, from the summed counts of its images.

    Args:
        margins: of each image, from `margins_of`.
        rule: what an absent class is to the mean IoU, as in `scores_from`; absent from the draw, that is.
    """
    num_images, num_classes = len(margins), margins[0].shape[1]
    # Whole numbers below 2^53 are exact in float64, in any order of summation, and BLAS sums them fast.
    pixels = np.stack(margins).reshape(num_images, -1).astype(np.float64)  # (N, 3 K)
    means, accuracies = [], []
    for start in range(0, resamples, CHUNK):
        draws = generator.integers(num_images, size=(min(CHUNK, resamples - start), num_images))
        times = np.stack([np.bincount(draw, minlength=num_images) for draw in draws])  # (draws, N)
        totals = (times.astype(np.float64) @ pixels).reshape(-1, 3, num_classes)
        right, labelled, predicted = totals.swapaxes(0, 1)  # each (draws, K)
        means.append(mean_ious(right, labelled, predicted, rule))
        accuracies.append(ratio(right.sum(1), labelled.sum(1)))
    return Intervals(resamples, interval(np.concatenate(means)), interval(np.concatenate(accuracies)))


def mean_ious(
    right: NDArray[np.float64], labelled: NDArray[np.float64], predicted: NDArray[np.float64], rule: str
) -> NDArray[np.float64]:
    """Mean IoU of each row of (rows, K) pixel counts; NaN for rows without a scored pixel."""
    iou = ratio(right, labelled + predicted - right)
    if rule == "ground_truth":
        iou[labelled == 0] = np.nan
    averaged = np.isfinite(iou).sum(1) if rule != "ade20k" else np.full(len(iou), iou.shape[1])
    is_scored = labelled.sum(1) > 0
    return ratio(np.nansum(iou, axis=1), np.where(is_scored, averaged, 0))


def ratio(part: NDArray[np.float64], whole: NDArray[np.number]) -> NDArray[np.float64]:
    """Quotients; NaN where `whole` is 0."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """The middle LEVEL of the values that are numbers; None if none is."""
    scored = values[np.isfinite(values)]
    if not scored.size:
        return None
    low, high = np.quantile(scored, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
