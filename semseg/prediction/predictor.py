"""Stage 7 for one picture at a time: a network with all that it needs to read one and to name what it sees.

mode=predict, mode=serve and the Python API share it. No Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from semseg.config.schema import is_whole, view_problems
from semseg.data.classes import ClassTable
from semseg.data.datasets import at_scales
from semseg.data.images import MAX_PIXELS, read_image, rgb_of
from semseg.data.label_map import LabelMap
from semseg.errors import ConfigError, DataError
from semseg.evaluation.inference import predict
from semseg.nets.segmenter import Segmenter
from semseg.prediction.outputs import write_outputs
from semseg.reports.draw import ClassShare, Pixels, add_legend, class_shares, draw_overlay

Picture = str | Path | Image.Image | NDArray[np.uint8] | Tensor


@dataclass(frozen=True)
class Settings:
    """How a picture is scaled and looked at. The keys of `predict` and `eval` in the configuration say more."""

    scales: Sequence[int]  # short edges, pixels
    max_long_edge: int = 1000  # pixels
    size_divisor: int | None = None  # None: the network's
    flip: bool = False
    window: int | None = None
    stride: int | None = None
    memory_limit_mb: int = 1024
    max_pixels: int = MAX_PIXELS  # of a picture; data.max_pixels

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: if one of them cannot be used, or window and stride contradict each other.
        """
        for problem in view_problems("", self.scales, self.window, self.stride):
            raise ConfigError(problem)
        for name in ("max_long_edge", "size_divisor", "window", "stride", "memory_limit_mb"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, low=1):
                raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1.")


@dataclass(frozen=True)
class Result:
    """What a network sees in a picture, on the grid of the picture as its EXIF orientation turns it.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        ids: (H, W) int16 class indices, 0 .. K - 1.
        classes: names and colours by class index.
        label_map: which number stands for a class in the label files of the data set.
        probabilities: (K, H, W) float16, or None if they were not asked for.
    """

    image: Pixels
    ids: NDArray[np.int16]
    classes: ClassTable
    label_map: LabelMap
    probabilities: NDArray[np.float16] | None = None

    def overlay(self, opacity: float = 0.6, *, legend: bool = True) -> Pixels:
        """(H', W', 3) uint8 RGB: the picture under its class colours, with names and shares below it.

        Raises:
            ConfigError: if `opacity` is not from 0, the picture alone, to 1, the colours alone.
        """
        if not 0 <= opacity <= 1:
            raise ConfigError(f"opacity={opacity}: must be from 0 to 1.")
        mixed = draw_overlay(self.image, self.ids, self.classes, opacity)
        return add_legend(mixed, self.ids, self.classes) if legend else mixed

    @property
    def label_ids(self) -> NDArray[np.uint16]:
        """(H, W) the ids that the label files of the data set have for the classes, as `ids` files hold them."""
        return self.label_map.to_raw(self.ids)

    def shares(self) -> list[ClassShare]:
        """The classes in the picture with their share of its pixels, largest first."""
        return class_shares(self.ids, self.classes)

    def save(
        self, folder: str | Path, outputs: Sequence[str] = ("ids", "overlay"), *, name: str = "prediction"
    ) -> list[Path]:
        """Write `<folder>/<name>_<output>.<suffix>` for each of `outputs`; those that exist are replaced.

        Args:
            outputs: of ids, color, overlay, panel, probabilities, as predict.save names them.

        Returns:
            The files.

        Raises:
            ValueError: for another output, and for probabilities that were not asked for.
        """
        return write_outputs(self, Path(folder) / name, outputs)


