"""Stage 3, optional: random augmentation of training images, with torchvision's v2 transforms.

The random numbers depend only on the seed, the number of the sub-batch and the position in it, so that workers, devices
and resuming change nothing. Programs add transforms to AUGMENTATIONS.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from semseg.config.preprocessing import BandRange
from semseg.config.schema import AugmentConfig, is_chosen
from semseg.config.tables import announce_table
from semseg.data.bands import BandOptions
from semseg.data.batch import Sample
from semseg.data.geometry import Size
from semseg.data.label_map import IGNORED
from semseg.data.seeding import Stream, generator_for, number_for
from semseg.errors import ConfigError, check_choice

BLUR_RADIUS = 2.0  # radius of the kernel in standard deviations, of the largest blur

# Custom transforms by name: functions of
#     image (3, H, W), uint8 RGB (or bands, in the type of the files), label (H, W), int64, -1 = not scored, and a
#     torch.Generator
# that return the changed image and label, of the same shapes and types. The value of augment.<name> is the fourth
# argument if it is a number, and keyword arguments if it is a mapping.
AUGMENTATIONS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {}
announce_table("augment", AUGMENTATIONS)


class Augmented(NamedTuple):
    """An image and its label after the transforms, on one pixel grid."""

    image: NDArray  # (H, W, 3) uint8 RGB, or (H, W, bands) of the type of the files
    label: NDArray[np.int16]  # (H, W), -1 = not scored, which includes corners that a rotation leaves empty


class GaussianBlur(v2.GaussianBlur):
    """torchvision's, with smaller kernels for images that are too small to be reflected at their border."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = inpt.shape[-2:]
        widest = max(self.kernel_size)  # pyright: ignore[reportArgumentType] - a pair, as torchvision keeps it
        kernel = [min(widest, 2 * side - 1) for side in (width, height)]
        return self._call_kernel(v2.functional.gaussian_blur, inpt, kernel, **params)


