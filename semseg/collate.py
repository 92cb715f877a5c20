"""Stage 4: samples of one sub-batch to a batch, padded to the canvas that holds them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg.data.classes import IGNORED
from semseg.data.geometry import Size, canvas_size, label_size
from semseg.data.shared_slots import Slot, received, sent


class Sample(NamedTuple):
    """One image as it goes into a batch: flipped and resized already."""

    image: NDArray[np.uint8]  # (H, W, 3) RGB
    label: NDArray[np.int16]  # (ceil(H / label_stride), ceil(W / label_stride)), class index or -1
    path: str


class Batch(NamedTuple):
    """What one device trains on in one step. Normalised on the device; `size` tells where padding begins."""

    image: Tensor  # (N, 3, H, W) uint8 RGB, 0 outside the image: set it to 0 after normalisation too
    label: Tensor  # (N, H / label_stride, W / label_stride) int64, -1 = not scored (all padding is)
    size: Tensor  # (N, 2) int64: height and width of the image within the canvas, top left
    paths: list[str]
    bad: tuple[str, ...] = ()  # what is wrong with images that were left out

    def __reduce__(self) -> tuple[Any, ...]:
        """How a worker hands it over: its pixels in shared memory, the rest as bytes."""
        label = self.label.cpu().numpy().astype(np.int16)  # as it was read: no class has a number above 32767
        return _handed_over, (sent(self.image), label, self.size.tolist(), self.paths, self.bad)


def _handed_over(
    image: Tensor | Slot, label: NDArray[np.int16], size: list[list[int]], paths: list[str], bad: tuple[str, ...]
) -> Batch:
    return Batch(received(image), torch.from_numpy(label).long(), torch.tensor(size), paths, bad)


def collate(samples: Sequence[Sample], size_divisor: int, label_stride: int) -> Batch:
    """Puts every sample into the top left corner of one canvas, the smallest that holds all.

    Raises:
        ValueError: if label_stride does not divide size_divisor.

    >>> small = Sample(np.ones((3, 5, 3), np.uint8), np.ones((3, 5), np.int16), "a.jpg")
    >>> collate([small], size_divisor=4, label_stride=1).image.shape
    torch.Size([1, 3, 4, 8])
    """
    sizes = [Size(*sample.image.shape[:2]) for sample in samples]
    canvas = canvas_size(sizes, size_divisor)
    label_canvas = label_size(canvas, label_stride)
    image = torch.zeros(len(samples), 3, *canvas, dtype=torch.uint8)
    label = torch.full((len(samples), *label_canvas), IGNORED, dtype=torch.int64)
    for place, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
        inside = image[place, :, : size.height, : size.width]
        if sample.image.flags.c_contiguous:
            cv2.split(sample.image, list(inside.numpy()))  # into place, seven times as fast as a strided copy
        else:
            inside.copy_(torch.from_numpy(sample.image).permute(2, 0, 1))
        height, width = sample.label.shape
        label[place, :height, :width] = torch.from_numpy(sample.label)
    return Batch(image, label, torch.tensor(sizes), [sample.path for sample in samples])
