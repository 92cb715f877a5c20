"""Stage 5: the preprocessing of pixels on the device, from stored bytes to the values that a network was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from semseg.config.preprocessing import Preprocessing


def normalise(image: Tensor, convention: Preprocessing, size: Tensor | None = None) -> Tensor:
    """Apply a preprocessing to a batch of images.

    Args:
        image: (N, 3, H, W) uint8 RGB; its memory format is kept.
        convention: channel order, scale, mean and standard deviation.
        size: (N, 2) valid height and width of each image; pixels outside of it become exactly 0.

    Returns:
        (N, 3, H, W) float32.
    """
    constants = image.new_empty(0, dtype=torch.float32)
    mean = constants.new_tensor(convention.mean).view(1, 3, 1, 1)
    std = constants.new_tensor(convention.std).view(1, 3, 1, 1)
    pixels = (image.flip(1) if convention.channel_order == "bgr" else image).float()
    pixels = pixels.mul_(convention.scale).sub_(mean).div_(std)
    if size is not None:
        pixels.mul_(valid_mask(size, pixels))
    return pixels


def valid_mask(size: Tensor, like: Tensor) -> Tensor:
    """(N, 1, H, W): 1 for pixels of `like` (N, C, H, W) that belong to the image, 0 for padding."""
    height, width = like.shape[-2:]
    rows = torch.arange(height, device=like.device) < size[:, :1].to(like.device)  # (N, H)
    columns = torch.arange(width, device=like.device) < size[:, 1:].to(like.device)  # (N, W)
    return (rows[:, None, :, None] & columns[:, None, None, :]).to(like.dtype)
