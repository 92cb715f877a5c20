"""Size arithmetic of the whole pipeline. Pure functions of numbers: no pixels, no files, no torch.

Every size is (height, width) in pixels. The order of operations in `scaled_size` is that of the original code: rounding
instead of truncating, or multiplying first, changes the size of one image in a few hundred by a pixel.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


def round_up(length: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `length` (both in pixels, above 0).

    Raises:
        ValueError: if either number is below 1.

    >>> round_up(451, 32)
    480
    """
    if length < 1 or multiple < 1:
        raise ValueError(f"round_up needs numbers above 0, got length {length} and multiple {multiple}")
    return -(-length // multiple) * multiple


def scaled_size(size: Size, short_edge: int, max_long_edge: int) -> Size:
    """`size` with its short side brought to `short_edge`, or its long side to `max_long_edge` if that is smaller.

    Truncated, not rounded, in double precision, like the original: 426 x 640 at 450 gives 449 rows. At least 1 x 1.

    >>> scaled_size(Size(426, 640), short_edge=450, max_long_edge=1000)
    Size(height=449, width=676)
    """
    scale = min(short_edge / min(size), max_long_edge / max(size))
    return Size(max(1, int(size.height * scale)), max(1, int(size.width * scale)))


def canvas_size(sizes: Iterable[Size], multiple: int) -> Size:
    """The canvas that contains every image of a sub-batch: largest height and width, each rounded up.

    >>> canvas_size([Size(300, 400), Size(280, 500)], multiple=32)
    Size(height=320, width=512)
    """
    members = list(sizes)
    tallest = max(size.height for size in members)
    widest = max(size.width for size in members)
    return Size(round_up(tallest, multiple), round_up(widest, multiple))


def largest_canvas(sizes: Iterable[Size], short_edge: int, max_long_edge: int, multiple: int) -> Size:
    """The largest canvas that images of these sizes can share: maximum height and width within one orientation.

    >>> largest_canvas([Size(300, 400), Size(300, 600), Size(500, 400)], 300, 450, multiple=32)
    Size(height=320, width=480)
    """
    scaled = [scaled_size(size, short_edge, max_long_edge) for size in sizes]
    portrait = [size for size in scaled if size.height > size.width]
    landscape = [size for size in scaled if size.height <= size.width]
    canvases = [canvas_size(group, multiple) for group in (portrait, landscape) if group]
    return max(canvases, key=lambda size: size.height * size.width)


def label_size(canvas: Size, label_stride: int) -> Size:
    """Size of the label of a canvas: one pixel for each `label_stride` x `label_stride` pixels.

    Raises:
        ValueError: if the canvas is not a multiple of `label_stride` (the size divisor must be a multiple of it).

    >>> label_size(Size(320, 512), label_stride=8)
    Size(height=40, width=64)
    """
    if canvas.height % label_stride or canvas.width % label_stride:
        raise ValueError(
            f"canvas {canvas} is not a multiple of label_stride {label_stride}: "
            "choose a size_divisor that label_stride divides"
        )
    return Size(canvas.height // label_stride, canvas.width // label_stride)


def stretched_size(size: Size, short_edge: int, max_long_edge: int, multiple: int) -> Size:
    """Size of an evaluation input: the scaled size, each side rounded up, filled by stretching (no padding).

    >>> stretched_size(Size(512, 683), short_edge=450, max_long_edge=1000, multiple=8)
    Size(height=456, width=600)
    """
    scaled = scaled_size(size, short_edge, max_long_edge)
    return Size(round_up(scaled.height, multiple), round_up(scaled.width, multiple))
