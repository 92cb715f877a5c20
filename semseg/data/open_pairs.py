"""Stage 3 for crops: an image, read by window where its format allows, and its label, on one pixel grid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.data.band_windows import BandWindows, open_windows
from semseg.data.bands import BandOptions
from semseg.data.geometry import Size
from semseg.data.images import MAX_PIXELS
from semseg.data.label_cache import LabelCache
from semseg.data.label_map import IGNORED, LabelMap
from semseg.data.labels import Label, read_class_indices
from semseg.data.pairs import name_origin, read_pair
from semseg.data.records import Record
from semseg.data.windows import WholeImage, Window
from semseg.errors import DataError


class PairWindow(NamedTuple):
    """The same window of an image and its label."""

    image: NDArray  # (h, w, C)
    label: NDArray[np.int16]  # (h, w) class index, -1 = not scored


class OpenPair:
    """An image and its label, whose windows are read on request.

    Args:
        image: its reader.
        label: (H, W) class indices, or what gives them for selected rows and columns.
    """

    def __init__(self, image: WholeImage | BandWindows, label: NDArray[np.int16] | Label) -> None:
        self.image, self.label = image, label
        self.size = Size(image.height, image.width)

    def read(self, window: Window) -> PairWindow:
        """The pixels of a window; those of the image that have no value are not scored.

        Raises:
            DataError: if the image is damaged there.
        """
        top, left, height, width = window
        if isinstance(self.label, np.ndarray):
            label = self.label[top : top + height, left : left + width].copy()
        else:
            label = self.label.select(np.arange(top, top + height), np.arange(left, left + width))
        if isinstance(self.image, WholeImage):
            return PairWindow(np.ascontiguousarray(self.image.read(*window)), label)
        read = self.image.read_image(*window)
        if read.is_valid is not None:
            label = np.where(read.is_valid, label, IGNORED).astype(np.int16)
        return PairWindow(np.ascontiguousarray(read.pixels), label)


@contextmanager
def open_pair(
    record: Record,
    label_map: LabelMap,
    *,
    max_pixels: int = MAX_PIXELS,
    cache: LabelCache | None = None,
    bands: BandOptions | None = None,
) -> Iterator[OpenPair]:
    """Open an image and its label to read windows of both.

    Tiled and stripped TIFF and .npy are read by window, whatever their number of pixels. Other images are decoded
    whole, and labels as well, unless they are in the cache.

    Raises:
        DataError: as `read_pair`.
    """
    assert record.label is not None, "a record to train on has a label"
    try:
        windows = open_windows(record.image, bands)
    except DataError as error:
        raise name_origin(record, error) from error
    if windows is None:
        pair = read_pair(record, label_map, max_pixels=max_pixels, cache=cache, bands=bands)
        assert pair.label is not None
        yield OpenPair(WholeImage(pair.image), pair.label)
        return
    with windows:
        try:
            label_map = record.label_map or label_map
            label = read_class_indices(record.label, label_map, max_pixels=max_pixels, cache=cache)
            size = Size(windows.height, windows.width)
            if size not in (label.size, record.size) or label.size != size:
                raise DataError(
                    f"image and label differ in size: {record.image} is {size}, {record.label} is {label.size} "
                    "(height x width). They must be drawn on the same pixels."
                )
        except DataError as error:
            raise name_origin(record, error) from error
        yield OpenPair(windows, label)
