"""Stage 7 for a whole split: counts and records of every image, gathered from all ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from semseg.config.schema import EvalConfig
from semseg.data.batch import EvalSample
from semseg.data.geometry import Size
from semseg.evaluation.bootstrap import class_counts
from semseg.evaluation.image_files import MAX_MAPS, ClassMaps, encode_maps
from semseg.evaluation.inference import ClassMap
from semseg.evaluation.label_errors import LabelError, LabelErrorList, find_label_errors, merge_label_errors
from semseg.evaluation.metrics import (
    BoundaryCounts,
    BoundaryIoU,
    ConfusionMatrix,
    Counts,
    boundary_counts,
    confusion_counts,
    scores_from,
)
from semseg.evaluation.own_scores import NO_SCORES
from semseg.evaluation.split_counter import CountedImage, SplitCounter
from semseg.evaluation.window_counts import WindowCounts, plan_shrinking
from semseg.nets.gpu import wait_for_device

STAGES = ("reading", "network", "scoring")  # reading: waiting for the loader


class ImageRecord(NamedTuple):
    """What is kept of one image."""

    position: int  # in the list of the split
    path: str
    height: int
    width: int
    pixel_accuracy: float | None
    mean_iou: float | None  # over the classes in its label or its prediction
    seconds: float  # network and scoring
    class_counts: NDArray[np.signedinteger]  # (3, K), see bootstrap.class_counts
    maps: ClassMaps | None  # small label and prediction; None for images after the first MAX_MAPS
    own: Mapping[str, float | None] = NO_SCORES  # custom scores by name


class UnreadableImage(NamedTuple):
    """An image that could not be read and was not scored."""

    position: int  # in the list of the split
    path: str
    reason: str


class Speed(NamedTuple):
    """Throughput of an evaluation."""

    images_per_second: float  # all ranks together
    seconds_per_image: dict[str, float]  # by STAGES, on the rank that processed the image


class SplitCounts(NamedTuple):
    """Everything counted on a split, over all ranks."""

    counts: list[Counts]  # for eval.scales, then for each subset in eval.also_scales
    boundary: BoundaryCounts | None
    images: list[ImageRecord]  # in the order of the split
    speed: Speed
    unreadable: Sequence[UnreadableImage] = ()  # in the order of the split
    thresholds: NDArray[np.int64] | None = None  # (2, bins) of two classes, see thresholds.py
    label_errors: Sequence[LabelError] | None = None  # the highest score first; None unless eval.label_errors


class Stopwatch:
    """Seconds that this process spent in each of STAGES.

    Args:
        device: on a GPU a lap ends when the queued work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.restart()

    def restart(self) -> None:
        """Discard the time since the last lap."""
        self._lap_start = self._current_time()

    def lap(self, stage: str) -> float:
        """Return the seconds since the last lap and add them to those of `stage`."""
        now = self._current_time()
        seconds, self._lap_start = now - self._lap_start, now
        self.seconds[stage] += seconds
        return seconds

    def _current_time(self) -> float:
        wait_for_device(self.device)
        return time.perf_counter()


