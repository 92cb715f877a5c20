"""Stage 3, optional: random augmentation of training images, with torchvision's v2 transforms.

The random numbers depend only on the seed, the number of the sub-batch and the position in it, so that workers, devices
and resuming change nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from semseg.config.schema import AugmentConfig
from semseg.data.geometry import Size
from semseg.data.label_map import IGNORED
from semseg.data.seeding import number_for

AUGMENT_STREAM = 3  # random stream; plan.py defines the others
BLUR_RADIUS = 4.0  # radius of the kernel in standard deviations


class Augmented(NamedTuple):
    """An image and its label after the transforms, on one pixel grid."""

    image: NDArray[np.uint8]  # (H, W, 3) RGB
    label: NDArray[np.int16]  # (H, W), -1 = not scored, which includes corners that a rotation leaves empty


class Augmentation:
    """Random changes of one training image.

    Args:
        config: which transforms to apply, and their strength.
        seed: seed of the run.
    """

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        transforms: list[v2.Transform] = []
        jitter = (config.brightness, config.contrast, config.saturation, config.hue)
        if any(jitter):
            transforms.append(v2.ColorJitter(*jitter))
        if config.blur:
            kernel = 2 * math.ceil(BLUR_RADIUS * config.blur_sigma[1] / 2) + 1
            transforms.append(v2.RandomApply([v2.GaussianBlur(kernel, tuple(config.blur_sigma))], config.blur))
        if config.rotation:
            fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
            transforms.append(v2.RandomRotation(config.rotation, InterpolationMode.BILINEAR, fill=fill))  # pyright: ignore[reportArgumentType]
        self.transforms = v2.Compose(transforms) if transforms else None

    def draw_scale(self, number: int, position: int) -> float:
        """A random factor for the short edge and the limit of the long edge.

        Args:
            number: number of the sub-batch.
            position: position of the image in it.
        """
        low, high = self.config.scale
        fraction = number_for(self.seed, AUGMENT_STREAM, number, position, 0) / 2**63
        return low + (high - low) * fraction

    def __call__(self, image: NDArray[np.uint8], label: NDArray[np.int16], number: int, position: int) -> Augmented:
        """Transform and crop an image (H, W, 3) and its label (H, W) that have their training size.

        Args:
            number: number of the sub-batch.
            position: position of the image in it.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number_for(self.seed, AUGMENT_STREAM, number, position, 1))
            pixels = tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1))
            mask = tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(label))[None])
            if self.transforms is not None:
                pixels, mask = self.transforms(pixels, mask)
            if self.config.crop is not None:
                window = crop_size(Size(*label.shape), self.config.crop)
                pixels, mask = v2.RandomCrop(tuple(window))(pixels, mask)
        return Augmented(pixels.permute(1, 2, 0).contiguous().numpy(), mask[0].contiguous().numpy())


def crop_size(size: Size, crop: list[int]) -> Size:
    """The size of an image after cropping: smaller images are not padded."""
    return Size(min(size.height, crop[0]), min(size.width, crop[1]))
