"""Stage 7 for one picture at a time: a network with its preprocessing, its settings and its class names.

mode=predict, mode=serve and the Python API use it. No Lightning.
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

from semseg.config.fields import find_view_problems, is_int_between
from semseg.data.classes import ClassTable
from semseg.data.datasets import resize_to_scales
from semseg.data.images import MAX_PIXELS, pil_to_rgb, read_image
from semseg.data.label_map import LabelMap
from semseg.errors import ConfigError, DataError
from semseg.evaluation.inference import predict
from semseg.nets.precision import create_autocast
from semseg.nets.segmenter import Segmenter
from semseg.prediction.outputs import write_outputs
from semseg.reports.draw import ClassShare, Pixels, add_legend, class_shares, draw_overlay

Picture = str | Path | Image.Image | NDArray[np.uint8] | Tensor


@dataclass(frozen=True)
class PredictionSettings:
    """How a picture is scaled and predicted. The keys of `predict` and `eval` in the configuration are the same."""

    scales: Sequence[int]  # short edges, pixels
    max_long_edge: int = 1000  # pixels
    size_divisor: int | None = None  # None means the network's
    flip: bool = False
    window: int | None = None
    stride: int | None = None
    memory_limit_mb: int = 1024
    max_pixels: int = MAX_PIXELS  # largest size of a picture; data.max_pixels

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: if a value is out of its range, or window and stride contradict each other.
        """
        for problem in find_view_problems("", self.scales, self.window, self.stride):
            raise ConfigError(problem)
        for name in ("max_long_edge", "size_divisor", "window", "stride", "memory_limit_mb"):
            value = getattr(self, name)
            if value is not None and not is_int_between(value, low=1):
                raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1.")


@dataclass(frozen=True)
class PredictionResult:
    """The prediction for a picture, on the pixel grid of the picture after its EXIF orientation is applied.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        ids: (H, W) int16 class indices, 0 .. K - 1.
        classes: names and colours by class index.
        label_map: maps class indices to the ids in the label files of the data set.
        probabilities: (K, H, W) float16, or None if they were not requested.
    """

    image: Pixels
    ids: NDArray[np.int16]
    classes: ClassTable
    label_map: LabelMap
    probabilities: NDArray[np.float16] | None = None

    def overlay(self, opacity: float = 0.6, *, legend: bool = True) -> Pixels:
        """Blend the picture with its class colours, with a legend below: (H', W', 3) uint8 RGB.

        Raises:
            ConfigError: if `opacity` is not from 0 (only the picture) to 1 (only the colours).
        """
        if not 0 <= opacity <= 1:
            raise ConfigError(f"opacity={opacity}: must be from 0 to 1.")
        blended = draw_overlay(self.image, self.ids, self.classes, opacity)
        return add_legend(blended, self.ids, self.classes) if legend else blended

    @property
    def label_ids(self) -> NDArray[np.uint16]:
        """(H, W) uint16 class ids of the data set's label files, as in the `ids` files."""
        return self.label_map.to_raw(self.ids)

    def shares(self) -> list[ClassShare]:
        """Return the classes in the picture with their fraction of its pixels, the largest first."""
        return class_shares(self.ids, self.classes)

    def save(
        self, folder: str | Path, outputs: Sequence[str] = ("ids", "overlay"), *, name: str = "prediction"
    ) -> list[Path]:
        """Write `<folder>/<name>_<output>.<suffix>` for each of `outputs`; existing files are replaced.

        Args:
            outputs: any of ids, color, overlay, panel, probabilities, as in predict.save.

        Returns:
            The paths of the files.

        Raises:
            ValueError: for another output, and for probabilities that were not requested.
        """
        return write_outputs(self, Path(folder) / name, outputs)


