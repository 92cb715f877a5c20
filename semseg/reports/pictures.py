"""Encode small pictures as data: URIs, which are part of a page. No torch."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semseg.data.classes import ClassTable
from semseg.errors import DataError
from semseg.reports.draw import Pixels, colour_class_map

MAX_EDGE = 480  # pixels
JPEG_QUALITY = 80
WRONG_COLOUR = np.array((225, 40, 40))
CORRECT_BRIGHTNESS = 0.45  # brightness of correct pixels in the error map, as a fraction of the image's
STRIPE_WIDTH = 4  # pixels
HATCH_LEVELS = (20, 70)  # grey levels of the stripes on pixels that are not scored


class PictureStrip(NamedTuple):
    """An image as four pictures side by side, each a data: URI."""

    image: str
    label: str
    prediction: str
    errors: str


def encode_strip(
    image: Pixels,
    label: NDArray[np.integer],
    prediction: NDArray[np.integer],
    classes: ClassTable,
    edge: int = MAX_EDGE,
) -> PictureStrip:
    """Draw and encode the four pictures of one image, each at most `edge` pixels high and wide.

    Args:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) class indices, -1 where nothing is scored.
        prediction: (H, W) class indices.

    Raises:
        ValueError: if the three differ in size.
    """
    if not image.shape[:2] == label.shape == prediction.shape:
        raise ValueError(f"image {image.shape[:2]}, label {label.shape} and prediction {prediction.shape} differ")
    small = shrink(image, edge)
    rows, columns = small.shape[:2]
    label, prediction = resize_nearest(label, rows, columns), resize_nearest(prediction, rows, columns)
    return PictureStrip(
        encode_jpeg_uri(small),
        encode_png_uri(colour_class_map(label, classes)),
        encode_png_uri(colour_class_map(prediction, classes)),
        encode_jpeg_uri(draw_error_map(small, label, prediction)),
    )


def draw_error_map(image: Pixels, label: NDArray[np.integer], prediction: NDArray[np.integer]) -> Pixels:
    """Draw wrong pixels in red, correct ones as the image in dim grey, and pixels that are not scored hatched.

    Args:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) class indices, -1 where nothing is scored.
        prediction: (H, W) class indices.
    """
    grey = image.mean(axis=2, keepdims=True)
    pixels = np.repeat(CORRECT_BRIGHTNESS * grey, 3, axis=2)
    is_wrong = label != prediction
    pixels[is_wrong] = (0.8 * WRONG_COLOUR + 0.2 * grey)[is_wrong]
    rows, columns = np.indices(label.shape)
    stripes = np.where((rows + columns) // STRIPE_WIDTH % 2, *HATCH_LEVELS)[..., None]
    return np.where((label < 0)[..., None], stripes, pixels).round().astype(np.uint8)


def shrink(image: Pixels, edge: int) -> Pixels:
    """Shrink the image to a long edge of at most `edge` pixels; smaller images are not changed."""
    picture = Image.fromarray(image)
    picture.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def resize_nearest(ids: NDArray[np.integer], rows: int, columns: int) -> NDArray[np.integer]:
    """Resize (H, W) to (rows, columns) without mixing values: take the pixels under the new pixels' centres."""
    height, width = ids.shape
    row_indices = ((np.arange(rows) + 0.5) * height / rows).astype(int)
    column_indices = ((np.arange(columns) + 0.5) * width / columns).astype(int)
    return ids[np.ix_(row_indices, column_indices)]


def encode_thumbnail(path: Path) -> str:
    """Encode a picture file as a JPEG data: URI, at most MAX_EDGE pixels high and wide.

    Raises:
        DataError: if the file cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return encode_jpeg_uri(shrink(np.asarray(picture.convert("RGB")), MAX_EDGE))
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a picture ({error}). Remove it, or evaluate again.") from error


def encode_jpeg_uri(pixels: Pixels) -> str:
    """Encode (H, W, 3) as a lossy JPEG data: URI."""
    return _encode_uri(pixels, "JPEG", quality=JPEG_QUALITY)


def encode_png_uri(pixels: Pixels) -> str:
    """Encode (H, W, 3) as a lossless PNG data: URI."""
    return _encode_uri(pixels, "PNG", optimize=True)


def _encode_uri(pixels: Pixels, image_format: str, **options: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
