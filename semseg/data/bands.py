"""Stage 3: which bands an image has, what their values mean, and how they are drawn. Reads no files. No torch.

A band is one number per pixel: red, near infrared, a height. Without `BandOptions` images are 8-bit RGB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.config.preprocessing import RGB, BandRange
from semseg.config.schema import AUTO_RANGE, DataConfig
from semseg.errors import DataError

STRETCH = (2.0, 98.0)  # percentiles that are drawn black and white
_MAX_STRETCHED = 2**18  # pixels from which the percentiles of a drawing are computed


class BandFile(NamedTuple):
    """One of the files of an image: the end of its stem, and the bands in it, in their order; None: not used."""

    suffix: str
    names: tuple[str | None, ...]


@dataclass(frozen=True)
class BandOptions:
    """How the bands of images are read.

    Attributes:
        files: the files of an image; the first is the one that lists and folders name.
        names: the bands of the arrays that are read, in this order.
        ranges: the values of each band that become 0 and 1; None: 0 and 255, for files of 8 bits only.
        fill: the values in place of pixels that hold none, one for each band.
        mean, std: of each band, in the values of the files; None: those of the weights.
        dtype: what files must hold, one of PIXEL_TYPES; empty: any of them.
    """

    files: tuple[BandFile, ...]
    names: tuple[str, ...]
    ranges: tuple[BandRange, ...] | None = None
    fill: tuple[float, ...] = ()
    mean: tuple[float | None, ...] = ()
    std: tuple[float | None, ...] = ()
    dtype: str = ""

    @property
    def main_suffix(self) -> str:
        """The end of the stems of the files that lists and folders name."""
        return self.files[0].suffix

    @property
    def other_suffixes(self) -> tuple[str, ...]:
        """The ends of the stems of the other files of an image."""
        return tuple(file.suffix for file in self.files[1:])

    @cached_property
    def order(self) -> list[int]:
        """For each band, its place among the used bands of all files, one file after the other."""
        read = [name for file in self.files for name in file.names if name is not None]
        return [read.index(name) for name in self.names]

    def as_one_file(self) -> BandOptions:
        """The same bands, all of them in one file: as they are if they were, else in the order of their names."""
        return self if len(self.files) == 1 else replace(self, files=(BandFile("", self.names),))

    @property
    def has_colours(self) -> bool:
        """Whether red, green and blue are among the bands."""
        return set(RGB) <= set(self.names)

    @property
    def colours(self) -> list[int]:
        """The places of red, green and blue among the bands, which must have them."""
        return [self.names.index(name) for name in RGB]

    def fill_values(self, dtype: np.dtype) -> NDArray:
        """(C) the values of pixels without data, in the type of the image."""
        values = np.array(self.fill or [127.5] * len(self.names))
        if dtype.kind == "f":
            return values.astype(dtype)
        limits = np.iinfo(dtype)
        return np.clip(np.rint(values), limits.min, limits.max).astype(dtype)

    def check_type(self, dtype: np.dtype, path: str | Path) -> None:
        """Refuse a file whose values do not have the meaning of the others.

        Raises:
            DataError: for another type than `dtype`, and for values whose range is not known or cannot be reached.
        """
        if self.dtype and dtype.name != self.dtype:
            raise DataError(
                f"{path}: holds {dtype.name} values where {self.dtype} ones are expected. Convert it: the same number "
                "must mean the same in every image."
            )
        if self.ranges is None and dtype.name != "uint8":
            raise DataError(
                f"{path}: holds {dtype.name} values, whose range is not known. To train on them, set "
                "data.value_range=[low,high], or auto; mode=check measures it. For a network trained without, convert "
                "the file to 8 bits."
            )
        if self.ranges is not None and dtype.name == "uint8" and 255 < max(high for _, high in self.ranges) < math.inf:
            raise DataError(
                f"{path}: holds 8-bit values, which do not reach the range {format_value_range(self.ranges)}. "
                "Use files of the type that the range was measured on."
            )


def format_value_range(ranges: Sequence[BandRange]) -> str:
    """Ranges as data.value_range writes them.

    >>> byte = BandRange(0, 255)
    >>> format_value_range([byte, byte]), format_value_range([byte, BandRange(-1, 1.5)])
    ('[0,255]', '[[0,255],[-1,1.5]]')
    """
    listed = [f"[{low:.7g},{high:.7g}]" for low, high in ranges]
    return listed[0] if len(set(listed)) == 1 else f"[{','.join(listed)}]"


def describe_bands(names: Sequence[str | None]) -> str:
    """The names of bands as data.bands writes them."""
    return f"[{','.join('null' if name is None else name for name in names)}]"


def band_options(data: DataConfig) -> BandOptions | None:
    """How the bands of a data set are read; None: images are 8-bit RGB. The ranges of auto are not known yet."""
    if not data.has_bands:
        return None
    names = tuple(name for name in data.bands if name is not None)
    files: dict[str, list[str | None]] = {}
    for name in data.bands:
        files.setdefault((data.band_files or {}).get(name or "", data.image_suffix), []).append(name)
    ranges = parse_ranges(data.value_range, len(names))
    known = ranges or [BandRange(0.0, 255.0)] * len(names)
    means = data.band_mean or [None] * len(names)
    fill = tuple((low + high) / 2 if mean is None else mean for (low, high), mean in zip(known, means, strict=True))
    listed = tuple(BandFile(suffix, tuple(members)) for suffix, members in files.items())
    return BandOptions(listed, names, ranges, fill, tuple(means), tuple(data.band_std or [None] * len(names)))


def parse_ranges(value: Any, num_bands: int) -> tuple[BandRange, ...] | None:
    """The value of data.value_range, which was checked, as a range for each band; None for null and auto."""
    if value is None or value == AUTO_RANGE:
        return None
    pairs = value if isinstance(value[0], list | tuple) else [value] * num_bands
    return tuple(BandRange(float(low), float(high)) for low, high in pairs)


# ---- drawing


def choose_shown(names: Sequence[str], shown: Sequence[str] | None) -> list[int]:
    """The places of the three bands that are drawn as red, green and blue.

    Args:
        names: of the bands of the image.
        shown: data.show_bands, or None: the colours if all are there, else the first three bands, or the first one.

    >>> choose_shown(["nir", "red", "green", "blue"], None), choose_shown(["vv", "vh"], None)
    ([1, 2, 3], [0, 0, 0])
    """
    if shown:
        return [names.index(name) for name in shown] * (1 if len(shown) == 3 else 3)
    if set(RGB) <= set(names):
        return [names.index(name) for name in RGB]
    return [0, 1, 2] if len(names) >= 3 else [0, 0, 0]


class Stretch(NamedTuple):
    """How values become brightness, for one of the bands that are drawn."""

    low: float  # is drawn black
    factor: float


def draw_bands(
    image: NDArray,
    names: Sequence[str],
    shown: Sequence[str] | None = None,
    stretches: Sequence[Stretch] | None = None,
) -> NDArray[np.uint8]:
    """(H, W, C) of any pixel type to (H, W, 3) uint8 RGB, for pictures.

    Images of 8 bits are drawn as they are. Others are stretched: the 2nd percentile of the three bands becomes black,
    the 98th white.

    Args:
        names: of the bands of the image.
        shown: data.show_bands.
        stretches: of the three bands, for a part of a larger image; None: measured in this one.
    """
    picked = image[..., choose_shown(names, shown)]
    if image.dtype == np.uint8:
        return np.ascontiguousarray(picked)
    drawn = np.empty(picked.shape, np.uint8)
    for band, (low, factor) in enumerate(stretches or measure_stretches(image, names, shown)):
        stretched = (picked[..., band].astype(np.float32) - np.float32(low)) * np.float32(factor)
        drawn[..., band] = np.clip(np.rint(stretched), 0, 255)
    return drawn


def measure_stretches(image: NDArray, names: Sequence[str], shown: Sequence[str] | None = None) -> list[Stretch]:
    """The stretches of the three bands of an image (H, W, C) that are drawn: one for all of red, green and blue.

    Args:
        names: of the bands of the image.
        shown: data.show_bands.
    """
    picked = image[..., choose_shown(names, shown)]
    step = max(1, math.isqrt(picked.shape[0] * picked.shape[1] // _MAX_STRETCHED))
    sample = picked[::step, ::step].astype(np.float32)
    groups = [[0, 1, 2]] if set(RGB) <= set(names) and not shown else [[0], [1], [2]]
    stretches = []
    for group in groups:
        low, high = np.percentile(sample[..., group], STRETCH)
        stretches += [Stretch(float(low), float(255 / (high - low)) if high > low else 0.0)] * len(group)
    return stretches
