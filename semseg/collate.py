"""Stage 4: combine the samples of a sub-batch into a batch, padded to a common canvas."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import torch

from semseg.data.batch import Batch, Sample
from semseg.data.geometry import Size, canvas_size, label_size
from semseg.data.label_map import IGNORED

__all__ = ["Batch", "Sample", "collate"]


def collate(
    samples: Sequence[Sample], size_divisor: int, label_stride: int, label_type: torch.dtype = torch.int64
) -> Batch:
    """Put every sample into the top left corner of a canvas, the smallest that contains all of them.

    Args:
        label_type: that of the labels; loaders pass on LABEL_TYPE, which the device widens.

    Raises:
        ValueError: if label_stride does not divide size_divisor.

    >>> small = Sample(np.ones((3, 5, 3), np.uint8), np.ones((3, 5), np.int16), "a.jpg")
    >>> collate([small], size_divisor=4, label_stride=1).image.shape
    torch.Size([1, 3, 4, 8])
    """
    sizes = [Size(*sample.image.shape[:2]) for sample in samples]
    canvas = canvas_size(sizes, size_divisor)
    label_canvas = label_size(canvas, label_stride)
    first = samples[0].image
    image = torch.zeros(len(samples), first.shape[2], *canvas, dtype=getattr(torch, first.dtype.name))
    label = torch.full((len(samples), *label_canvas), IGNORED, dtype=label_type)
    for index, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
        inside = image[index, :, : size.height, : size.width]
        if sample.image.flags.c_contiguous:
            cv2.split(sample.image, list(inside.numpy()))  # seven times as fast as a strided copy
        else:
            inside.copy_(torch.from_numpy(sample.image).permute(2, 0, 1))
        height, width = sample.label.shape
        label[index, :height, :width] = torch.from_numpy(sample.label)
    return Batch(image, label, torch.tensor(sizes), [sample.path for sample in samples])
