"""From the annotations of an image to the class of every pixel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.data.geometry import Size
from semseg.data.headers import Header
from semseg.data.images import apply_orientation, open_checked, read_header, size_of_pixels
from semseg.data.importing.model import UNLABELLED, AnnotatedImage, Annotation
from semseg.data.regions import Patch, unite
from semseg.errors import DataError

MAX_KEPT_BYTES = 2**26  # of the annotations of one image while they are sorted


class Drawing(NamedTuple):
    """The label of an image."""

    label: NDArray[np.integer]  # (H, W) of the upright image: class index, IGNORED or UNLABELLED
    is_rotated: bool  # whether the file has an EXIF orientation
    is_assumed: bool  # whether the sizes do not show for which of both grids the annotations are
    lost: tuple[str, ...] = ()  # annotations of which no pixel is in the image, for messages


def draw_label(item: AnnotatedImage, *, smaller_on_top: bool, max_pixels: int) -> Drawing:
    """The label of an image of an export.

    Annotations may be for the stored or the upright image: their size shows it. Where both have the same size, they are
    taken to be for the image as viewers display it.

    Args:
        smaller_on_top: of two annotations the one with fewer pixels is on top, else the later one.

    Raises:
        DataError: naming the entry, if a file or an annotation cannot be read, or sizes differ.
    """
    if item.content is None:
        header = read_header(item.path, max_pixels=max_pixels)
    else:
        header = open_checked(item.origin, item.content(), max_pixels)[1]
    if item.mask is not None:
        label = item.mask.read(item.mask.path, max_pixels)
        size = size_of_pixels(label)
        if item.size not in (None, size):
            raise DataError(f"{item.origin}: {item.mask.path} is {size}, not {item.size} (height x width).")
        is_upright, lost = choose_grid(item, header, size, item.mask.path), []
    else:
        size = item.size or header.upright
        is_upright = choose_grid(item, header, size, item.origin)
        label, lost = paint(item, size, smaller_on_top=smaller_on_top)
    is_assumed = header.orientation != 1 and (header.stored == header.upright or (item.size or item.mask) is None)
    label = label if is_upright else apply_orientation(label, header.orientation)
    return Drawing(label, header.orientation != 1, is_assumed, tuple(lost))


def choose_grid(item: AnnotatedImage, header: Header, size: Size, file: str) -> bool:
    """Whether annotations of a size are for the upright image.

    Raises:
        DataError: if they fit neither the stored nor the upright image.
    """
    if size not in (header.stored, header.upright):
        rotated = f", or {header.upright} upright" if header.stored != header.upright else ""
        raise DataError(
            f"{file}: its annotations are for {size} pixels, {item.path} is {header.stored}{rotated} (height x width). "
            "Export them together with the images on which they were drawn, or set import.images to their folder."
        )
    return size == header.upright


def paint(item: AnnotatedImage, size: Size, *, smaller_on_top: bool) -> tuple[NDArray[np.int32], list[str]]:
    """The annotations of an image over each other, and the names of those that have no pixel in it.

    Raises:
        DataError: naming the annotation, if one cannot be drawn.
    """
    label, lost = np.full(size, UNLABELLED, np.int32), list[str]()
    order, kept = list(range(len(item.annotations))), dict[int, Patch]()
    if smaller_on_top:
        areas, num_bytes = [], 0
        for position, annotation in enumerate(item.annotations):
            patch = paint_annotation(item, annotation, size)
            areas.append(patch.area)
            num_bytes += patch.mask.size
            if num_bytes <= MAX_KEPT_BYTES:  # the others are drawn twice
                kept[position] = patch
        order.sort(key=lambda position: (-areas[position], position))
    for position in order:
        annotation = item.annotations[position]
        top, left, mask = kept.pop(position, None) or paint_annotation(item, annotation, size)
        window = label[top : top + mask.shape[0], left : left + mask.shape[1]]
        window[mask] = annotation.class_index
        if annotation.shapes and not mask.size:
            lost.append(f"{item.origin}: {annotation.name}")
    return label, lost


def paint_annotation(item: AnnotatedImage, annotation: Annotation, size: Size) -> Patch:
    """The pixels of an annotation, in the smallest window.

    Raises:
        DataError: naming it, if it cannot be drawn.
    """
    try:
        return crop(unite([shape.paint(size) for shape in annotation.shapes]))
    except ValueError as error:
        raise DataError(f"{item.origin}: {annotation.name}: {str(error).rstrip('.')}.") from None


def crop(patch: Patch) -> Patch:
    """A patch without empty rows and columns at its sides, so that many of them do not fill the memory."""
    rows, columns = (np.flatnonzero(patch.mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return Patch(0, 0, np.zeros((0, 0), np.bool_))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    if patch.mask.shape == (bottom - top, right - left):
        return patch
    return Patch(patch.top + top, patch.left + left, patch.mask[top:bottom, left:right].copy())
