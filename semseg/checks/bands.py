"""What bands and values the images of a data set hold, and the keys with which all of them are used (mode=check)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from semseg.checks.dataset import NOTE, WARNING, Notice
from semseg.config.preprocessing import RGB
from semseg.config.schema import AUTO_RANGE, DataConfig
from semseg.data.band_images import count_bands
from semseg.data.band_statistics import BandStatistics, measure_bands
from semseg.data.bands import band_options, describe_bands, format_value_range
from semseg.data.header_cache import find_pixel_type, read_header_only
from semseg.data.headers import Header
from semseg.data.records import Record
from semseg.errors import DataError


class BandAdvice(NamedTuple):
    """What was found out about the bands."""

    notices: list[Notice]
    suggestions: dict[str, str]  # configuration key -> value as written on the command line
    data: DataConfig  # with the suggestions


def advise_on_bands(data: DataConfig, records: Sequence[Record]) -> BandAdvice:
    """Names for the bands of the images, and the range, mean and standard deviation of what the configuration lacks.

    What the configuration says already stays, except data.value_range=auto, which is replaced by what it stands for.
    """
    header = next((header for record in records if (header := _read(record.image)) is not None), None)
    if header is None:
        return BandAdvice([], {}, data)
    count, dtype = count_bands(header).num_bands, find_pixel_type(record.image for record in records)
    is_picture = header.raster is None and header.bits <= 8
    if not dtype or (is_picture and not data.has_bands):
        return BandAdvice([], {}, data)
    suggestions: dict[str, str] = {}
    if not data.has_bands and count not in (1, len(RGB)):
        names = name_bands(count, is_rgb=header.raster is not None and header.raster.is_rgb)
        suggestions["data.bands"] = describe_bands(names)
        data = replace(data, bands=names)
    elif not data.has_bands and count == 1 and dtype in ("int16", "float32"):
        suggestions["data.bands"] = "[grey]"
        data = replace(data, bands=["grey"])
    others = [name for name in data.band_names if name not in RGB]
    lacks_range = data.value_range == AUTO_RANGE or (data.value_range is None and dtype != "uint8")
    lacks_mean = bool(others) and (data.band_mean is None or data.band_std is None)
    if not lacks_range and not lacks_mean:
        return BandAdvice([], suggestions, data)
    was_silent = data.value_range is None and not data.has_bands
    reading = band_options(data if data.has_bands else replace(data, value_range=[0, 1]))
    assert reading is not None, "there is a range"
    try:
        measured = measure_bands(records, replace(reading, dtype=dtype), data.max_pixels)
    except DataError as error:
        notice = Notice(WARNING, f"train: the values of the bands cannot be measured: {error}")
        return BandAdvice([notice], suggestions, data)
    keys = measured.suggest(data)
    if not lacks_range:
        keys.pop("data.value_range")
    suggestions |= keys
    applied = measured.apply(data)
    data = applied if lacks_range else replace(applied, value_range=data.value_range)
    level = WARNING if was_silent and dtype == "uint16" else NOTE
    without = " Without data.value_range they are read as 8 bits." if level == WARNING else ""
    return BandAdvice([Notice(level, describe_measured(measured) + without)], suggestions, data)


def _read(path: str) -> Header | None:
    try:
        return read_header_only(path)
    except DataError:
        return None


def name_bands(count: int, *, is_rgb: bool) -> list[str | None]:
    """Names for the bands of a file that does not name them.

    >>> name_bands(4, is_rgb=False), name_bands(2, is_rgb=False)
    (['red', 'green', 'blue', 'nir'], ['band1', 'band2'])
    """
    if count == len(RGB) + 1:
        return [*RGB, "nir"]
    numbered = [f"band{number}" for number in range(1, count + 1)]
    return [*RGB, *numbered[len(RGB) :]] if is_rgb else list(numbered)


def describe_measured(measured: BandStatistics) -> str:
    """A sentence about the values of each band."""
    listed = ", ".join(
        f"{name} {low:.5g} .. {high:.5g}" for name, (low, high) in zip(measured.names, measured.ranges, strict=True)
    )
    same = len(set(measured.ranges)) == 1
    ranges = format_value_range(measured.ranges) if same else listed
    return (
        f"train: images hold {len(measured.names)} bands of {measured.dtype} values; percentiles 0.5 and 99.5 of "
        f"{measured.num_images} of them: {ranges}. Check the names of the bands: data.bands."
        if set(measured.names) - set(RGB)
        else f"train: images hold {measured.dtype} values; percentiles 0.5 and 99.5 of {measured.num_images} of them: "
        f"{ranges}."
    )
