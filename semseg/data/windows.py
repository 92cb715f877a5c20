"""Stage 3, by parts: images that are read by window, and which windows cover an image.

A large image is never needed at once: training takes a crop, and prediction goes over it in rows of overlapping
windows, from top to bottom. As soon as no later window touches a row of pixels, that row is finished and handed to a
sink, so that memory depends on the width of the image, but not on its height.

The planning is pure functions of numbers, in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from semseg.data.geometry import Size

# Images and labels of more pixels are evaluated and indexed by window where their format allows: four bands of 16 bits
# take 270 MB then, which workers prepare several times.
WHOLE_PIXELS = 2**25
STRIP_PIXELS = 2**22  # of what is read in strips of rows
BLOCK_SIDE = 2048  # pixels: of what is read in squares


class Window(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class WindowReader(Protocol):
    """An image whose pixels are read by window.

    Files are opened in the process that reads them, and readers are not sent to other processes. Windows may be read in
    any order; reading in rows from top to bottom is the order of prediction, for which a format may keep what it has
    decoded.
    """

    @property
    def height(self) -> int:
        """Rows of pixels, as displayed."""
        ...

    @property
    def width(self) -> int:
        """Columns of pixels, as displayed."""
        ...

    @property
    def num_bands(self) -> int:
        """Numbers per pixel: 3 for RGB."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """The type of these numbers: uint8 for RGB."""
        ...

    def read(self, top: int, left: int, height: int, width: int) -> NDArray:
        """The pixels of a window that lies inside the image: (height, width, num_bands).

        The caller may not change them: they may be a view.

        Raises:
            DataError: if the file is damaged there.
        """
        ...


class WholeImage:
    """The reader of an image that was decoded whole.

    Args:
        pixels: (H, W, C).

    >>> WholeImage(np.zeros((4, 6, 3), np.uint8)).read(1, 2, height=3, width=4).shape
    (3, 4, 3)
    """

    def __init__(self, pixels: NDArray) -> None:
        self.pixels = pixels
        self.height, self.width, self.num_bands = pixels.shape
        self.dtype = pixels.dtype

    def read(self, top: int, left: int, height: int, width: int) -> NDArray:
        """The pixels of a window, a view (height, width, C)."""
        check_inside(Window(top, left, height, width), Size(self.height, self.width))
        return self.pixels[top : top + height, left : left + width]


def pick_pixels(reader: WindowReader, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> NDArray:
    """The pixels of an image at these rows and columns, both ascending: (len(rows), len(columns), bands).

    Blocks of BLOCK_SIDE are read one after the other, so that each strip or tile is decoded once.
    """
    picked = np.empty((len(rows), len(columns), reader.num_bands), reader.dtype)
    for top in range(0, reader.height, BLOCK_SIDE):
        height = min(BLOCK_SIDE, reader.height - top)
        is_row = (rows >= top) & (rows < top + height)
        for left in range(0, reader.width, BLOCK_SIDE):
            width = min(BLOCK_SIDE, reader.width - left)
            is_column = (columns >= left) & (columns < left + width)
            if is_row.any() and is_column.any():
                block = reader.read(top, left, height, width)
                picked[np.ix_(is_row, is_column)] = block[np.ix_(rows[is_row] - top, columns[is_column] - left)]
    return picked


def spread_windows(size: Size, count: int, side: int = 512) -> Iterator[Window]:
    """About `count` windows of at most `side` pixels, equally spread over an image.

    >>> [window[:2] for window in spread_windows(Size(5000, 2000), 4)]
    [(0, 0), (0, 1488), (4488, 0), (4488, 1488)]
    """
    per_axis = max(2, round(count**0.5))
    height, width = min(side, size.height), min(side, size.width)
    for row in range(per_axis):
        for column in range(per_axis):
            top, left = (
                number * (length - taken) // (per_axis - 1)
                for number, length, taken in ((row, size.height, height), (column, size.width, width))
            )
            yield Window(top, left, height, width)


def check_inside(window: Window, size: Size) -> None:
    """Raises a ValueError if a window is empty or not inside an image of `size`."""
    bottom, right = window.top + window.height, window.left + window.width
    is_inside = 0 <= window.top < bottom <= size.height and 0 <= window.left < right <= size.width
    if not is_inside:
        raise ValueError(f"{window} is not inside an image of {size} pixels")


def row_strips(size: Size, num_pixels: int = STRIP_PIXELS) -> Iterator[Window]:
    """An image of `size` in strips of whole rows of about `num_pixels`, from top to bottom.

    >>> [(window.top, window.height) for window in row_strips(Size(10, 100), 400)]
    [(0, 4), (4, 4), (8, 2)]
    """
    step = max(1, num_pixels // size.width)
    for top in range(0, size.height, step):
        yield Window(top, 0, min(step, size.height - top), size.width)


# ---- what prediction gives


class FinishedRows(NamedTuple):
    """The prediction for some whole rows of an image; rows arrive from top to bottom, each once."""

    top: int  # the first of them in the image
    ids: NDArray[np.int16]  # (n, width) class index
    confidence: NDArray[np.floating]  # (n, width) the probability of that class
    probabilities: NDArray[np.floating] | None  # (K, n, width) of all classes, if the sink takes them
    label_confidence: NDArray[np.floating] | None = None  # (n, width) of the classes in a label, if there is one


class RowSink(Protocol):
    """Takes a prediction row by row: a file that is written in this order, an array, a count of classes."""

    @property
    def takes_probabilities(self) -> bool:
        """Whether `write_rows` needs the probabilities of all classes."""
        ...

    def write_rows(self, rows: FinishedRows) -> None:
        """Take the next rows."""
        ...


# ---- planning


def window_starts(length: int, side: int, step: int) -> list[int]:
    """First pixels of the windows along one axis: every `step` pixels, the last window flush with the end.

    >>> window_starts(100, side=40, step=32), window_starts(30, side=40, step=32)
    ([0, 32, 60], [0])
    """
    last = max(0, length - side)
    return [*range(0, last, step), last]


class WindowRow(NamedTuple):
    """The windows that begin at one row of an image, from left to right."""

    windows: tuple[Window, ...]
    finished: int  # rows of the image above this one are complete after these windows


def plan_window_rows(size: Size, side: int, step: int) -> Iterator[WindowRow]:
    """The windows that cover an image, in rows from top to bottom.

    Args:
        size: of the image.
        side: of the square windows; along an axis on which the image is shorter, windows have its length.
        step: pixels from window to window, at most `side`.

    >>> [(row.windows[0].top, len(row.windows), row.finished) for row in plan_window_rows(Size(100, 90), 64, 32)]
    [(0, 2, 32), (32, 2, 36), (36, 2, 100)]
    """
    if not 1 <= step <= side:
        raise ValueError(f"windows of {side} pixels cannot be {step} pixels apart")
    height, width = min(side, size.height), min(side, size.width)
    tops, lefts = window_starts(size.height, side, step), window_starts(size.width, side, step)
    for top, finished in zip(tops, [*tops[1:], size.height], strict=True):
        yield WindowRow(tuple(Window(top, left, height, width) for left in lefts), finished)


def blend_weights(length: int) -> NDArray[np.float32]:
    """The weights of the positions of a window along one axis: 1, 2, 3, ... to the middle and back.

    At the edge of a window a network sees one side only. Whole numbers, so that their products with logits that are
    whole numbers, and the sums, are exact.

    >>> blend_weights(5).tolist(), blend_weights(4).tolist()
    ([1.0, 2.0, 3.0, 2.0, 1.0], [1.0, 2.0, 2.0, 1.0])
    """
    positions = np.arange(length)
    return np.minimum(positions + 1, length - positions).astype(np.float32)
