"""Stage 3 for crops: an image, read by window where its format allows, and its label, on one pixel grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.data.band_windows import BandWindows, open_windows
from semseg.data.bands import BandOptions
from semseg.data.geometry import Size
from semseg.data.images import MAX_PIXELS
from semseg.data.label_cache import LabelCache
from semseg.data.label_map import IGNORED, LabelMap
from semseg.data.label_windows import LabelWindows, open_label
from semseg.data.labels import Label
from semseg.data.pairs import name_origin, read_pair, size_mismatch_message
from semseg.data.records import Record
from semseg.data.windows import WHOLE_PIXELS, WholeImage, Window
from semseg.errors import DataError

COLUMNS_AT_ONCE = 2048  # of an image that is read for its validity alone


class PairWindow(NamedTuple):
    """The same window of an image and its label."""

    image: NDArray  # (h, w, C)
    label: NDArray[np.int16]  # (h, w) class index, -1 = not scored


class OpenPair:
    """An image and its label, whose windows are read on request.

    Args:
        image: its reader.
        label: (H, W) class indices, or what gives them for a window.
    """

    def __init__(self, image: WholeImage | BandWindows, label: NDArray[np.int16] | Label | LabelWindows) -> None:
        self.image, self.label = image, label
        self.size = Size(image.height, image.width)

    def read(self, window: Window) -> PairWindow:
        """The pixels of a window; those of the image that have no value are not scored.

        Raises:
            DataError: if the image or the label is damaged there.
        """
        label = self._read_label(window)
        if isinstance(self.image, WholeImage):
            return PairWindow(np.ascontiguousarray(self.image.read(*window)), label)
        read = self.image.read_image(*window)
        if read.is_valid is not None:
            label = np.where(read.is_valid, label, IGNORED).astype(np.int16)
        return PairWindow(np.ascontiguousarray(read.pixels), label)

    def read_label(self, window: Window) -> NDArray[np.int16]:
        """The label of a window as `read` gives it; the image is read only if it may lack values.

        Raises:
            DataError: as `read`.
        """
        if isinstance(self.image, WholeImage) or not self.image.may_lack_values:
            return self._read_label(window)
        parts = []
        for left in range(window.left, window.left + window.width, COLUMNS_AT_ONCE):
            width = min(COLUMNS_AT_ONCE, window.left + window.width - left)
            parts.append(self.read(Window(window.top, left, window.height, width)).label)
        return np.concatenate(parts, axis=1)

    def _read_label(self, window: Window) -> NDArray[np.int16]:
        top, left, height, width = window
        if isinstance(self.label, np.ndarray):
            return self.label[top : top + height, left : left + width].copy()
        if isinstance(self.label, LabelWindows):
            return self.label.read(window)
        return self.label.select(np.arange(top, top + height), np.arange(left, left + width))


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
    whole, and labels as well, unless they are in the cache, or are large and of such a format.

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
    with ExitStack() as opened:
        try:
            label_map = record.label_map or label_map
            opened.enter_context(windows)
            size = Size(windows.height, windows.width)
            if record.size != size:
                raise DataError(size_mismatch_message(record, size))
            is_huge = math.prod(size) > max_pixels
            label = opened.enter_context(
                open_label(record.label, label_map, max_pixels=max_pixels, cache=cache, may_be_too_large=is_huge)
            )
            if label.size != size:
                raise DataError(
                    f"image and label differ in size: {record.image} is {size}, {record.label} is {label.size} "
                    "(height x width). They must be drawn on the same pixels."
                )
        except DataError as error:
            raise name_origin(record, error) from error
        yield OpenPair(windows, label)


def is_read_by_window(record: Record, bands: BandOptions | None, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether an image has more than WHOLE_PIXELS, or `max_pixels`, and its format can be read by window.

    Raises:
        DataError: if it is damaged, or does not hold the bands.
    """
    if math.prod(record.size) <= min(WHOLE_PIXELS, max_pixels):
        return False
    windows = open_windows(record.image, bands)
    if windows is not None:
        windows.close()
    return windows is not None
