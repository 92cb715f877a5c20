"""Pictures that travel inside a page: small, as data: URIs. No torch."""

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
from semseg.reports.draw import Pixels, colour_map

MAX_EDGE = 480  # pixels
JPEG_QUALITY = 80
WRONG = np.array((225, 40, 40))
DIM = 0.45  # brightness of what was predicted right, as a share of the image's
STRIPE = 4  # pixels
HATCH = (20, 70)  # grey levels of the stripes on what was not scored


class Strip(NamedTuple):
    """One image as four pictures side by side, each a data: URI."""

    image: str
    label: str
    prediction: str
    errors: str


def strip(
    image: Pixels,
    label: NDArray[np.integer],
    prediction: NDArray[np.integer],
    classes: ClassTable,
    edge: int = MAX_EDGE,
) -> Strip:
    """The four pictures of one image, each at most `edge` pixels high and wide.

    Args:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) class indices, -1 where nothing is scored.
        prediction: (H, W) class indices.

    Raises:
        ValueError: if the three differ in size.
    """
    if not image.shape[:2] == label.shape == prediction.shape:
        raise ValueError(f"image {image.shape[:2]}, label {label.shape} and prediction {prediction.shape} differ")
    small = shrunk(image, edge)
    rows, columns = small.shape[:2]
    label, prediction = nearest_pixels(label, rows, columns), nearest_pixels(prediction, rows, columns)
    return Strip(
        jpeg_uri(small),
        png_uri(colour_map(label, classes)),
        png_uri(colour_map(prediction, classes)),
        jpeg_uri(error_map(small, label, prediction)),
    )


def error_map(image: Pixels, label: NDArray[np.integer], prediction: NDArray[np.integer]) -> Pixels:
    """Wrong pixels red, right ones the image in dim grey, pixels that are not scored hatched.

    Args:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) class indices, -1 where nothing is scored.
        prediction: (H, W) class indices.
    """
    grey = image.mean(axis=2, keepdims=True)
    drawn = np.repeat(DIM * grey, 3, axis=2)
    wrong = label != prediction
    drawn[wrong] = (0.8 * WRONG + 0.2 * grey)[wrong]
    rows, columns = np.indices(label.shape)
    stripes = np.where((rows + columns) // STRIPE % 2, *HATCH)[..., None]
    return np.where((label < 0)[..., None], stripes, drawn).round().astype(np.uint8)


def shrunk(image: Pixels, edge: int) -> Pixels:
    """The image with a long edge of at most `edge` pixels; smaller ones stay as they are."""
    picture = Image.fromarray(image)
    picture.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def nearest_pixels(ids: NDArray[np.integer], rows: int, columns: int) -> NDArray[np.integer]:
    """(H, W) -> (rows, columns) without mixing values: the pixels under the new pixels' centres."""
    height, width = ids.shape
    down = ((np.arange(rows) + 0.5) * height / rows).astype(int)
    across = ((np.arange(columns) + 0.5) * width / columns).astype(int)
    return ids[np.ix_(down, across)]


def thumbnail_of_file(path: Path, edge: int = MAX_EDGE) -> str:
    """A picture file as a JPEG data: URI, at most `edge` pixels high and wide.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return jpeg_uri(shrunk(np.asarray(picture.convert("RGB")), edge))
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a picture ({error}). Remove it, or evaluate again.") from error


def jpeg_uri(pixels: Pixels) -> str:
    """(H, W, 3) as a data: URI, with the losses of JPEG."""
    return _uri(pixels, "JPEG", quality=JPEG_QUALITY)


def png_uri(pixels: Pixels) -> str:
    """(H, W, 3) as a data: URI, exactly."""
    return _uri(pixels, "PNG", optimize=True)


def _uri(pixels: Pixels, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
