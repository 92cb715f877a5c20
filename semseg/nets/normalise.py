"""Stage 5: pixels as they are stored to the numbers a network was trained on, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from semseg.config.preprocessing import Preprocessing


def normalise(image: Tensor, convention: Preprocessing, size: Tensor | None = None) -> Tensor:
    """Apply an input convention.

    Args:
        image: (N, 3, H, W) uint8 RGB; its memory format is kept.
        convention: channel order, scale, mean and standard deviation.
        size: (N, 2) valid height and width of each image; what lies outside becomes exactly 0.

    Returns:
        (N, 3, H, W) float32.
    """
    constants = image.new_empty(0, dtype=torch.float32)
    mean = constants.new_tensor(convention.mean).view(1, 3, 1, 1)
    std = constants.new_tensor(convention.std).view(1, 3, 1, 1)
    pixels = (image.flip(1) if convention.channel_order == "bgr" else image).float()
    pixels = pixels.mul_(convention.scale).sub_(mean).div_(std)
    if size is not None:
        pixels.mul_(inside(size, pixels))
    return pixels


def inside(size: Tensor, like: Tensor) -> Tensor:
    """(N, 1, H, W): 1 where a pixel of `like` (N, C, H, W) belongs to the image, 0 where it is padding."""
    height, width = like.shape[-2:]
    rows = torch.arange(height, device=like.device) < size[:, :1].to(like.device)  # (N, H)
    columns = torch.arange(width, device=like.device) < size[:, 1:].to(like.device)  # (N, W)
    return (rows[:, None, :, None] & columns[:, None, None, :]).to(like.dtype)