class Evaluator(SplitCounter):
    """Scores the images of one rank with a record of each, and combines all ranks at the end.

    Args:
        config: which subsets of the scales to score, and what else to count.
        device: the device of predictions and labels.
    """

    def __init__(self, config: EvalConfig, num_classes: int, device: torch.device) -> None:
        super().__init__(num_classes, device)
        self.config = config
        self.subsets, self.takes_label_confidence = config.also_scales, config.label_errors
        self.subset_confusions = [ConfusionMatrix(num_classes).to(device) for _ in self.subsets]
        self.boundary = BoundaryIoU(num_classes).to(device) if config.boundary_iou else None
        self.images: list[ImageRecord] = []
        self.unreadable: list[UnreadableImage] = []
        self.label_errors = LabelErrorList()
        self.stopwatch = Stopwatch(device)

    def add(self, samples: Sequence[EvalSample], predictions: Sequence[Sequence[ClassMap]]) -> None:
        """Score images right after they were predicted together; what follows the scores is not timed."""
        network_seconds = self.stopwatch.lap("network") / max(1, len(samples))
        for sample, class_maps in zip(samples, predictions, strict=True):
            self._score_image(sample, class_maps, network_seconds)
        if self.takes_label_confidence:
            for sample, (class_map, *_) in zip(samples, predictions, strict=True):
                self._find_label_errors(sample, class_map)

    def _score_image(self, sample: EvalSample, class_maps: Sequence[ClassMap], network_seconds: float) -> None:
        """Score one image, for which the network took `network_seconds`."""
        class_map, *others = class_maps
        counts = self.count_image(sample, class_map)
        for confusion, other in zip(self.subset_confusions, others, strict=True):
            confusion.update(confusion_counts(other.ids, sample.label, self.num_classes))
        if self.boundary is not None:
            ratio = self.config.boundary_ratio
            self.boundary.update(boundary_counts(class_map.ids, sample.label, self.num_classes, ratio))
        maps = shrink_maps(sample.label, class_map.ids) if sample.position < MAX_MAPS else None
        self._record_image(sample, Size(*sample.label.shape), counts, maps, network_seconds)

    def add_counted(self, sample: EvalSample, counts: WindowCounts) -> None:
        """Score an image right after it was read, predicted and counted by window."""
        network_seconds = self.stopwatch.lap("network")
        super().add_counted(sample, counts)
        maps = counts.maps if sample.position < MAX_MAPS else None
        self._record_image(sample, counts.size, CountedImage(counts.matrix, NO_SCORES), maps, network_seconds)

    def _record_image(
        self, sample: EvalSample, size: Size, counts: CountedImage, maps: ClassMaps | None, network_seconds: float
    ) -> None:
        matrix = counts.matrix.cpu()
        scores = scores_from(matrix, "present")
        self.images.append(
            ImageRecord(
                position=sample.position,
                path=sample.path,
                height=size.height,
                width=size.width,
                pixel_accuracy=scores.pixel_accuracy,
                mean_iou=scores.mean_iou,
                seconds=network_seconds + self.stopwatch.lap("scoring"),
                class_counts=class_counts(matrix),
                maps=maps,
                own=counts.own,
            )
        )

    def _find_label_errors(self, sample: EvalSample, prediction: ClassMap) -> None:
        """Look for regions of an image whose label may be wrong.

        Args:
            prediction: with the confidence in the label.
        """
        assert prediction.label_confidence is not None, "predicted with labels"
        found = find_label_errors(
            sample.label.cpu().numpy(),
            prediction.ids.cpu().numpy(),
            prediction.confidence.cpu().numpy(),
            prediction.label_confidence.cpu().numpy(),
            position=sample.position,
            file=sample.path,
            above=self.label_errors.threshold,
        )
        self.label_errors.add(found)

    def add_unreadable(self, sample: EvalSample) -> None:
        """Record an image that could not be read."""
        super().add_unreadable(sample)
        self.unreadable.append(UnreadableImage(sample.position, sample.path, sample.bad))

    def result(self) -> SplitCounts:
        """Combine the counts of all ranks. Every rank must call it, and each gets the whole result."""
        local = RankRecords(self.images, self.unreadable, self.stopwatch.seconds, self.label_errors.kept)
        ranks = gather_records(local)
        images = sorted((image for rank in ranks for image in rank.images), key=lambda image: image.position)
        unreadable = sorted((image for rank in ranks for image in rank.unreadable), key=lambda image: image.position)
        return SplitCounts(
            counts=[self.sum_counts(), *(confusion.compute() for confusion in self.subset_confusions)],
            boundary=None if self.boundary is None else self.boundary.compute(),
            images=images,
            speed=speed_of(len(images), [rank.seconds for rank in ranks]),
            unreadable=unreadable,
            thresholds=self.sum_threshold_counts(),
            label_errors=merge_label_errors([rank.label_errors for rank in ranks])
            if self.config.label_errors
            else None,
        )


def shrink_maps(label: Tensor, prediction: Tensor) -> ClassMaps:
    """Encode two (H, W) maps of class indices with long edges of at most MAP_EDGE, without mixing classes."""
    rows, columns = plan_shrinking(Size(*label.shape), label.device)
    small = (ids[rows[:, None], columns].to("cpu", torch.int32).numpy() for ids in (label, prediction))
    return encode_maps(*small)


class RankRecords(NamedTuple):
    """What one rank contributes to the result of a split."""

    images: list[ImageRecord]
    unreadable: list[UnreadableImage]
    seconds: dict[str, float]  # by STAGES
    label_errors: list[LabelError]


def gather_records(local: RankRecords) -> list[RankRecords]:
    """The records of every rank, in the order of the ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [local]
    ranks = [local] * dist.get_world_size()
    dist.all_gather_object(ranks, local)
    return ranks


def speed_of(num_images: int, seconds_by_rank: Sequence[dict[str, float]]) -> Speed:
    """The speed of ranks that ran concurrently, from the seconds of each rank by stage.

    The slowest rank determines the images per second.
    """
    slowest = max(sum(seconds.values()) for seconds in seconds_by_rank)
    per_image = {stage: sum(seconds[stage] for seconds in seconds_by_rank) / max(1, num_images) for stage in STAGES}
    return Speed(num_images / slowest if slowest else 0.0, per_image)
