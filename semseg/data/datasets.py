"""The two data sets, which combine plan, images and collate.

TrainDataset returns a whole sub-batch, EvalDataset one image at every scale; neither has state or randomness.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from semseg.data.augment import Augmentation, crop_size, mix_samples
from semseg.data.bands import BandOptions
from semseg.data.batch import Batch, EvalSample, Sample
from semseg.data.crops import CropPlan, cut_size
from semseg.data.geometry import Size, scaled_size, stretched_size
from semseg.data.images import MAX_PIXELS, mirror
from semseg.data.label_cache import LabelCache
from semseg.data.label_map import IGNORED, LabelMap
from semseg.data.labels import pad_label, resize_and_subsample_label, resize_label, subsample_label
from semseg.data.open_pairs import open_pair
from semseg.data.pairs import ImagePair, read_pair, read_reduced
from semseg.data.plan import SubBatch
from semseg.data.records import Record
from semseg.data.resize import resize_image
from semseg.errors import DataError
from semseg.system.memory import report_out_of_memory_as

Collate = Callable[[Sequence[Sample], int, int], Batch]


@dataclass(frozen=True)
class ReadOptions:
    """How both data sets read and resize images."""

    max_long_edge: int
    """Limit of the long side of an image in pixels."""

    size_divisor: int
    """Height and width of network inputs are multiples of it."""

    skip_bad: bool = False
    """Leave out images that cannot be read, instead of raising."""

    max_pixels: int = MAX_PIXELS
    """Larger images count as bad."""

    cache: LabelCache | None = None
    """Stores labels that were read before."""

    bands: BandOptions | None = None
    """The bands of images; None: they are 8-bit RGB."""


class TrainDataset(Dataset[Batch]):
    """Item `sub_batch` is the batch that the plan asks for.

        DataLoader(dataset, batch_size=None, sampler=RankSequence(plan, ...))

    Args:
        records: each with a label.
        collate: samples, size_divisor and label_stride to a batch; see `semseg.collate`.
        label_stride: image pixels per label pixel; divides size_divisor.
        exact: decode images in full and resize in two steps, like the original; if not, use the faster `read_reduced`
            and `resize_and_subsample_label`, which give the same labels and nearly the same images.
        augmentation: further transforms of each image; images are then decoded in full.
        crops: take these parts of the images at their own resolution; None: whole images at a short edge.

    Raises:
        DataError: if a record has no label.
        ValueError: if label_stride does not divide size_divisor.
    """

    def __init__(
        self,
        records: Sequence[Record],
        label_map: LabelMap,
        options: ReadOptions,
        *,
        collate: Collate,
        label_stride: int,
        exact: bool = True,
        augmentation: Augmentation | None = None,
        crops: CropPlan | None = None,
    ) -> None:
        unlabelled = next((record for record in records if record.label is None), None)
        if unlabelled is not None:
            raise DataError(f"{unlabelled.origin}: {unlabelled.image} has no label, so it cannot be trained on.")
        if options.size_divisor % label_stride:
            raise ValueError(f"label_stride {label_stride} must divide size_divisor {options.size_divisor}")
        self.records, self.label_map, self.options, self.collate = records, label_map, options, collate
        self.label_stride, self.exact, self.augmentation, self.crops = label_stride, exact, augmentation, crops

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, sub_batch: SubBatch) -> Batch:
        """The batch of a sub-batch of the plan.

        With `skip_bad`, images that cannot be read are left out; later sub-batches do not change. If none can be read,
        the batch is one black image with nothing to score, so that all ranks still take the step.

        Raises:
            DataError: if a file is missing, broken, or has the wrong size; see `read_pair`.
            OutOfMemoryError: if there is not enough memory for an image, which is not left out for that.
        """
        samples: list[Sample] = []
        bad: list[str] = []
        for position, index in enumerate(sub_batch.records):
            try:
                with report_out_of_memory_reading(self.records[index].image):
                    samples.append(self._read_sample(self.records[index], sub_batch, position))
            except DataError as error:
                if not self.options.skip_bad:
                    raise
                bad.append(str(error))
        if not samples:
            samples = [self._blank_sample(self.records[sub_batch.records[0]], sub_batch.short_edge)]
        augment = self.augmentation
        if augment is not None and augment.config.cutmix:
            share, seed = augment.config.cutmix, augment.seed
            samples = mix_samples(samples, share, self.label_stride, seed, sub_batch.number)
        return self.collate(samples, self.options.size_divisor, self.label_stride)._replace(bad=tuple(bad))

    def _blank_sample(self, record: Record, short_edge: int) -> Sample:
        """A black image of the size that the record would have unscaled, with all pixels ignored."""
        size, bands = self._training_size(record.size, short_edge), self.options.bands
        if self.augmentation is not None and self.augmentation.config.crop is not None:
            size = crop_size(size, self.augmentation.config.crop)
        if self.crops is not None:
            size = Size(*(cut_size(*sides, factor=1.0)[1] for sides in zip(record.size, self.crops.crop, strict=True)))
        label = subsample_label(np.full(size, IGNORED, np.int16), self.label_stride)
        pixel = np.zeros(3, np.uint8) if bands is None else bands.fill_values(np.dtype(bands.dtype or "uint8"))
        return Sample(np.tile(pixel, (*size, 1)), label, record.image)

    def _read_sample(self, record: Record, sub_batch: SubBatch, position: int) -> Sample:
        if self.crops is not None:
            return self._cropped_sample(record, sub_batch, position, self.crops)
        if self.augmentation is not None:
            return self._augmented_sample(record, sub_batch, position, self.augmentation)
        read = self._exact_sample if self.exact else self._fast_sample
        return read(record, sub_batch.short_edge, is_flipped=sub_batch.flips[position])

    def _augmented_sample(self, record: Record, sub_batch: SubBatch, position: int, augment: Augmentation) -> Sample:
        image, label = self._read_mirrored(record, is_flipped=sub_batch.flips[position])
        factor = augment.draw_scale(sub_batch.number, position)
        short_edge = max(1, round(sub_batch.short_edge * factor))
        max_long_edge = max(1, round(self.options.max_long_edge * factor))
        size = scaled_size(Size(*label.shape), short_edge, max_long_edge)
        image, label = resize_image(image, size, antialias=True, fast=not self.exact), resize_label(label, size)
        image, label = augment(image, label, sub_batch.number, position)
        return Sample(image, subsample_label(label, self.label_stride), record.image)

    def _cropped_sample(self, record: Record, sub_batch: SubBatch, position: int, crops: CropPlan) -> Sample:
        """A part of an image at its own resolution, apart from augment.scale.

        Raises:
            DataError: as `read_pair`.
        """
        augment, number, options = self.augmentation, sub_batch.number, self.options
        factor = 1.0 if augment is None else augment.draw_scale(number, position)
        with open_pair(
            record, self.label_map, max_pixels=options.max_pixels, cache=options.cache, bands=options.bands
        ) as pair:
            crop = crops.draw(sub_batch.records[position], pair.size, factor, number, position)
            image, label = pair.read(crop.window)
        if sub_batch.flips[position]:
            image, label = mirror(image), mirror(label)
        if crop.size != label.shape:
            image = resize_image(image, crop.size, antialias=True, fast=not self.exact)
            label = resize_label(label, crop.size)
        if augment is not None:
            image, label = augment(image, label, number, position)
        return Sample(image, subsample_label(label, self.label_stride), record.image)

    def _fast_sample(self, record: Record, short_edge: int, *, is_flipped: bool) -> Sample:
        image, label = read_reduced(
            record,
            lambda full: self._training_size(full, short_edge),
            self.label_map,
            max_pixels=self.options.max_pixels,
            cache=self.options.cache,
            bands=self.options.bands,
        )
        size = self._training_size(label.size, short_edge)
        inside = resize_and_subsample_label(label, size, self.label_stride, flip=is_flipped)
        image = resize_image(image, size, antialias=True, fast=True)
        image = mirror(image) if is_flipped else image
        return Sample(image, pad_label(inside, size, self.label_stride), record.image)

    def _exact_sample(self, record: Record, short_edge: int, *, is_flipped: bool) -> Sample:
        image, label = self._read_mirrored(record, is_flipped=is_flipped)
        size = self._training_size(Size(*label.shape), short_edge)
        # Two nearest resizes in a row, like the original: to the size of the image, then to the label stride.
        label = subsample_label(resize_label(label, size), self.label_stride)
        return Sample(resize_image(image, size, antialias=True), label, record.image)

    def _training_size(self, size: Size, short_edge: int) -> Size:
        return scaled_size(size, short_edge, self.options.max_long_edge)

    def _read_mirrored(self, record: Record, *, is_flipped: bool) -> tuple[NDArray, NDArray[np.int16]]:
        """Image and label at full size, mirrored if `is_flipped`."""
        image, label = _read_pair(record, self.label_map, self.options)
        assert label is not None  # checked for all records at the start
        return (mirror(image), mirror(label)) if is_flipped else (image, label)


class EvalDataset(Dataset[EvalSample]):
    """Item `index` is one image, stretched to every scale, with its label at the original size.

    Without a label map, or if a record has no label (prediction), the image is rotated upright.

    Args:
        short_edges: pixels, one scale for each; none: the image as it is, for windows.
        antialias: as in the preprocessing that belongs to the weights.
        label_type: that of the labels; loaders pass on LABEL_TYPE, which the device widens.
        by_window: the images, by their index, that are not read here, because they are too large to be held whole.
    """

    def __init__(
        self,
        records: Sequence[Record],
        label_map: LabelMap | None,
        options: ReadOptions,
        *,
        short_edges: Sequence[int],
        antialias: bool,
        label_type: torch.dtype = torch.int64,
        by_window: Collection[int] = (),
    ) -> None:
        self.records, self.label_map, self.options, self.by_window = records, label_map, options, by_window
        self.short_edges, self.antialias, self.label_type = tuple(short_edges), antialias, label_type

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EvalSample:
        """The sample of record `index`; with `skip_bad`, an image that cannot be read gives a sample without scales.

        Raises:
            DataError: if a file is missing, broken, or has the wrong size; see `read_pair`.
            OutOfMemoryError: as `TrainDataset`.
        """
        with report_out_of_memory_reading(self.records[index].image):
            return self._read_sample(index)

    def _read_sample(self, index: int) -> EvalSample:
        record, options = self.records[index], self.options
        no_label = torch.empty(0, 0, dtype=self.label_type)
        if index in self.by_window:
            return EvalSample([], no_label, torch.tensor(record.size), record.image, index, is_by_window=True)
        try:
            image, label = _read_pair(record, self.label_map, options)
        except DataError as error:
            if not options.skip_bad:
                raise
            return EvalSample([], no_label, torch.zeros(2, dtype=torch.int64), record.image, index, str(error))
        scales = resize_to_scales(
            image, self.short_edges, options.max_long_edge, options.size_divisor, antialias=self.antialias
        )
        label = no_label if label is None else torch.from_numpy(label).to(self.label_type)
        return EvalSample(scales, label, torch.tensor(image.shape[:2]), record.image, index)


def report_out_of_memory_reading(path: str | Path) -> AbstractContextManager[None]:
    """A context in which running out of memory is an OutOfMemoryError that names an image."""
    return report_out_of_memory_as(
        lambda: f"{path}: out of memory reading it. Leave out what is too large, or lower data.num_workers."
    )


def _read_pair(record: Record, label_map: LabelMap | None, options: ReadOptions) -> ImagePair:
    return read_pair(record, label_map, max_pixels=options.max_pixels, cache=options.cache, bands=options.bands)


def resize_to_scales(
    image: NDArray, short_edges: Sequence[int], max_long_edge: int, size_divisor: int, *, antialias: bool
) -> list[Tensor]:
    """An image (H, W, C) stretched to every scale: (C, h, w) of its type, h and w multiples of `size_divisor`.

    Without short edges: the image itself, for networks that see it at its own resolution.
    """
    if not short_edges:
        return [torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))]
    original = Size(*image.shape[:2])
    sizes = [stretched_size(original, edge, max_long_edge, size_divisor) for edge in short_edges]
    resized = (resize_image(image, size, antialias=antialias) for size in sizes)
    return [torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))) for pixels in resized]
