"""Stage 7 for one picture at a time: a network with its preprocessing, its settings and its class names.

mode=predict, mode=serve and the Python API use it. No Lightning.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from semseg.config.fields import find_crop_problems, find_view_problems, is_fraction, is_int_between
from semseg.data.bands import BandOptions, draw_bands
from semseg.data.classes import ClassTable
from semseg.data.datasets import resize_to_scales
from semseg.data.geometry import Size
from semseg.data.images import MAX_PIXELS
from semseg.data.label_map import LabelMap, ignore_missing
from semseg.data.windows import RowSink, WindowReader
from semseg.errors import ArgumentError, ConfigError, DataError, suggest
from semseg.evaluation.inference import predict_class_map
from semseg.evaluation.thresholds import ThresholdSink, apply_threshold
from semseg.evaluation.tiled import ArraySink, choose_layout, predict_by_windows
from semseg.evaluation.unsure import ConfidenceSink, ignore_unsure, warn_of_undefined
from semseg.nets.interfaces import SegmentationNetwork, choose_size_divisor
from semseg.nets.precision import create_autocast
from semseg.prediction.geotiff import read_whole_mask
from semseg.prediction.outputs import write_outputs
from semseg.prediction.pictures import Picture, convert_to_bands, convert_to_pixels
from semseg.reports.draw import ClassShare, Pixels, add_legend, class_shares, draw_overlay, format_share
from semseg.storage.atomic import describe_write_error
from semseg.system.memory import report_out_of_memory_as

NOTEBOOK_EDGE = 1024  # pixels: the largest edge of a prediction in a notebook
NUM_SHARES = 3  # classes in the short form of a prediction


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
    crop: Sequence[int] | None = None  # data.resize=native: that of training, the default window; None: at `scales`
    threshold: float | None = None  # two classes: probability from which on a pixel is the second; None: 0.5
    min_confidence: float | None = None  # pixels whose class has a lower probability are not scored
    batch_size: int = 1  # windows of a picture that go through the network together, with `crop`

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: if a value is out of its range, or window and stride contradict each other.
        """
        for problem in find_view_problems("", self.scales, self.window, self.stride):
            raise ConfigError(problem)
        crop = list(self.crop) if isinstance(self.crop, Sequence) else self.crop
        for problem in find_crop_problems("crop", crop):
            raise ConfigError(problem)
        for name in (
            "max_long_edge",
            "size_divisor",
            "window",
            "stride",
            "memory_limit_mb",
            "max_pixels",
            "batch_size",
        ):
            value = getattr(self, name)
            is_optional = name in ("size_divisor", "window", "stride")
            if not (value is None and is_optional) and not is_int_between(value, low=1):
                raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1.")
        for name in ("threshold", "min_confidence"):
            value = getattr(self, name)
            if value is not None and not is_fraction(value):
                raise ConfigError(f"{name}={value!r}: must be a probability from 0 to 1, or None.")
        if not isinstance(self.flip, bool | np.bool_):
            raise ConfigError(f"flip={self.flip!r}: must be True or False.")

    def override(self, settings: dict[str, Any]) -> PredictionSettings:
        """These settings with others for some of its fields.

        Raises:
            ArgumentError: for a name that is not a field, with the nearest one, and for one that has no effect.
            ConfigError: if a value is out of its range.
        """
        names = [item.name for item in fields(self)]
        for name, value in settings.items():
            if name not in names:
                hint = suggest(name, [*names, "probabilities"])
                raise ArgumentError(
                    f"{name}={value!r}: there is no such argument.{hint} Valid: probabilities, {', '.join(names)}."
                )
            if settings.get("crop", self.crop) is not None and name in ("scales", "max_long_edge"):
                raise ArgumentError(
                    f"{name}={value!r}: has no effect, because this network takes pixels as they are (resize=native)."
                )
        if settings.get("crop", self.crop) is None and settings.get("batch_size", 1) != 1:
            raise ArgumentError(f"batch_size={settings['batch_size']!r}: is a number of windows of resize=native.")
        return replace(self, **settings)


