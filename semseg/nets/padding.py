"""Images of any size for networks that take some sizes only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pad_image(image: Tensor, divisor: int, min_size: int = 1) -> Tensor:
    """(N, 3, H, W) padded below and on the right with 0, the mean colour, to multiples of `divisor` and `min_size`."""
    below, right = (-side % divisor for side in image.shape[-2:])
    if min_size > 1:
        below, right = max(below, min_size - image.shape[-2]), max(right, min_size - image.shape[-1])
    return F.pad(image, (0, right, 0, below)) if below or right else image


def crop_logits(logits: Tensor, image: Tensor, stride: int) -> Tensor:
    """The logits (N, K, h, w) of a padded image without those of its padding; `image` is the one before."""
    height, width = (-(-length // stride) for length in image.shape[-2:])  # rounded up, as exporters understand it
    return logits[..., :height, :width]
