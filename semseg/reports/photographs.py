"""Small pictures of images of a data set, read as evaluations have read them. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semseg.config.schema import DataConfig
from semseg.data.band_images import read_bands
from semseg.data.band_windows import open_windows
from semseg.data.bands import BandOptions, band_options, draw_bands
from semseg.data.geometry import Size
from semseg.data.header_cache import read_header_only
from semseg.data.images import MAX_PIXELS, apply_orientation, decode_pixels, is_jpeg, open_any, read_image_bytes
from semseg.data.pairs import jpeg_reduction
from semseg.data.windows import WHOLE_PIXELS, pick_pixels
from semseg.reports.draw import Pixels

# Keys of `data` by which images are more than 8-bit RGB; metrics.json holds them under READING, with the limit of size.
READING = "reading"
BAND_KEYS = ("bands", "band_files", "image_suffix", "value_range", "show_bands")


def describe_reading(data: DataConfig) -> dict[str, Any]:
    """The entry of metrics.json that says how the images of an evaluation are read; empty for 8-bit RGB as usual."""
    keys = [*(BAND_KEYS if data.has_bands else ()), *(("max_pixels",) if data.max_pixels != MAX_PIXELS else ())]
    return {READING: {key: getattr(data, key) for key in keys}} if keys else {}


def find_reading(metrics: Mapping[str, Any]) -> DataConfig | None:
    """What `describe_reading` has stored; the settings of 8-bit RGB if that is nothing, None if it is damaged."""
    stored = metrics.get(READING, {})
    names = {item.name for item in fields(DataConfig)}
    try:
        data = DataConfig(**stored) if set(stored) <= names else None
        is_intact = data is not None and isinstance(data.max_pixels, int) and not list(data.find_band_problems())
        return data if is_intact else None
    except (TypeError, ValueError, AttributeError):
        return None


def read_photograph(path: Path, data: DataConfig, shape: tuple[int, int]) -> Pixels:
    """An image at `shape` (height, width): upright or as stored, whichever has that shape.

    Raises:
        DataError: if it cannot be read.
    """
    bands = band_options(data)
    size = read_header_only(str(path)).stored
    windows = open_windows(path, bands) if math.prod(size) > WHOLE_PIXELS else None
    if windows is not None:
        with windows:
            rows, columns = (
                ((np.arange(count) + 0.5) * length / count).astype(np.int64)
                for count, length in zip(shape, size, strict=True)
            )
            return draw_photograph(pick_pixels(windows, rows, columns), bands, data)
    if bands is not None:
        read = read_bands(path, bands, max_pixels=data.max_pixels)
        pixels, orientation = read.pixels, read.header.orientation
    else:
        content = read_image_bytes(path)
        image, header = open_any(path, content, data.max_pixels)
        factor = jpeg_reduction(header.stored, Size(max(shape), max(shape))) if is_jpeg(content) else 1
        pixels, orientation = decode_pixels(path, content, image, header, factor), header.orientation
    height, width = shape
    views = [apply_orientation(pixels, orientation), pixels]
    view = min(views, key=lambda candidate: abs(math.log(candidate.shape[1] * height / (candidate.shape[0] * width))))
    picture = Image.fromarray(draw_photograph(view, bands, data))
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX))


def draw_photograph(pixels: NDArray, bands: BandOptions | None, data: DataConfig) -> Pixels:
    """(H, W, bands) as (H, W, 3) uint8 RGB, with data.show_bands."""
    return pixels if bands is None else draw_bands(pixels, bands.names, data.show_bands)
