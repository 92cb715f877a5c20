"""What a sub-batch is made of: a sample, one image ready for it, and the batch that a device trains on."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