class OwnTransform(NamedTuple):
    """An entry of AUGMENTATIONS with its options."""

    name: str
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    numbers: tuple[float, ...]  # none or one
    options: dict[str, Any]

    def __call__(
        self, image: torch.Tensor, label: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The changed image (3, H, W) and label (H, W).

        Raises:
            ConfigError: if the function returns anything else than both, with the shapes and types that it was given.
        """
        found = self.function(image, label, generator, *self.numbers, **self.options)
        expected = [describe_tensor(image), describe_tensor(label)]
        parts = [describe_tensor(part) for part in found] if isinstance(found, tuple | list) else [type(found).__name__]
        if parts != expected:
            raise ConfigError(
                f"augment.{self.name}: returned {' and '.join(parts)}. It must return {' and '.join(expected)}."
            )
        image, label = found
        return image, label


def describe_tensor(value: object) -> str:
    """The type and shape of a tensor, or the type of anything else.

    >>> describe_tensor(torch.zeros(2, 3))
    'float32 (2, 3)'
    """
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def build_own_transforms(config: AugmentConfig) -> list[OwnTransform]:
    """The custom transforms, in the order of the configuration.

    Raises:
        ConfigError: if one is not in AUGMENTATIONS, or does not take its options.
    """
    transforms = []
    for name, value in config.own.items():
        if not is_chosen(value):
            continue
        function = AUGMENTATIONS[check_choice("augment", name, AUGMENTATIONS)]
        options = {str(option): given for option, given in value.items()} if isinstance(value, dict) else {}
        numbers = () if isinstance(value, dict | bool) else (value,)
        signature = inspect.signature(function)
        try:
            signature.bind(*3 * [None], *numbers, **options)
        except TypeError as error:
            raise ConfigError(f"augment.{name}={value}: its function {signature} does not fit: {error}.") from None
        transforms.append(OwnTransform(name, function, numbers, options))
    return transforms


class Augmentation:
    """Random changes of one training image: turns, colour, blur, rotation, erasing, custom transforms, the crop.

    Args:
        config: which transforms to apply, and their strength.
        seed: seed of the run.
        bands: of the images; None: they are 8-bit RGB. Changes of colour are made to red, green and blue only.

    Raises:
        ConfigError: if a transform that a program should add is missing, or does not take its options, and for changes
            of colour without colours.
    """

    def __init__(self, config: AugmentConfig, seed: int, bands: BandOptions | None = None) -> None:
        self.config, self.seed, self.bands = config, seed, bands
        transforms: list[v2.Transform] = []
        jitter = (config.brightness, config.contrast, config.saturation, config.hue)
        if any(jitter):
            transforms.append(v2.ColorJitter(*jitter) if bands is None else ColourJitter(jitter, bands))
        if config.blur:
            kernel = 2 * math.ceil(BLUR_RADIUS * config.blur_sigma[1]) + 1
            transforms.append(v2.RandomApply([GaussianBlur(kernel, tuple(config.blur_sigma))], config.blur))
        if config.rotation:
            fill: dict[Any, Any] = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
            if bands is not None:
                fill[tv_tensors.Image] = bands.fill_values(np.dtype("float32")).tolist()
            transforms.append(v2.RandomRotation(config.rotation, InterpolationMode.BILINEAR, fill=fill))  # pyright: ignore[reportArgumentType]
        self.transforms = v2.Compose(transforms) if transforms else None
        self.own = build_own_transforms(config)
        # Colours and blur of the crop alone take a fraction of the time; others need what surrounds it.
        self.crops_first = not config.rotation and not self.own

    def draw_scale(self, number: int, position: int) -> float:
        """A random factor for the short edge and the limit of the long edge.

        Args:
            number: number of the sub-batch.
            position: position of the image in it.
        """
        return draw_scale(self.config, self.seed, number, position)

    def __call__(self, image: NDArray, label: NDArray[np.int16], number: int, position: int) -> Augmented:
        """Transform and crop an image (H, W, 3) and its label (H, W) that have their training size.

        Args:
            number: number of the sub-batch.
            position: position of the image in it.
        """
        image, label = self._turn_and_erase(image, label, number, position)
        given = image.dtype
        if self.bands is not None and self.transforms is not None:
            image = image.astype(np.float32)  # exact for all types; torch computes with few of the others
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number_for(self.seed, Stream.AUGMENT, number, position, 1))
            pixels = tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1))
            mask = tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(label))[None])
            if self.crops_first:
                pixels, mask = self._crop(pixels, mask)
            if self.transforms is not None:
                pixels, mask = self.transforms(pixels, mask)
                if self.bands is not None:
                    pixels = tv_tensors.Image(restore_type(pixels, given))
            if self.own:
                pixels, mask = self._apply_own(pixels, mask, number, position)
            if not self.crops_first:
                pixels, mask = self._crop(pixels, mask)
        return Augmented(pixels.permute(1, 2, 0).contiguous().numpy(), mask[0].contiguous().numpy())

    def _crop(self, pixels: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        if self.config.crop is None:
            return pixels, mask
        window = crop_size(Size(*mask.shape[-2:]), self.config.crop)
        return v2.RandomCrop(tuple(window))(pixels, mask)

    def _turn_and_erase(
        self, image: NDArray, label: NDArray[np.int16], number: int, position: int
    ) -> tuple[NDArray, NDArray[np.int16]]:
        """Turn by quarters, then erase a rectangle; the draws of the other transforms stay the same."""
        config = self.config
        if config.quarter_turns:
            turns = int(generator_for(self.seed, Stream.AUGMENT, number, position, 3).integers(4))
            if image.shape[0] != image.shape[1]:
                turns = 2 * (turns // 2)  # sub-batches are of one orientation
            image, label = np.ascontiguousarray(np.rot90(image, turns)), np.ascontiguousarray(np.rot90(label, turns))
        if config.erasing:
            rng = generator_for(self.seed, Stream.AUGMENT, number, position, 4)
            is_erased = rng.random() < config.erasing
            top, left, height, width = draw_rectangle(Size(*label.shape), rng)
            if is_erased:
                image, label = image.copy(), label.copy()
                mean = image.reshape(-1, image.shape[2]).mean(0)
                mean = mean if image.dtype.kind == "f" else np.rint(mean)
                place = (slice(top, top + height), slice(left, left + width))
                image[place] = mean.astype(image.dtype)
                label[place] = IGNORED
        return image, label

    def _apply_own(
        self, pixels: torch.Tensor, mask: torch.Tensor, number: int, position: int
    ) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Apply the custom transforms; they do not change what ours draw."""
        image, label = pixels.as_subclass(torch.Tensor).contiguous(), mask[0].as_subclass(torch.Tensor).long()
        with torch.random.fork_rng(devices=[]):
            for index, transform in enumerate(self.own):
                seeds = (number_for(self.seed, Stream.AUGMENT, number, position, 2, index, part) for part in (0, 1))
                torch.manual_seed(next(seeds))  # for functions that draw from the global generator
                image, label = transform(image, label, torch.Generator().manual_seed(next(seeds)))
        return tv_tensors.Image(image), tv_tensors.Mask(label[None].to(torch.int16))


def draw_rectangle(size: Size, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a rectangle to erase (Zhong et al. 2020, algorithm 1).

    Its area is 2 to 33 % of the image, and its aspect ratio 0.3 to 3.3, as far as it fits.
    """
    area = rng.uniform(0.02, 0.33) * size.height * size.width
    aspect = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
    height = min(size.height, max(1, round(math.sqrt(area * aspect))))
    width = min(size.width, max(1, round(math.sqrt(area / aspect))))
    return int(rng.integers(size.height - height + 1)), int(rng.integers(size.width - width + 1)), height, width


def mix_samples(samples: Sequence[Sample], share: float, label_stride: int, seed: int, number: int) -> list[Sample]:
    """CutMix (Yun et al. 2019): rectangles of some samples are those of the next sample of the sub-batch.

    The area is uniform from none to all of what both samples have; rectangles begin and end at multiples of the label
    stride, so that every pixel of a label belongs to one of the images.

    Args:
        share: the probability for each sample.
        number: number of the sub-batch.
    """
    mixed = []
    for position, sample in enumerate(samples):
        other = samples[(position + 1) % len(samples)]
        rng = generator_for(seed, Stream.AUGMENT, number, position, 5)
        is_mixed = rng.random() < share
        side = math.sqrt(rng.random())
        cells = [min(sample.image.shape[axis], other.image.shape[axis]) // label_stride for axis in (0, 1)]
        lengths = [round(side * count) for count in cells]
        starts = [int(rng.integers(count - length + 1)) for count, length in zip(cells, lengths, strict=True)]
        if not is_mixed or other is sample:
            mixed.append(sample)
            continue
        image, label = np.array(sample.image), sample.label.copy()
        rows, columns = (slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
        label[rows, columns] = other.label[rows, columns]
        rows, columns = (slice(part.start * label_stride, part.stop * label_stride) for part in (rows, columns))
        image[rows, columns] = other.image[rows, columns]
        mixed.append(Sample(image, label, sample.path))
    return mixed


class ColourJitter(v2.ColorJitter):
    """Changes red, green and blue of an image with these bands, float32 (C, H, W); the others stay.

    Raises:
        ConfigError: if the bands do not have the three colours.
    """

    def __init__(self, jitter: tuple[float, float, float, float], bands: BandOptions) -> None:
        if not bands.has_colours:
            raise ConfigError(
                "augment.brightness, contrast, saturation and hue change red, green and blue, and data.bands are "
                f"{', '.join(bands.names)}. Leave them out, or add such a change in a program (docs/extending.md)."
            )
        super().__init__(*jitter)
        ranges = bands.ranges or (BandRange(0.0, 255.0),) * len(bands.names)
        self.colours = bands.colours
        chosen = [ranges[band] for band in self.colours]
        self.low = torch.tensor([low for low, _ in chosen]).view(3, 1, 1)
        self.span = torch.tensor([high - low for low, high in chosen]).view(3, 1, 1)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Images; masks stay as they are."""
        if not isinstance(inpt, tv_tensors.Image):
            return super().transform(inpt, params)
        pixels = inpt.as_subclass(torch.Tensor).clone()
        colours = ((pixels[self.colours] - self.low) / self.span).clamp(0, 1)  # what normalisation cuts off
        changed = super().transform(tv_tensors.Image(colours), params).as_subclass(torch.Tensor)
        pixels[self.colours] = changed * self.span + self.low
        return tv_tensors.Image(pixels)


def restore_type(pixels: torch.Tensor, dtype: np.dtype) -> torch.Tensor:
    """float32 as the type of the files, rounded, and within the limits of an integer type."""
    if dtype.kind == "f":
        return pixels.as_subclass(torch.Tensor)
    limits = np.iinfo(dtype)
    return pixels.as_subclass(torch.Tensor).round().clamp(limits.min, limits.max).to(getattr(torch, dtype.name))


def draw_scale(config: AugmentConfig, seed: int, number: int, position: int) -> float:
    """The random factor of the size of an image of a sub-batch: `augment.scale`."""
    low, high = config.scale
    fraction = number_for(seed, Stream.AUGMENT, number, position, 0) / 2**63
    return low + (high - low) * fraction


def crop_size(size: Size, crop: Sequence[int]) -> Size:
    """The size of an image after cropping: smaller images are not padded."""
    return Size(min(size.height, crop[0]), min(size.width, crop[1]))
