"""Stage 8: regions whose label may be wrong, as pictures for the page of an evaluation. No torch."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.data.windows import Window
from semseg.evaluation.label_errors import LabelError, decode_region_mask
from semseg.reports.draw import Pixels, draw_overlay
from semseg.reports.pictures import encode_jpeg_uri, resize_nearest

MAX_SHOWN_ERRORS = 150  # regions on the page
CROP_EDGE = 200  # pixels: the long edge of a picture on the page
MIN_CONTEXT = 32  # pixels of the image around a region, at least
OUTLINE_COLOURS = ((0, 0, 0), (255, 235, 60))  # a dark line below a bright one


class LabelErrorPictures(NamedTuple):
    """A region, and the part of the image around it as three pictures, each a data: URI."""

    rank: int  # from 1
    error: LabelError
    image: str  # with the outline of the region
    label: str  # colours of classes
    suggestion: str  # the label with the predicted class in the region


def choose_crop_window(box: Window, size: Size) -> Window:
    """The part of an image of `size` to show: a region with half its length, at least MIN_CONTEXT, on each side.

    >>> choose_crop_window(Window(10, 100, 20, 80), Size(100, 300))
    Window(top=0, left=60, height=70, width=160)
    """
    margin = max(MIN_CONTEXT, max(box.height, box.width) // 2)
    top, left = max(0, box.top - margin), max(0, box.left - margin)
    bottom = min(size.height, box.top + box.height + margin)
    right = min(size.width, box.left + box.width + margin)
    return Window(top, left, bottom - top, right - left)


def draw_label_error(
    rank: int, error: LabelError, image: Pixels, label: NDArray[np.integer], *, window: Window, classes: ClassTable
) -> LabelErrorPictures:
    """Draw and encode the pictures of a region.

    Args:
        image: (h, w, 3) RGB, the pixels of `window`.
        label: (h, w) class indices, -1 = not scored.
    """
    is_region = np.zeros(label.shape, np.uint8)
    top, left = error.box.top - window.top, error.box.left - window.left
    is_region[top : top + error.box.height, left : left + error.box.width] = decode_region_mask(error.mask)
    suggested = np.where(is_region > 0, error.predicted, label)
    factor = CROP_EDGE / max(label.shape)
    rows, columns = (max(1, round(length * factor)) for length in label.shape)
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    scaled = np.asarray(cv2.resize(image, (columns, rows), interpolation=interpolation), np.uint8)
    outlines, _ = cv2.findContours(
        resize_nearest(is_region, rows, columns).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
    )
    colours = [
        draw_overlay(scaled, resize_nearest(ids, rows, columns), classes, opacity=0.75) for ids in (label, suggested)
    ]
    for thickness, colour in zip((3, 1), OUTLINE_COLOURS, strict=True):
        cv2.drawContours(scaled, outlines, -1, colour, thickness)
    return LabelErrorPictures(rank, error, encode_jpeg_uri(scaled), *map(encode_jpeg_uri, colours))
