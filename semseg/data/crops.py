"""Stage 3 for images at their own resolution: which part of an image a training step takes.

Where a crop lies is a pure function of the seed, the number of the sub-batch, the position in it, and the size of the
image; only the pixels of the crop are kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from semseg.config.schema import AugmentConfig, DataConfig
from semseg.data.foreground import ForegroundIndex, Pixel
from semseg.data.geometry import Size
from semseg.data.seeding import Stream, generator_for
from semseg.data.windows import Window
from semseg.errors import ConfigError

NATIVE = "native"  # data.resize
DEFAULT_CROP = (512, 512)
DEFAULT_FOREGROUND = 0.33


def choose_crop(data: DataConfig, augment: AugmentConfig, image_size: Size | None = None) -> list[int] | None:
    """[height, width] of the crops of training in pixels; None: whole images.

    Args:
        image_size: the one size that the network takes; None: any.

    Raises:
        ConfigError: if another size is set than the one that the network takes.
    """
    key, chosen = ("augment.crop", augment.crop) if data.crop is None else ("data.crop", data.crop)
    if image_size is not None and chosen not in (None, list(image_size)):
        raise ConfigError(
            f"{key}={chosen}: this network takes images of {image_size.height} x {image_size.width} only. "
            f"Set {key}=null: training crops and pads images to that size."
        )
    if image_size is not None:
        return list(image_size)
    return list(DEFAULT_CROP) if chosen is None and data.resize == NATIVE else chosen


class Crop(NamedTuple):
    """A part of an image, and the size that it is resized to."""

    window: Window  # pixels of the image
    size: Size


def cut_size(length: int, crop: int, factor: float) -> tuple[int, int]:
    """Pixels of a side of `length` that a crop takes, and to how many they are resized by `factor`; at most `crop`.

    >>> cut_size(2000, crop=512, factor=2.0), cut_size(300, crop=512, factor=1.0), cut_size(300, crop=512, factor=0.5)
    ((256, 512), (300, 300), (300, 150))
    """
    taken = min(length, max(1, round(crop / factor)))
    return taken, min(crop, max(1, round(taken * factor)))


def plan_crop(size: Size, crop: Size, factor: float, rng: np.random.Generator, centre: Pixel | None) -> Crop:
    """A crop of an image of `size`, scaled by `factor`: around `centre` as far as the image reaches, or anywhere."""
    tops_and_lefts, taken, resized = [], [], []
    for axis in (0, 1):
        pixels, target = cut_size(size[axis], crop[axis], factor)
        last = size[axis] - pixels
        anywhere = int(rng.integers(last + 1))
        start = anywhere if centre is None else min(max(0, centre[axis] - pixels // 2), last)
        tops_and_lefts.append(start)
        taken.append(pixels)
        resized.append(target)
    return Crop(Window(*tops_and_lefts, *taken), Size(*resized))


class CropPlan:
    """The crops of training.

    Args:
        seed: of the run.
        crop: height and width in pixels.
        foreground: fraction of the crops that is centred on a pixel of a class.
        index: where these pixels are; None with `foreground` 0.
    """

    def __init__(self, seed: int, crop: Size, foreground: float = 0.0, index: ForegroundIndex | None = None) -> None:
        self.seed, self.crop, self.foreground, self.index = seed, crop, foreground, index

    def draw(self, record: int, size: Size, factor: float, number: int, position: int) -> Crop:
        """The crop of a record.

        Args:
            record: index of the record in the list.
            size: of its image.
            factor: by which the image is scaled.
            number: number of the sub-batch.
            position: position of the image in it.
        """
        rng = generator_for(self.seed, Stream.CROP, number, position)
        is_centred = rng.random() < self.foreground  # drawn in any case, so that the numbers after it stay the same
        centre = self.index.draw(record, rng) if is_centred and self.index is not None else None
        return plan_crop(size, self.crop, factor, rng, centre)
