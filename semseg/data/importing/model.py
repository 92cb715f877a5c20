"""What all readers of exports give: images with the regions that their annotations paint, or with a file of ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from semseg.data.brush_runs import decode_brush
from semseg.data.geometry import Size
from semseg.data.palette import Colour
from semseg.data.records import Problem
from semseg.data.regions import Patch, Ring, decode_runs, decode_text, fill_disc, fill_rings

IGNORED_VALUE = 255  # in masks of indices
UNLABELLED = -2  # in the class indices of an import: not scored; nobody annotated the pixel


class Shape(Protocol):
    """A region of an image."""

    def paint(self, size: Size) -> Patch:
        """The pixels of the region in an image of `size`, the grid that its coordinates are for.

        Raises:
            ValueError: if its numbers make no sense, with the reason.
        """
        ...


class Polygon(NamedTuple):
    """The pixels whose centres are inside an odd number of rings."""

    rings: tuple[Ring, ...]

    def paint(self, size: Size) -> Patch:
        return fill_rings(self.rings, size)


class RelativePolygon(NamedTuple):
    """A polygon by fractions of the width and height."""

    ring: Ring

    def paint(self, size: Size) -> Patch:
        return fill_rings([self.ring * (size.width, size.height)], size)


class Ellipse(NamedTuple):
    """The pixels whose centres are inside an ellipse with horizontal and vertical axes."""

    x: float
    y: float
    radius_x: float
    radius_y: float

    def paint(self, size: Size) -> Patch:
        return fill_disc(self.x, self.y, self.radius_x, self.radius_y, size)


class Runs(NamedTuple):
    """Run lengths of COCO."""

    counts: NDArray[np.int64] | str  # or their text
    size: Size

    def paint(self, size: Size) -> Patch:
        if self.size != size:
            raise ValueError(f"its run lengths are for {self.size} pixels, the image is {size} (height x width)")
        counts = decode_text(self.counts) if isinstance(self.counts, str) else self.counts
        return Patch(0, 0, decode_runs(counts, size))


class BrushRuns(NamedTuple):
    """Run lengths of Label Studio's brush."""

    data: bytes
    size: Size

    def paint(self, size: Size) -> Patch:
        if self.size != size:
            raise ValueError(f"its brush is for {self.size} pixels, the image is {size} (height x width)")
        return Patch(0, 0, decode_brush(self.data, size))


class Bitmap(NamedTuple):
    """A mask of a part of the image, whose top left corner may lie outside."""

    top: int
    left: int
    read: Callable[[int], NDArray[np.bool_]]  # of at most so many pixels

    def paint(self, size: Size) -> Patch:
        limit = (size.height + 2) * (size.width + 2)  # tools round corners to whole pixels
        mask = self.read(limit)[max(0, -self.top) :, max(0, -self.left) :]
        top, left = max(0, self.top), max(0, self.left)
        return Patch(top, left, mask[: max(0, size.height - top), : max(0, size.width - left)])


class Annotation(NamedTuple):
    """What one annotation paints: all pixels of its shapes."""

    class_index: int  # or IGNORED
    shapes: tuple[Shape, ...]
    name: str  # for messages: "annotation 17"


class MaskFile(NamedTuple):
    """An image file that holds the class of every pixel."""

    path: str
    read: Callable[[str, int], NDArray[np.integer]]  # (path, max_pixels) -> class index, IGNORED or UNLABELLED (H, W)


class AnnotatedImage(NamedTuple):
    """An image of an export, and what is annotated in it."""

    path: str  # of the image; of the file that holds it, if `content` is given
    name: str  # path in the data set, with /
    split: str  # train, val, test, or "" if the export names none
    size: Size | None  # that the coordinates are for, if the export names it
    origin: str  # where it comes from, for messages: "annotations.json: image 12"
    annotations: tuple[Annotation, ...] = ()
    mask: MaskFile | None = None  # instead of annotations
    content: Callable[[], bytes] | None = None  # reads the image, if it is not a file


class Export(NamedTuple):
    """An export of an annotation tool."""

    title: str  # "COCO", for the summary
    names: tuple[str, ...]  # of the classes
    palette: tuple[Colour, ...] | None  # None: colours are generated
    items: Sequence[AnnotatedImage | Problem]
    notes: tuple[str, ...] = ()  # sentences for the summary
    smaller_on_top: bool = False  # the tool's own rule for overlaps; otherwise the later annotation is on top


def make_ring(numbers: ArrayLike) -> Ring:
    """A ring of corners (n, 2) from x, y, x, y, ... or from pairs.

    Raises:
        ValueError: if it is no list of numbers, or their count is odd.
    """
    try:
        ring = np.asarray(numbers, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("a polygon must be a list of numbers") from None
    if ring.size % 2 or ring.ndim not in (1, 2) or (ring.ndim == 2 and ring.shape[1] != 2):
        raise ValueError("a polygon must be a list of x and y")
    return ring.reshape(-1, 2)


def make_rectangle(x: float, y: float, width: float, height: float) -> Polygon:
    """A rectangle by its top left corner."""
    return Polygon((make_ring([x, y, x + width, y, x + width, y + height, x, y + height]),))


def make_line(start: ArrayLike, end: ArrayLike, width: float) -> Polygon:
    """A line with square ends as a polygon; a line of no length has no pixels."""
    first, last = np.asarray(start, np.float64), np.asarray(end, np.float64)
    along = last - first
    length = float(np.hypot(*along))
    across = np.array([-along[1], along[0]]) * (width / 2 / length if length else 0)
    return Polygon((np.stack([first + across, last + across, last - across, first - across]),))
