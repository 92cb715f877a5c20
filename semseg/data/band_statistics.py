"""Stage 3: the range, mean and standard deviation of each band, measured on images of the training split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.config.preprocessing import RGB, BandRange
from semseg.config.schema import DataConfig
from semseg.data.band_images import BandImage, read_bands
from semseg.data.band_windows import open_windows
from semseg.data.bands import BandOptions, format_value_range
from semseg.data.geometry import Size
from semseg.data.images import MAX_PIXELS
from semseg.data.records import Record
from semseg.data.windows import spread_windows
from semseg.errors import DataError

PERCENTILES = (0.5, 99.5)  # of the values, which become the ends of the range
NUM_MEASURED = 64  # images, at equal distances in the split
NUM_PIXELS = 2**16  # of each image, on a grid
NUM_MEASURED_WINDOWS, WINDOW_SIDE = 64, 256  # of an image that is too large to be read whole


class BandStatistics(NamedTuple):
    """What the values of each band are, in the numbers of the files."""

    names: tuple[str, ...]
    dtype: str
    num_images: int
    ranges: tuple[BandRange, ...]  # of the colours one for all of them, so that their balance stays
    means: tuple[float, ...]  # of the values inside the range
    stds: tuple[float, ...]

    def suggest(self, data: DataConfig) -> dict[str, str]:
        """The keys that describe the values, as written on the command line."""
        applied, found = self.apply(data), {}
        found["data.value_range"] = format_value_range(self.ranges)
        for key in ("band_mean", "band_std"):
            values = getattr(applied, key)
            if values is not None:
                listed = ",".join("null" if value is None else f"{value:.7g}" for value in values)
                found[f"data.{key}"] = f"[{listed}]"
        return found

    def apply(self, data: DataConfig) -> DataConfig:
        """The configuration with the measured values; mean and standard deviation of the colours are the weights' own.

        What is set in `data` already stays.
        """
        pairs = [[round_value(low), round_value(high)] for low, high in self.ranges]
        value_range = pairs[0] if all(pair == pairs[0] for pair in pairs) else pairs
        data = replace(data, value_range=value_range)
        if set(self.names) <= set(RGB):
            return data
        for key, values in (("band_mean", self.means), ("band_std", self.stds)):
            if getattr(data, key) is None:
                pairs_of_key = zip(self.names, values, strict=True)
                listed = [None if name in RGB else round_value(value) for name, value in pairs_of_key]
                data = replace(data, **{key: listed})
        return data


def round_value(value: float) -> float:
    """A number with the digits that are written on the command line."""
    return float(f"{value:.7g}")


def measure_bands(
    records: Sequence[Record], options: BandOptions | None, max_pixels: int = MAX_PIXELS
) -> BandStatistics:
    """The values of the bands in images at equal distances in a split; images that cannot be read are left out.

    The result does not depend on the order in which images are read, and is the same for the same files.

    Raises:
        DataError: with the first reason, if no image can be read.
    """
    assert options is not None, "only bands are measured"
    reading = replace(options, ranges=(BandRange(-math.inf, math.inf),) * len(options.names), fill=())
    count = min(NUM_MEASURED, len(records))
    chosen = [records[number * len(records) // count] for number in range(count)]
    samples: list[NDArray[np.float32]] = []
    problem: DataError | None = None
    for record in chosen:
        try:
            samples.append(sample_image(record, reading, max_pixels))
        except DataError as error:
            problem = problem or error
    if not samples:
        raise problem or DataError("there is no image to measure.")
    values = np.concatenate(samples)  # (pixels, C), NaN where there is no value
    lows, highs = [], []
    for band, name in enumerate(options.names):
        known = values[:, band][~np.isnan(values[:, band])]
        if not known.size:
            raise DataError(f"{chosen[0].image}: the band {name} holds no value in any of {len(samples)} images.")
        low, high = np.percentile(known, PERCENTILES, method="inverted_cdf")
        lows.append(float(low))
        highs.append(float(high))
    colours = [band for band, name in enumerate(options.names) if name in RGB]
    if options.dtype == "uint8":
        lows, highs = [0.0] * len(lows), [255.0] * len(highs)
    for band in colours:
        lows[band], highs[band] = min(lows[colour] for colour in colours), max(highs[colour] for colour in colours)
    ranges = tuple(widen_range(low, high) for low, high in zip(lows, highs, strict=True))
    clipped = np.clip(values, [low for low, _ in ranges], [high for _, high in ranges]).astype(np.float64)
    means = np.nanmean(clipped, axis=0)
    stds = np.maximum(np.nanstd(clipped, axis=0), [(high - low) / 1000 for low, high in ranges])
    return BandStatistics(
        options.names, options.dtype, len(samples), ranges, tuple(means.tolist()), tuple(stds.tolist())
    )


def sample_image(record: Record, reading: BandOptions, max_pixels: int) -> NDArray[np.float32]:
    """(pixels, C) values of an image; those of NUM_MEASURED_WINDOWS windows if it is too large, and its format allows.

    Raises:
        DataError: if it cannot be read.
    """
    windows = open_windows(record.image, reading) if math.prod(record.size) > max_pixels else None
    if windows is None:
        return take_sample(read_bands(record.image, reading, max_pixels))
    with windows:
        size = Size(windows.height, windows.width)
        parts = [windows.read_image(*window) for window in spread_windows(size, NUM_MEASURED_WINDOWS, WINDOW_SIDE)]
    samples = [take_sample(part, NUM_PIXELS // NUM_MEASURED_WINDOWS) for part in parts]
    return np.concatenate(samples)


def take_sample(image: BandImage, num_pixels: int = NUM_PIXELS) -> NDArray[np.float32]:
    """(pixels, C) values on a grid of about `num_pixels`; NaN where there is none."""
    height, width = image.pixels.shape[:2]
    step = max(1, round(math.sqrt(height * width / num_pixels)))
    values = image.pixels[step // 2 :: step, step // 2 :: step].astype(np.float32)
    if image.is_missing is not None:
        values[image.is_missing[step // 2 :: step, step // 2 :: step]] = np.nan
    return values.reshape(-1, values.shape[-1])


def widen_range(low: float, high: float) -> BandRange:
    """A range with an extent, also for a band that is the same everywhere.

    >>> widen_range(0.0, 0.0), widen_range(1.0, 3.0)
    (BandRange(low=0.0, high=1.0), BandRange(low=1.0, high=3.0))
    """
    least = max(abs(low), abs(high), 1.0) if high <= low else 0.0
    return BandRange(low, max(high, low + least))
