"""Stage 3, by option: training images that are changed at random, with torchvision's v2 transforms.

What is drawn depends on the seed, the number of the sub-batch and the place in it alone: workers, devices and resumes
change nothing.
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

AUGMENT = 3  # stream of randomness, beside those of the plan
LARGEST_BLUR = 4.0  # radius of the blur's kernel in standard deviations


class Augmented(NamedTuple):
    """An image and its label after the transforms, on one grid."""

    image: NDArray[np.uint8]  # (H, W, 3) RGB
    label: NDArray[np.int16]  # (H, W), -1 where nothing is scored, corners that a rotation leaves empty among it


class Augmentation:
    """Random changes of one training image.

    Args:
        config: what may change, and how far.
        seed: of the run.
    """

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        changes: list[v2.Transform] = []
        jitter = (config.brightness, config.contrast, config.saturation, config.hue)
        if any(jitter):
            changes.append(v2.ColorJitter(*jitter))
        if config.blur:
            kernel = 2 * math.ceil(LARGEST_BLUR * config.blur_sigma[1] / 2) + 1
            changes.append(v2.RandomApply([v2.GaussianBlur(kernel, tuple(config.blur_sigma))], config.blur))
        if config.rotation:
            fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
            changes.append(v2.RandomRotation(config.rotation, InterpolationMode.BILINEAR, fill=fill))  # pyright: ignore[reportArgumentType]
        self.changes = v2.Compose(changes) if changes else None

    def scale(self, number: int, place: int) -> float:
        """What the short edge and the limit of the long one are multiplied by.

        Args:
            number: of the sub-batch.
            place: of the image in it.
        """
        low, high = self.config.scale
        share = number_for(self.seed, AUGMENT, number, place, 0) / 2**63
        return low + (high - low) * share

    def __call__(self, image: NDArray[np.uint8], label: NDArray[np.int16], number: int, place: int) -> Augmented:
        """An image (H, W, 3) and its label (H, W) at the size of training, changed and cut."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number_for(self.seed, AUGMENT, number, place, 1))
            picture = tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1))
            mask = tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(label))[None])
            if self.changes is not None:
                picture, mask = self.changes(picture, mask)
            if self.config.crop is not None:
                window = cropped(Size(*label.shape), self.config.crop)
                picture, mask = v2.RandomCrop(tuple(window))(picture, mask)
        return Augmented(picture.permute(1, 2, 0).contiguous().numpy(), mask[0].contiguous().numpy())


def cropped(size: Size, crop: list[int]) -> Size:
    """The part of an image that is left: nothing is added to smaller ones."""
    return Size(min(size.height, crop[0]), min(size.width, crop[1]))