class Predictor:
    """A network that can be shown pictures.

    Args:
        net: in eval mode, on the device where it shall run.
        settings: may be overruled for one picture in `predict`.
        name: of the network.
        source: where it was read from.
    """

    def __init__(
        self,
        net: Segmenter,
        classes: ClassTable,
        label_map: LabelMap,
        settings: Settings,
        *,
        name: str = "",
        source: str = "",
    ) -> None:
        self.net, self.classes, self.label_map, self.settings = net, classes, label_map, settings
        self.name, self.source = name, source

    def predict(self, picture: Picture, *, probabilities: bool = False, **settings: Any) -> Result:
        """What the network sees in a picture.

        Args:
            picture: a path (turned upright), a PIL image (likewise), a numpy array (H, W, 3) uint8 RGB, or a tensor
                (3, H, W) uint8 RGB.
            probabilities: keep those of all classes too: 2 bytes a pixel and class.
            settings: scales, flip, window, stride, max_long_edge, size_divisor, memory_limit_mb: those of `Settings`
                that shall differ for this picture.

        Raises:
            DataError: if a file is missing, broken, or no image.
            TypeError: for anything else than a picture, and for settings that do not exist.
            ValueError: for an array of another shape or type, and for settings out of their range (ConfigError).
        """
        image = to_pixels(picture, replace(self.settings, **settings).max_pixels)
        shape = (self.classes.num_classes, *image.shape[:2])
        kept = np.empty(shape, np.float16) if probabilities else None
        ids = self.class_map(image.shape[:2], self.scaled(image, **settings), kept, **settings)
        return Result(image, ids, self.classes, self.label_map, kept)

    def scaled(self, image: Pixels, **settings: Any) -> list[Tensor]:
        """The picture (H, W, 3) at every scale: uint8 (3, h, w) each, as the network takes them."""
        return self.scaler(**settings)(image)

    def scaler(self, **settings: Any) -> Callable[[Pixels], list[Tensor]]:
        """`scaled` by itself, for workers that shall not carry the weights."""
        chosen = replace(self.settings, **settings)
        return partial(
            at_scales,
            short_edges=tuple(chosen.scales),
            max_long_edge=chosen.max_long_edge,
            size_divisor=chosen.size_divisor or self.net.size_divisor,
            antialias=self.net.convention.antialias,
        )

    def class_map(
        self,
        size: Sequence[int],
        scales: Sequence[Tensor],
        probabilities: NDArray[np.floating] | None = None,
        /,  # since `settings` has a key `scales` too
        **settings: Any,
    ) -> NDArray[np.int16]:
        """(H, W) class indices of a picture of `size` (H, W) from its scaled copies.

        `probabilities` (K, H, W) is filled if it is given; it may lie in a file.
        """
        chosen = replace(self.settings, **settings)
        found = predict(
            self.net,
            scales,
            (size[0], size[1]),
            self.net.convention,
            flip=chosen.flip,
            window=chosen.window,
            stride=chosen.stride,
            memory_limit_mb=chosen.memory_limit_mb,
            probabilities=probabilities,
        )
        return found.ids.cpu().numpy()


def to_pixels(picture: Picture, max_pixels: int = MAX_PIXELS) -> Pixels:
    """(H, W, 3) uint8 RGB of whatever holds a picture; see `Predictor.predict`."""
    if isinstance(picture, Tensor | np.ndarray) and 0 in picture.shape:
        raise ValueError(f"the picture has no pixels: its shape is {tuple(picture.shape)}")
    if isinstance(picture, str | Path):
        return read_image(picture, upright=True, max_pixels=max_pixels)
    if isinstance(picture, Image.Image):
        return pixels_of(picture, max_pixels)
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise ValueError(f"a tensor must be uint8 (3, H, W), got {picture.dtype} {tuple(picture.shape)}")
        return np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy())
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"an array must be uint8 (H, W, 3), RGB, got {picture.dtype} {picture.shape}")
        return np.ascontiguousarray(picture)
    raise TypeError(f"a picture is a path, a PIL image, a numpy array or a tensor, not {type(picture).__name__}")


def pixels_of(image: Image.Image, max_pixels: int) -> Pixels:
    """(H, W, 3) uint8 RGB of a PIL image, turned upright, which leaves the image as it is."""
    if image.width * image.height > max_pixels:
        raise DataError(
            f"the PIL image has {image.height} x {image.width} pixels, more than {max_pixels} are not read "
            "(data.max_pixels)."
        )
    try:
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format  # says what the numbers of mode I are
        return rgb_of(upright, "the PIL image")
    except DataError:
        raise
    except Exception as error:  # Pillow decodes late, and has no common type for what it runs into
        raise DataError(f"the PIL image cannot be decoded ({error}).") from error
