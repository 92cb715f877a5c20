"""Stage 5: the preprocessing of pixels on the device, from stored bytes to the values that a network was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from semseg.config.preprocessing import Preprocessing

BYTE_ERROR = 1e-3  # distance from a whole number below which a restored value was a byte


def normalise(image: Tensor, convention: Preprocessing, size: Tensor | None = None) -> Tensor:
    """Apply a preprocessing to a batch of images.

    Args:
        image: (N, 3, H, W) uint8 RGB, or (N, bands, H, W) of uint8, uint16, int16 or float32; its memory format is
            kept.
        convention: channel order, ranges, scale, mean and standard deviation.
        size: (N, 2) valid height and width of each image; pixels outside of it become exactly 0.

    Returns:
        (N, bands, H, W) float32.
    """
    values = to_bytes_range(image, convention) if convention.ranges else image
    ordered = values.flip(1) if convention.channel_order == "bgr" else values
    pixels = ordered.to(torch.float32, copy=ordered is image)
    mean, std = (create_channel_values(values, pixels) for values in (convention.mean, convention.std))
    pixels = pixels.mul_(convention.scale).sub_(mean).div_(std)
    if size is not None:
        pixels.mul_(valid_mask(size, pixels))
    return pixels


def to_bytes_range(image: Tensor, convention: Preprocessing) -> Tensor:
    """(N, bands, H, W) of any pixel type to float32 from 0 to 255, which are the ends of the range of each band."""
    pixels = image.float()
    low = create_channel_values([ends.low for ends in convention.ranges], pixels)
    span = create_channel_values([ends.high - ends.low for ends in convention.ranges], pixels)
    shifted = pixels - low if pixels is image else pixels.sub_(low)  # a batch of float32 stays as it is
    return shifted.div_(span).mul_(255).clamp_(0, 255)


def restore_values(image: Tensor, convention: Preprocessing) -> Tensor:
    """The inverse of `normalise`: the values that an image had.

    Bytes are exact. Padding, which is 0 in `image`, becomes the mean of each band.

    Args:
        image: (N, bands, H, W) of a floating type.

    Returns:
        (N, bands, H, W) float32: values of files, with what is beyond the ranges cut off.
    """
    pixels = image.float()
    mean, std = (create_channel_values(values, pixels) for values in (convention.mean, convention.std))
    pixels = pixels.mul(std).add_(mean).div_(convention.scale)
    if convention.channel_order == "bgr":
        pixels = pixels.flip(1)
    if convention.ranges:
        low = create_channel_values([ends.low for ends in convention.ranges], pixels)
        span = create_channel_values([ends.high - ends.low for ends in convention.ranges], pixels)
        return pixels.div_(255).mul_(span).add_(low)
    whole = pixels.round()
    return torch.where((pixels - whole).abs() < BYTE_ERROR, whole, pixels)


def create_channel_values(values: Sequence[float], like: Tensor) -> Tensor:
    """(1, C, 1, 1) with a value for each channel, of the type and device of `like`.

    The device fills them in: an upload from the host would wait for it at every step.
    """
    return torch.cat([like.new_full((1, 1, 1, 1), value) for value in values], dim=1)


def valid_mask(size: Tensor, like: Tensor) -> Tensor:
    """(N, 1, H, W): 1 for pixels of `like` (N, C, H, W) that belong to the image, 0 for padding."""
    height, width = like.shape[-2:]
    rows = torch.arange(height, device=like.device) < size[:, :1].to(like.device)  # (N, H)
    columns = torch.arange(width, device=like.device) < size[:, 1:].to(like.device)  # (N, W)
    return (rows[:, None, :, None] & columns[:, None, None, :]).to(like.dtype)