@dataclass(frozen=True)
class PredictionResult:
    """The prediction for a picture, on the pixel grid of the picture after its EXIF orientation is applied.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        ids: (H, W) int16 class indices, 0 .. K - 1; -1 where the network is less sure than min_confidence.
        classes: names and colours by class index.
        label_map: maps class indices to the ids in the label files of the data set.
        probabilities: (K, H, W) float16, or None if they were not requested.
    """

    image: Pixels
    ids: NDArray[np.int16]
    classes: ClassTable
    label_map: LabelMap
    probabilities: NDArray[np.float16] | None = None

    def __repr__(self) -> str:
        height, width = self.ids.shape
        shares = self.shares()
        listed = [f"{share.name} {format_share(share.share)}" for share in shares[:NUM_SHARES]]
        listed += [f"{len(shares) - NUM_SHARES} more classes"] * (len(shares) > NUM_SHARES)
        kept = "" if self.probabilities is None else ", with probabilities"
        return f"<PredictionResult: {height} x {width} pixels, {', '.join(listed)}{kept}>"

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the overlay with its legend, at most NOTEBOOK_EDGE pixels wide and high."""
        height, width = self.ids.shape
        factor = min(1, NOTEBOOK_EDGE / max(height, width))
        size = max(1, round(width * factor)), max(1, round(height * factor))
        image = np.asarray(cv2.resize(self.image, size, interpolation=cv2.INTER_AREA), np.uint8)
        ids = np.asarray(cv2.resize(self.ids, size, interpolation=cv2.INTER_NEAREST), np.int16)
        picture = add_legend(draw_overlay(image, ids, self.classes), self.ids, self.classes)  # with the shares of all
        file = BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        return file.getvalue()

    def overlay(self, opacity: float = 0.6, *, legend: bool = True) -> Pixels:
        """Blend the picture with its class colours, with a legend below: (H', W', 3) uint8 RGB.

        Raises:
            ArgumentError: if `opacity` is not from 0 (only the picture) to 1 (only the colours).
        """
        if not is_fraction(opacity):
            raise ArgumentError(f"opacity={opacity!r}: must be from 0 to 1.")
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
        self, folder: str | Path, outputs: str | Iterable[str] = ("ids", "overlay"), *, name: str = "prediction"
    ) -> list[Path]:
        """Write `<folder>/<name>_<output>.<suffix>` for each of `outputs`; existing files are replaced.

        Args:
            outputs: one or several of ids, color, overlay, panel, probabilities, coco, label_studio, as in
                predict.save. For the last two, `name` is the name of the picture's file.

        Returns:
            The paths of the files.

        Raises:
            ArgumentError: for another output, for probabilities that were not requested, if `folder` is a file, and if
                `name` is empty or leads out of the folder. Nothing is written then.
            DataError: if the files cannot be written.
        """
        if not isinstance(folder, str | Path):
            raise ArgumentError(f"folder={folder!r}: must be a path.")
        if not isinstance(outputs, str | Iterable):
            raise ArgumentError(f"outputs={outputs!r}: must be one or several of the names.")
        is_text = isinstance(name, str) and Path(name).name and "\0" not in name
        if not is_text or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArgumentError(f"name={name!r}: must be the name of a file in the folder.")
        if Path(folder).is_file():
            raise ArgumentError(f"folder={folder}: is a file, and must be a folder.")
        try:
            return write_outputs(self, Path(folder) / name, [outputs] if isinstance(outputs, str) else list(outputs))
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise ArgumentError(f"name={name!r:.80}: is too long for a file.") from None
            message = describe_write_error(error, Path(folder))
            if message is None:
                raise
            raise DataError(message) from error


def check_decision(
    threshold: float | str | None, min_confidence: float | None, label_map: LabelMap, num_classes: int
) -> None:
    """Refuse rules for the class of a pixel that do not fit the classes.

    Raises:
        ConfigError: for a threshold if there are not two classes, and for min_confidence if no id is ignored.
    """
    if min_confidence is not None and not label_map.ignored_ids:
        raise ConfigError(
            f"min_confidence={min_confidence}: no id means that a pixel is not scored, because data.ignore is empty. "
            "Set data.ignore=[255], or another id that is no class."
        )
    if threshold is not None and num_classes != 2:
        raise ConfigError(
            f"threshold={threshold}: is for networks of two classes, and this one has {num_classes}. Leave it out."
        )


def report_out_of_memory_at(largest: Size) -> AbstractContextManager[None]:
    """A context in which running out of memory is an OutOfMemoryError with the largest input of the network."""
    return report_out_of_memory_as(
        lambda: (
            f"out of memory predicting {largest} pixels at once. Lower the largest of predict.scales, or set "
            "predict.window to less."
        )
    )


class Predictor:
    """Applies a network to pictures.

    Args:
        net: in eval mode, on the device that computes.
        settings: defaults that `predict` can override for one picture.
        name: name of the network.
        source: file that it was read from.
        precision: as trainer.precision; the weights of `net` have the type for it.
        bands: of the images; None: they are 8-bit RGB.
        show_bands: data.show_bands, for pictures.
    """

    def __init__(
        self,
        net: SegmentationNetwork,
        classes: ClassTable,
        label_map: LabelMap,
        settings: PredictionSettings,
        *,
        name: str = "",
        source: str = "",
        precision: str = "32-true",
        bands: BandOptions | None = None,
        show_bands: Sequence[str] | None = None,
    ) -> None:
        self.bands, self.show_bands = bands, show_bands
        self.net, self.classes, self.label_map, self.settings = net, classes, label_map, settings
        self.name, self.source, self.precision = name, source, precision

    def __repr__(self) -> str:
        name, source = (f" {self.name}" if self.name else ""), (f", from {self.source}" if self.source else "")
        classes, settings = self.classes.num_classes, self.settings
        view = f"scales {list(settings.scales)}" if settings.crop is None else "native resolution"
        return f"<Predictor{name}: {classes} classes, {view}, on {self.device}{source}>"

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.net.parameters(), torch.empty(0)).device

    def predict(self, picture: Picture, *, probabilities: bool = False, **settings: Any) -> PredictionResult:
        """Predict the class of every pixel of a picture.

        Args:
            picture: a path or a PIL image (both turned upright), a NumPy array (H, W, 3) uint8 RGB, or a tensor
                (3, H, W) uint8 RGB. Grey pictures of one channel become RGB, and a fourth channel (alpha) is dropped.
                For a network with other bands: a path, an array (H, W, bands) or a tensor (bands, H, W) of uint8,
                uint16, int16 or float32, in the units of the files that it was trained on.
            probabilities: keep the probabilities of all classes as well: 2 bytes per pixel and class.
            settings: fields of `PredictionSettings` to override for this picture: scales, flip, window, stride,
                max_long_edge, size_divisor, memory_limit_mb, max_pixels, threshold, min_confidence, batch_size.

        Raises:
            DataError: if a file is missing, broken, or not an image.
            ArgumentError: if `picture` is not a picture, and for unknown settings.
            ConfigError: for settings out of their range.
        """
        if not isinstance(probabilities, bool | np.bool_):
            raise ArgumentError(f"probabilities={probabilities!r}: must be True or False.")
        chosen = self.settings.override(settings)
        self.check_settings(chosen)
        max_pixels = chosen.max_pixels
        if self.bands is None:
            image, is_valid = convert_to_pixels(picture, max_pixels), read_whole_mask(picture)
        else:
            image, is_valid = convert_to_bands(picture, self.bands, max_pixels)
        height, width = image.shape[:2]
        if height * width > max_pixels:  # an array; files are not even decoded
            raise DataError(
                f"the picture has {height} x {width} pixels, more than the limit max_pixels={max_pixels}. Resize it, "
                "or raise the limit."
            )
        shape = (self.classes.num_classes, *image.shape[:2])
        array = np.empty(shape, np.float16) if probabilities else None
        ids = self.predict_class_map(image.shape[:2], self.resize(image, **settings), array, **settings)
        ignore_missing(ids, is_valid)
        return PredictionResult(self.draw(image), ids, self.classes, self.label_map, array)

    def draw(self, image: NDArray) -> Pixels:
        """(H, W, 3) uint8 RGB for pictures: the image as it is, or its bands data.show_bands, stretched."""
        return image if self.bands is None else draw_bands(image, self.bands.names, self.show_bands)

    def resize(self, image: NDArray, **settings: Any) -> list[Tensor]:
        """Resize the picture (H, W, C) to every scale: a list of (C, h, w); itself at native resolution."""
        return self.build_resizer(**settings)(image)

    def build_resizer(self, **settings: Any) -> Callable[[NDArray], list[Tensor]]:
        """Return `resize` as a function without the weights, for worker processes."""
        chosen = self.settings.override(settings)
        return partial(
            resize_to_scales,
            short_edges=tuple(chosen.scales) if chosen.crop is None else (),
            max_long_edge=chosen.max_long_edge,
            size_divisor=choose_size_divisor(self.net, chosen.size_divisor),
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
        """Predict (H, W) class indices, -1 = not sure, of a picture of `size` (H, W) from its resized copies.

        Writes the probabilities into the array `probabilities` (K, H, W) if it is given; it may be mapped to a file.
        """
        chosen = self.settings.override(settings)
        self.check_settings(chosen)
        if chosen.crop is not None:
            (pixels,), sink = scales, ArraySink(Size(size[0], size[1]), probabilities)
            self.predict_rows(pixels, sink, **settings)
            return sink.ids
        largest = max((Size(*scale.shape[1:]) for scale in scales), key=math.prod)
        with report_out_of_memory_at(largest), create_autocast(self.precision, self.device):
            prediction = predict_class_map(
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
        ids, confidence, _ = prediction
        warn_of_undefined(confidence)
        if chosen.threshold is not None:
            ids = apply_threshold(prediction.ids, prediction.confidence, chosen.threshold)
            confidence = torch.where(ids == prediction.ids, confidence, 1 - confidence)
        if chosen.min_confidence is not None:
            ids = ignore_unsure(ids, confidence, chosen.min_confidence)
        return ids.cpu().numpy()

    def check_settings(self, chosen: PredictionSettings) -> None:
        """Refuse settings that do not fit the network.

        Raises:
            ConfigError: for a threshold of a network that has not two classes, for min_confidence if no id of label
                files is ignored, and for sizes of images that the network does not take.
        """
        divisor, needed = chosen.size_divisor, self.net.size_divisor
        if divisor and divisor % needed and divisor != self.settings.size_divisor:  # which is that of the training
            raise ConfigError(
                f"size_divisor={divisor}: this network takes images whose sides are multiples of {needed} pixels. Give "
                "a multiple of it, or leave it out."
            )
        check_decision(chosen.threshold, chosen.min_confidence, self.label_map, self.classes.num_classes)

    def predict_rows(self, image: WindowReader | Tensor, sink: RowSink, **settings: Any) -> None:
        """Predict an image at its own resolution by windows, and hand its rows to `sink` from top to bottom.

        Only the windows of a row, and the rows that are not finished, are in memory.

        Args:
            image: a reader, or pixels (3, H, W).

        Raises:
            ArgumentError: for unknown settings, and for a network that was trained at a short edge.
            ConfigError: for settings out of their range.
        """
        chosen = self.settings.override(settings)
        if chosen.crop is None:
            raise ArgumentError("this network takes images at a short edge: predict_rows needs data.resize=native.")
        self.check_settings(chosen)
        if chosen.min_confidence is not None:
            sink = ConfidenceSink(sink, chosen.min_confidence)
        if chosen.threshold is not None:
            sink = ThresholdSink(sink, chosen.threshold)
        divisor, window, stride = chosen.size_divisor, chosen.window, chosen.stride
        layout = choose_layout(self.net, chosen.crop, divisor=divisor, window=window, stride=stride)
        with report_out_of_memory_at(Size(layout.side, layout.side)), create_autocast(self.precision, self.device):
            predict_by_windows(
                self.net,
                image,
                self.net.convention,
                layout,
                sink,
                flip=chosen.flip,
                batch_size=chosen.batch_size,
                memory_limit_mb=chosen.memory_limit_mb,
            )
