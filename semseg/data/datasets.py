"""The two data sets: thin, over plan, images and collate.

TrainDataset is asked for a whole sub-batch, EvalDataset for one image at every scale; neither has state or randomness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from semseg.data.augment import Augmentation
from semseg.data.batch import Batch, Sample
from semseg.data.geometry import Size, scaled_size, stretched_size
from semseg.data.images import (
    MAX_PIXELS,
    flipped,
    padded_label,
    read_pair,
    read_reduced,
    resize_image,
    resize_label,
    scaled_label,
    stride_label,
)
from semseg.data.label_cache import LabelCache
from semseg.data.label_map import IGNORED, LabelMap
from semseg.data.plan import SubBatch
from semseg.data.records import Record
from semseg.data.shared_slots import Slot, received, sent
from semseg.errors import DataError

Collate = Callable[[Sequence[Sample], int, int], Batch]


class TrainDataset(Dataset[Batch]):
    """Item `sub_batch` is the batch that the plan asks for.

        DataLoader(dataset, batch_size=None, sampler=RankSequence(plan, ...))

    Args:
        records: every one with a label.
        collate: samples, size_divisor and label_stride to a batch; see `semseg.collate`.
        max_long_edge: pixels; the long side of an image never gets longer.
        size_divisor: height and width of a batch are multiples of it.
        label_stride: pixels of the image to one of the label; divides size_divisor.
        exact: decode images in full and resize in two steps, as the original does; else by the shorter ways of
            `read_reduced` and `scaled_label`, which give the same labels, and images that differ by little.
        augmentation: further changes of each image; images are decoded in full then.
        skip_bad: leave images out that cannot be read, instead of raising.
        max_pixels: larger images count as bad.
        cache: where labels are kept once they were read.

    Raises:
        DataError: if a record has no label.
        ValueError: if label_stride does not divide size_divisor.
    """

    def __init__(
        self,
        records: Sequence[Record],
        label_map: LabelMap,
        *,
        collate: Collate,
        max_long_edge: int,
        size_divisor: int,
        label_stride: int,
        exact: bool = True,
        augmentation: Augmentation | None = None,
        skip_bad: bool = False,
        max_pixels: int = MAX_PIXELS,
        cache: LabelCache | None = None,
    ) -> None:
        unlabelled = next((record for record in records if record.label is None), None)
        if unlabelled is not None:
            raise DataError(f"{unlabelled.origin}: {unlabelled.image} has no label, so it cannot be trained on.")
        if size_divisor % label_stride:
            raise ValueError(f"label_stride {label_stride} must divide size_divisor {size_divisor}")
        self.records, self.label_map, self.collate = records, label_map, collate
        self.max_long_edge, self.size_divisor, self.label_stride = max_long_edge, size_divisor, label_stride
        self.augmentation, self.cache = augmentation, cache
        self.exact, self.skip_bad, self.max_pixels = exact, skip_bad, max_pixels

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, sub_batch: SubBatch) -> Batch:
        """The batch of a sub-batch of the plan.

        With `skip_bad` it holds those of its images that can be read: the sub-batches after it stay what they are. If
        that is none, it is one black image with nothing to score, so that all ranks still take the step.

        Raises:
            DataError: if a file is missing, broken, or does not fit; see `read_pair`.
        """
        samples: list[Sample] = []
        bad: list[str] = []
        for place, index in enumerate(sub_batch.records):
            try:
                samples.append(self._sample(self.records[index], sub_batch, place))
            except DataError as error:
                if not self.skip_bad:
                    raise
                bad.append(str(error))
        if not samples:
            samples = [self._blank(self.records[sub_batch.records[0]], sub_batch.short_edge)]
        return self.collate(samples, self.size_divisor, self.label_stride)._replace(bad=tuple(bad))

    def _blank(self, record: Record, short_edge: int) -> Sample:
        """A black image of the size that the record would have, nowhere scored."""
        size = scaled_size(record.size, short_edge, self.max_long_edge)
        label = stride_label(np.full(size, IGNORED, np.int16), self.label_stride)
        return Sample(np.zeros((*size, 3), np.uint8), label, record.image)

    def _sample(self, record: Record, sub_batch: SubBatch, place: int) -> Sample:
        if self.augmentation is not None:
            return self._augmented_sample(record, sub_batch, place, self.augmentation)
        make = self._exact_sample if self.exact else self._fast_sample
        return make(record, sub_batch.short_edge, sub_batch.flips[place])

    def _augmented_sample(self, record: Record, sub_batch: SubBatch, place: int, change: Augmentation) -> Sample:
        image, label = self._read(record, sub_batch.flips[place])
        factor = change.scale(sub_batch.number, place)
        size = scaled_size(
            Size(*label.shape), max(1, round(sub_batch.short_edge * factor)), max(1, round(self.max_long_edge * factor))
        )
        image, label = resize_image(image, size, antialias=True, fast=not self.exact), resize_label(label, size)
        image, label = change(image, label, sub_batch.number, place)
        return Sample(image, stride_label(label, self.label_stride), record.image)

    def _fast_sample(self, record: Record, short_edge: int, is_flipped: bool) -> Sample:
        image, label = read_reduced(
            record,
            lambda full: scaled_size(full, short_edge, self.max_long_edge),
            self.label_map,
            max_pixels=self.max_pixels,
            cache=self.cache,
        )
        size = scaled_size(label.size, short_edge, self.max_long_edge)
        inside = scaled_label(label, size, self.label_stride, flip=is_flipped)
        image = resize_image(image, size, antialias=True, fast=True)
        image = flipped(image) if is_flipped else image
        return Sample(image, padded_label(inside, size, self.label_stride), record.image)

    def _exact_sample(self, record: Record, short_edge: int, is_flipped: bool) -> Sample:
        image, label = self._read(record, is_flipped)
        size = scaled_size(Size(*label.shape), short_edge, self.max_long_edge)
        # Two nearest resizes in a row, as published: to the image's size, then to the label's stride.
        label = stride_label(resize_label(label, size), self.label_stride)
        return Sample(resize_image(image, size, antialias=True), label, record.image)

    def _read(self, record: Record, is_flipped: bool) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
        """Image and label at their full size, mirrored if that is drawn."""
        image, label = read_pair(record, self.label_map, max_pixels=self.max_pixels, cache=self.cache)
        assert label is not None  # checked for all records at the start
        return (flipped(image), flipped(label)) if is_flipped else (image, label)


class EvalSample(NamedTuple):
    """One image for evaluation or prediction."""

    scales: list[Tensor]  # one for each short edge: uint8 (3, H, W) RGB, H and W multiples of size_divisor
    label: Tensor  # (h, w) int64 at the original size, -1 = not scored; (0, 0) if there is none
    size: Tensor  # (2,) int64: original (h, w), to which the answer is upsampled
    path: str
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - in the list of records; hides tuple.index
    bad: str = ""  # what is wrong with an image that is left out; then there are no scales, and the label is (0, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        """How a worker hands it over: all pixels as one tensor in shared memory."""
        label = self.label.to(torch.int16).view(torch.uint8)
        pixels = torch.cat([part.flatten() for part in (label, *self.scales)])
        sizes = [tuple(part.shape) for part in self.scales]
        return _handed_over, (sent(pixels), tuple(self.label.shape), sizes, self.size.tolist(), *self[3:])


def _handed_over(
    parcel: Tensor | Slot, label_size: tuple[int, ...], sizes: list[tuple[int, ...]], original: list[int], *rest: Any
) -> EvalSample:
    pixels = received(parcel)
    begin = math.prod(label_size) * torch.int16.itemsize
    label = pixels[:begin].view(torch.int16).view(label_size).long()
    parts = pixels[begin:].split([math.prod(size) for size in sizes])
    scales = [part.view(size) for part, size in zip(parts, sizes, strict=True)]
    return EvalSample(scales, label, torch.tensor(original), *rest)


class EvalDataset(Dataset[EvalSample]):
    """Item `index` is one image, stretched to every scale, with its label at the original size.

    Without a label map, or where a record has no label (prediction), the image is turned upright.

    Args:
        short_edges: pixels, one scale for each.
        max_long_edge: pixels; the long side never gets longer, apart from rounding up to size_divisor.
        antialias: of the input convention that belongs to the weights.
        skip_bad: hand over what is wrong with an image that cannot be read, instead of raising.
        max_pixels: larger images count as bad.
        cache: where labels are kept once they were read.
    """

    def __init__(
        self,
        records: Sequence[Record],
        label_map: LabelMap | None,
        *,
        short_edges: Sequence[int],
        max_long_edge: int,
        size_divisor: int,
        antialias: bool,
        skip_bad: bool = False,
        max_pixels: int = MAX_PIXELS,
        cache: LabelCache | None = None,
    ) -> None:
        self.records, self.label_map, self.short_edges = records, label_map, tuple(short_edges)
        self.skip_bad, self.max_pixels, self.cache = skip_bad, max_pixels, cache
        self.max_long_edge, self.size_divisor, self.antialias = max_long_edge, size_divisor, antialias

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EvalSample:
        """The sample of record `index`.

        Raises:
            DataError: if a file is missing, broken, or does not fit; see `read_pair`.
        """
        record = self.records[index]
        try:
            pair = read_pair(record, self.label_map, max_pixels=self.max_pixels, cache=self.cache)
        except DataError as error:
            if not self.skip_bad:
                raise
            nothing = torch.empty(0, 0, dtype=torch.int64)
            return EvalSample([], nothing, torch.zeros(2, dtype=torch.int64), record.image, index, str(error))
        label = torch.empty(0, 0, dtype=torch.int64) if pair.label is None else torch.from_numpy(pair.label).long()
        size = torch.tensor(pair.image.shape[:2])
        scales = at_scales(
            pair.image, self.short_edges, self.max_long_edge, self.size_divisor, antialias=self.antialias
        )
        return EvalSample(scales, label, size, record.image, index)


def at_scales(
    image: NDArray[np.uint8], short_edges: Sequence[int], max_long_edge: int, size_divisor: int, *, antialias: bool
) -> list[Tensor]:
    """An image (H, W, 3) stretched to every scale: uint8 (3, h, w), h and w multiples of `size_divisor`."""
    original = Size(*image.shape[:2])
    sizes = [stretched_size(original, edge, max_long_edge, size_divisor) for edge in short_edges]
    resized = (resize_image(image, size, antialias=antialias) for size in sizes)
    return [torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))) for pixels in resized]
