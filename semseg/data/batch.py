"""What the data sets produce: a sample, the batch that a device trains on, and an image to evaluate."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The type of labels on their way to the device, a quarter of that in which losses take them.
LABEL_TYPE = torch.int16


class Sample(NamedTuple):
    """One training image, flipped and resized."""

    image: NDArray  # (H, W, 3) uint8 RGB, or (H, W, bands) of the type of the files
    label: NDArray[np.int16]  # (ceil(H / label_stride), ceil(W / label_stride)), class index or -1
    path: str


class Batch(NamedTuple):
    """What one device trains on in one step. It is normalised on the device; `size` says where padding begins.

    What loaders give has labels of LABEL_TYPE; SegmentationData widens them on the device, before anything uses them.
    """

    # (N, 3, H, W) uint8 RGB, or (N, bands, H, W) of the type of the files. Outside the image 0; set that to 0 again
    # after normalisation.
    image: Tensor
    label: Tensor  # (N, H / label_stride, W / label_stride) int64, -1 = not scored (like all padding)
    size: Tensor  # (N, 2) int64: height and width of the image, which is at the top left of the canvas
    paths: list[str]
    bad: tuple[str, ...] = ()  # error messages of images that were left out


class EvalSample(NamedTuple):
    """One image for evaluation or prediction. What loaders give has labels of LABEL_TYPE, like those of `Batch`."""

    scales: list[Tensor]  # one for each short edge: (3, H, W) uint8 RGB, or bands; H and W multiples of size_divisor
    label: Tensor  # (h, w) int64 at the original size, -1 = not scored; (0, 0) if there is none
    size: Tensor  # (2,) int64: original (h, w), to which predictions are upsampled
    path: str
    position: int  # in the list of records
    bad: str = ""  # error message of an image that is left out; it has no scales and a label of (0, 0)
    is_by_window: bool = False  # too large to be read here: whoever evaluates it reads it by window; no scales either
