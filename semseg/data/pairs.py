"""Stage 3: an image and its label on one pixel grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.config.schema import DataConfig
from semseg.data.band_images import read_bands
from semseg.data.bands import BandOptions, band_options, draw_bands
from semseg.data.geometry import Size
from semseg.data.headers import Header
from semseg.data.images import (
    MAX_PIXELS,
    apply_orientation,
    decode_pixels,
    is_jpeg,
    open_any,
    read_image_bytes,
    size_of_pixels,
)
from semseg.data.label_cache import LabelCache
from semseg.data.label_map import LabelMap
from semseg.data.labels import Label, ignore_pixels, read_class_indices
from semseg.data.records import Record
from semseg.errors import DataError


class ImagePair(NamedTuple):
    """An image and its label on the same pixel grid."""

    image: NDArray  # (H, W, 3) uint8 RGB, or (H, W, bands) of a type of PIXEL_TYPES
    label: NDArray[np.int16] | None  # (H, W) class index, -1 = not scored; None if the record has no label


class ReducedPair(NamedTuple):
    """An image decoded at a reduced size, and its label at full size, of the same view."""

    image: NDArray  # (h, w, bands) as in ImagePair; smaller than H, W for a JPEG that is much larger than requested
    label: Label  # (H, W)


def read_reduced(
    record: Record,
    target_size: Callable[[Size], Size],
    label_map: LabelMap,
    *,
    max_pixels: int = MAX_PIXELS,
    cache: LabelCache | None = None,
    bands: BandOptions | None = None,
) -> ReducedPair:
    """The image of a record and its label for training, decoding no more pixels of the image than needed.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is still at least the target size: the decoder averages
    blocks of pixels, which does most of the work of an antialiased resize.

    Args:
        target_size: maps the full size to the size that the image will be resized to.
        bands: see `read_pair`.

    Raises:
        DataError: as `read_pair`.
    """
    assert record.label is not None, "a record to train on has a label"
    try:
        label = read_class_indices(record.label, record.label_map or label_map, max_pixels=max_pixels, cache=cache)
        full = label.size
        if bands is not None:
            return _read_band_pair(record, label, bands, max_pixels)
        data = read_image_bytes(record.image)
        image, header = open_any(record.image, data, max_pixels)
        factor = jpeg_reduction(full, target_size(full)) if is_jpeg(data) else 1
        pixels = decode_pixels(record.image, data, image, header, factor)
        stored, is_upright = header.stored, _is_upright(record, header, full)
        if record.size not in (stored, full):
            raise DataError(size_mismatch_message(record, full))
    except DataError as error:
        raise name_origin(record, error) from error
    return ReducedPair(apply_orientation(pixels, header.orientation) if is_upright else pixels, label)


def _read_band_pair(record: Record, label: Label, bands: BandOptions, max_pixels: int) -> ReducedPair:
    """An image with these bands, and its label, in which pixels that hold no values are not scored."""
    image = read_bands(record.image, bands, max_pixels)
    if record.size not in (image.header.stored, label.size):
        raise DataError(size_mismatch_message(record, label.size))
    if _is_upright(record, image.header, label.size):
        image = image.turn_upright()
    return ReducedPair(image.pixels, ignore_pixels(label, image.is_valid))


def name_origin(record: Record, error: DataError) -> DataError:
    """The error about a pair with the list and line it is from; a file names its folder itself."""
    return error if str(error).startswith(f"{record.origin}/") else DataError(f"{record.origin}: {error}")


def jpeg_reduction(full: Size, target: Size) -> int:
    """The largest factor by which a JPEG can be reduced while it is decoded and still be at least as large as `target`.

    >>> jpeg_reduction(Size(1200, 1600), Size(450, 600)), jpeg_reduction(Size(1200, 1600), Size(150, 200))
    (2, 8)
    """
    factors = (
        factor for factor in (8, 4, 2) if full.height >= factor * target.height and full.width >= factor * target.width
    )
    return next(factors, 1)


def read_pair(
    record: Record,
    label_map: LabelMap | None,
    *,
    max_pixels: int = MAX_PIXELS,
    cache: LabelCache | None = None,
    bands: BandOptions | None = None,
) -> ImagePair:
    """The image of a record and its label, on one pixel grid.

    If the image has an EXIF orientation, the size of the label shows which grid it was drawn on; where both grids have
    that size, `record.is_upright` decides. Without a label or `label_map` the image is upright.

    Args:
        bands: which the image has; None: it is 8-bit RGB. Pixels without values (nodata, NaN, alpha 0) are filled, and
            not scored.

    Raises:
        DataError: as `read_image` and `read_label`; if image and label differ in size; if the size in the list differs
            from the file. The message begins with the record's origin.
    """
    try:
        if bands is not None:
            if record.label is not None and label_map is not None:
                label_map = record.label_map or label_map
                given = read_class_indices(record.label, label_map, max_pixels=max_pixels, cache=cache)
                image, label = _read_band_pair(record, given, bands, max_pixels)
                return ImagePair(image, label.to_array())
            read = read_bands(record.image, bands, max_pixels)
            upright = read.turn_upright().pixels
            if record.size not in (read.header.stored, size_of_pixels(upright)):
                raise DataError(size_mismatch_message(record, size_of_pixels(upright)))
            return ImagePair(upright, None)
        data = read_image_bytes(record.image)
        image, header = open_any(record.image, data, max_pixels)
        pixels = decode_pixels(record.image, data, image, header)
        if record.label is None or label_map is None:
            label, is_upright = None, True
        else:
            label_map = record.label_map or label_map
            label = read_class_indices(record.label, label_map, max_pixels=max_pixels, cache=cache).to_array()
            is_upright = _is_upright(record, header, size_of_pixels(label))
        pair = ImagePair(apply_orientation(pixels, header.orientation) if is_upright else pixels, label)
        if record.size not in (header.stored, size_of_pixels(pair.image)):
            raise DataError(size_mismatch_message(record, size_of_pixels(pair.image)))
    except DataError as error:
        raise name_origin(record, error) from error
    return pair


def read_shown(record: Record, label_map: LabelMap | None, data: DataConfig) -> NDArray[np.uint8]:
    """The image of a record for pictures, (H, W, 3) RGB, on the pixel grid of its label; bands as data.show_bands says.

    Raises:
        DataError: as `read_pair`.
    """
    bands = band_options(data)
    image = read_pair(record, label_map, max_pixels=data.max_pixels, bands=bands).image
    return image if bands is None else draw_bands(image, bands.names, data.show_bands)


def _is_upright(record: Record, header: Header, label: Size) -> bool:
    """Whether an image must be rotated upright to match its label.

    Raises:
        DataError: if the label matches neither the stored nor the upright image.
    """
    if label not in (header.stored, header.upright):
        raise DataError(
            f"image and label differ in size: {record.image} is {header.stored}, {record.label} is {label} "
            "(height x width). They must be drawn on the same pixels."
        )
    return record.is_upright if header.stored == header.upright else label == header.upright


def size_mismatch_message(record: Record, size: Size) -> str:
    return (
        f"{record.image}: the list says {record.size} (height x width), the file is {size}. "
        "Recreate the list from the files."
    )
