"""Stage 3: images at another size."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from semseg.data.geometry import Size


def resize_image(image: NDArray, size: Size, *, antialias: bool, fast: bool = False) -> NDArray:
    """(H, W, bands) to (size, bands) of the same type, bilinear.

    Args:
        image: uint8, uint16, int16 or float32.
        antialias: average over the source pixels when shrinking, within one grey level of Pillow (training, and
            evaluation since 2020); False reproduces the 2018 evaluation exactly.
        fast: enlarge with OpenCV, whose rounding occasionally differs by one grey level.
    """
    if image.shape[:2] == size:
        return image
    if not antialias or (fast and size.height >= image.shape[0] and size.width >= image.shape[1]):
        resized = cv2.resize(image, (size.width, size.height), interpolation=cv2.INTER_LINEAR)
        return np.asarray(resized, image.dtype).reshape(*size, image.shape[2])  # OpenCV drops a single band
    is_native = image.dtype in (np.uint8, np.float32)
    pixels = image if is_native else image.astype(np.float32)  # exact; PyTorch averages no other integers
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, C, H, W), a view: channels_last is the fast path
    resized = F.interpolate(planes, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)
    averaged = resized[0].permute(1, 2, 0).numpy()  # stored as planes, like a batch: see `mirror` and `collate`
    return averaged if is_native else np.rint(averaged).astype(image.dtype)