class Predictor:
    """Applies a network to pictures.

    Args:
        net: in eval mode, on the device that computes.
        settings: defaults that `predict` can override for one picture.
        name: name of the network.
        source: file that it was read from.
        precision: as trainer.precision; the weights of `net` have the type for it.
    """

    def __init__(
        self,
        net: Segmenter,
        classes: ClassTable,
        label_map: LabelMap,
        settings: PredictionSettings,
        *,
        name: str = "",
        source: str = "",
        precision: str = "32-true",
    ) -> None:
        self.net, self.classes, self.label_map, self.settings = net, classes, label_map, settings
        self.name, self.source, self.precision = name, source, precision

    def predict(self, picture: Picture, *, probabilities: bool = False, **settings: Any) -> PredictionResult:
        """Predict the class of every pixel of a picture.

        Args:
            picture: a path or a PIL image (both turned upright), a numpy array (H, W, 3) uint8 RGB, or a tensor
                (3, H, W) uint8 RGB.
            probabilities: keep the probabilities of all classes as well: 2 bytes per pixel and class.
            settings: fields of `PredictionSettings` to override for this picture: scales, flip, window, stride,
                max_long_edge, size_divisor, memory_limit_mb, max_pixels.

        Raises:
            DataError: if a file is missing, broken, or not an image.
            TypeError: if `picture` is not a picture, and for unknown settings.
            ValueError: for an array of another shape or type, and for settings out of their range (ConfigError).
        """
        image = convert_to_pixels(picture, replace(self.settings, **settings).max_pixels)
        shape = (self.classes.num_classes, *image.shape[:2])
        array = np.empty(shape, np.float16) if probabilities else None
        ids = self.predict_class_map(image.shape[:2], self.resize(image, **settings), array, **settings)
        return PredictionResult(image, ids, self.classes, self.label_map, array)

    def resize(self, image: Pixels, **settings: Any) -> list[Tensor]:
        """Resize the picture (H, W, 3) to every scale: a list of uint8 (3, h, w)."""
        return self.build_resizer(**settings)(image)

    def build_resizer(self, **settings: Any) -> Callable[[Pixels], list[Tensor]]:
        """Return `resize` as a function without the weights, for worker processes."""
        chosen = replace(self.settings, **settings)
        return partial(
            resize_to_scales,
            short_edges=tuple(chosen.scales),
            max_long_edge=chosen.max_long_edge,
            size_divisor=chosen.size_divisor or self.net.size_divisor,
            antialias=self.net.convention.antialias,
        )

    def predict_class_map(
        self,
        size: Sequence[int],
        scales: Sequence[Tensor],
        probabilities: NDArray[np.floating] | None = None,
        /,  # because `settings` may have a key `scales` too
        **settings: Any,
    ) -> NDArray[np.int16]:
        """Predict (H, W) class indices of a picture of `size` (H, W) from its resized copies.

        Writes the probabilities into the array `probabilities` (K, H, W) if it is given; it may be mapped to a file.
        """
        chosen = replace(self.settings, **settings)
        device = next(self.net.parameters(), torch.empty(0)).device
        with create_autocast(self.precision, device):
            prediction = predict(
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
        return prediction.ids.cpu().numpy()


def convert_to_pixels(picture: Picture, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Convert any supported picture to (H, W, 3) uint8 RGB; see `Predictor.predict`."""
    if isinstance(picture, Tensor | np.ndarray) and 0 in picture.shape:
        raise ValueError(f"the picture has no pixels: its shape is {tuple(picture.shape)}")
    if isinstance(picture, str | Path):
        return read_image(picture, upright=True, max_pixels=max_pixels)
    if isinstance(picture, Image.Image):
        return convert_pil_image(picture, max_pixels)
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise ValueError(f"a tensor must be uint8 (3, H, W), got {picture.dtype} {tuple(picture.shape)}")
        return np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy())
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"an array must be uint8 (H, W, 3), RGB, got {picture.dtype} {picture.shape}")
        return np.ascontiguousarray(picture)
    raise TypeError(f"a picture is a path, a PIL image, a numpy array or a tensor, not {type(picture).__name__}")


def convert_pil_image(image: Image.Image, max_pixels: int) -> Pixels:
    """Convert a PIL image to (H, W, 3) uint8 RGB, turned upright; the image itself is not changed."""
    if image.width * image.height > max_pixels:
        raise DataError(
            f"the PIL image has {image.height} x {image.width} pixels, more than the limit "
            f"data.max_pixels={max_pixels}. Resize it, or raise the limit."
        )
    try:
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format  # defines the range of mode I
        return pil_to_rgb(upright, "the PIL image")
    except DataError:
        raise
    except Exception as error:  # Pillow decodes lazily, and its errors have no common type
        raise DataError(f"the PIL image cannot be decoded ({error}).") from error
