"""Stage 8: draw class maps as pictures with colours, borders and a legend."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from semseg.data.classes import ClassTable

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB

DEFAULT_OPACITY = 0.6
BORDER_BRIGHTNESS = 0.35  # brightness of the line between two classes, as a fraction of the overlay's
MIN_PANEL_WIDTH = 480  # pixels; smaller images are enlarged so that the legend can be read
MAX_ENLARGED_PIXELS = 4_000_000  # of an image with its margin; a narrow tall one gets a wider margin instead
MIN_TEXT_HEIGHT = 12  # pixels, of legends
UNSCORED_COLOUR = (0, 0, 0)


class ClassShare(NamedTuple):
    """The fraction of an image that one class covers."""

    class_index: int
    name: str
    share: float  # fraction of all pixels, 0..1


def class_shares(ids: NDArray[np.integer], classes: ClassTable) -> list[ClassShare]:
    """Return the classes present in `ids` (H, W), the largest first."""
    counts = np.bincount(ids[ids >= 0].ravel(), minlength=classes.num_classes)
    order = np.argsort(-counts, kind="stable")
    return [ClassShare(int(i), classes.names[i], float(counts[i] / ids.size)) for i in order if counts[i]]


def colour_class_map(ids: NDArray[np.integer], classes: ClassTable) -> Pixels:
    """Map (H, W) class indices to (H, W, 3) colours; -1 is black."""
    palette = np.vstack([classes.colours(), np.array([UNSCORED_COLOUR], np.uint8)])
    return palette[ids]


def draw_overlay(
    image: Pixels, ids: NDArray[np.integer], classes: ClassTable, opacity: float = DEFAULT_OPACITY
) -> Pixels:
    """Blend the image with its class colours, with a dark line between neighbouring classes."""
    return blend_classes(image, ids, find_borders(ids), classes, opacity)


def blend_classes(
    image: Pixels,
    ids: NDArray[np.integer],
    is_border: NDArray[np.bool_],
    classes: ClassTable,
    opacity: float = DEFAULT_OPACITY,
) -> Pixels:
    """As `draw_overlay`, for a part of an image whose borders (H, W) are known."""
    blended = np.asarray(cv2.addWeighted(image, 1 - opacity, colour_class_map(ids, classes), opacity, 0), np.uint8)
    blended[is_border] = (blended[is_border] * BORDER_BRIGHTNESS).round()
    return blended


def find_borders(ids: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return (H, W): True where the right or the lower neighbour has another class."""
    is_border = np.zeros(ids.shape, bool)
    is_border[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    is_border[:-1] |= ids[:-1] != ids[1:]
    return is_border


def draw_panel(image: Pixels, ids: NDArray[np.integer], classes: ClassTable) -> Pixels:
    """Draw image | overlay, with a legend of the classes present below: colour, name, fraction of the pixels."""
    if image.shape[:2] != ids.shape:
        raise ValueError(f"image {image.shape[:2]} and class map {ids.shape} differ in size")
    pair = [enlarge(part, MIN_PANEL_WIDTH // 2) for part in (image, draw_overlay(image, ids, classes))]
    return _append_legend(np.concatenate(pair, axis=1), ids, classes, MIN_PANEL_WIDTH)


def draw_comparison(
    image: Pixels, label: NDArray[np.integer], prediction: NDArray[np.integer], classes: ClassTable
) -> Pixels:
    """Draw image | ground truth | prediction (H, 3 W, 3) as in 2018: class colours, black where nothing is scored."""
    return np.concatenate([image, colour_class_map(label, classes), colour_class_map(prediction, classes)], axis=1)


def add_legend(picture: Pixels, ids: NDArray[np.integer], classes: ClassTable) -> Pixels:
    """Add a legend below a picture (H, W, 3) of `ids` (H, W); small pictures are enlarged so that it can be read."""
    return _append_legend(enlarge(picture, MIN_PANEL_WIDTH // 2), ids, classes, MIN_PANEL_WIDTH // 2)


def _append_legend(picture: Pixels, ids: NDArray[np.integer], classes: ClassTable, min_width: int) -> Pixels:
    height, width = picture.shape[0], max(picture.shape[1], min_width)
    text_height = max(MIN_TEXT_HEIGHT, min(width // 60, height // 10))  # in proportion, of panoramas too
    legend = draw_legend(class_shares(ids, classes), classes, width, text_height)
    canvas = np.full((height + legend.shape[0], width, 3), 255, np.uint8)
    canvas[:height, : picture.shape[1]], canvas[height:] = picture, legend
    return canvas


def enlarge(image: Pixels, min_width: int) -> Pixels:
    """Repeat every pixel in both directions, until the image has `min_width` or the most pixels."""
    height, width = image.shape[:2]
    factor = min(math.ceil(min_width / width), MAX_ENLARGED_PIXELS // (min_width * height))
    return image if factor <= 1 else image.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_legend(shares: list[ClassShare], classes: ClassTable, width: int, text_height: int) -> Pixels:
    """Draw a white strip of `width` pixels with the colour and name of each class, in as many columns as fit."""
    font = ImageFont.load_default(text_height)
    labels = [f"{share.name}  {format_share(share.share)}" for share in shares]
    margin, swatch = text_height // 2, text_height
    column = max((math.ceil(font.getlength(label)) for label in labels), default=0) + swatch + 3 * margin
    columns = max(1, (width - margin) // column)
    rows = math.ceil(len(labels) / columns)
    line = text_height + margin
    canvas = Image.new("RGB", (width, rows * line + margin if rows else margin), "white")
    draw = ImageDraw.Draw(canvas)
    for position, (share, label) in enumerate(zip(shares, labels, strict=True)):
        x = margin + (position // rows) * column  # column by column, so that the largest are together
        y = margin + (position % rows) * line
        draw.rectangle((x, y, x + swatch, y + swatch), fill=classes.palette[share.class_index], outline="black")
        draw.text((x + swatch + margin, y + text_height // 2), label, fill="black", font=font, anchor="lm")
    return np.asarray(canvas)


def format_share(share: float) -> str:
    """Format a fraction as a percentage; small fractions stay distinct from zero.

    >>> format_share(0.123), format_share(0.0004), format_share(0.0)
    ('12.3 %', '<0.1 %', '0 %')
    """
    if share == 0:
        return "0 %"
    return f"{100 * share:.1f} %" if share >= 0.0005 else "<0.1 %"
