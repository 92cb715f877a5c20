"""Stage 8: class maps as pictures people can read."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from semseg.data.classes import ClassTable

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB

OPACITY = 0.6
MIN_PANEL_WIDTH = 480  # pixels; smaller images are enlarged so that the legend can be read
UNSCORED = (0, 0, 0)


class Share(NamedTuple):
    """How much of an image one class takes."""

    class_index: int
    name: str
    share: float  # of all pixels, 0..1


def class_shares(ids: NDArray[np.integer], classes: ClassTable) -> list[Share]:
    """The classes present in `ids` (H, W), largest first."""
    counts = np.bincount(ids[ids >= 0].ravel(), minlength=classes.num_classes)
    order = np.argsort(-counts, kind="stable")
    return [Share(int(i), classes.names[i], float(counts[i] / ids.size)) for i in order if counts[i]]


def colour_map(ids: NDArray[np.integer], classes: ClassTable) -> Pixels:
    """(H, W) class indices -> (H, W, 3) colours; -1 is black."""
    palette = np.vstack([classes.colours(), np.array([UNSCORED], np.uint8)])
    return palette[ids]


def overlay(image: Pixels, ids: NDArray[np.integer], classes: ClassTable, opacity: float = OPACITY) -> Pixels:
    """The image under its class colours, with a dark line between neighbouring classes."""
    mixed = np.asarray(cv2.addWeighted(image, 1 - opacity, colour_map(ids, classes), opacity, 0), np.uint8)
    edge = borders(ids)
    mixed[edge] = (mixed[edge] * 0.35).round()
    return mixed


def borders(ids: NDArray[np.integer]) -> NDArray[np.bool_]:
    """(H, W): pixels whose right or lower neighbour has another class."""
    edge = np.zeros(ids.shape, bool)
    edge[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    edge[:-1] |= ids[:-1] != ids[1:]
    return edge


def panel(image: Pixels, ids: NDArray[np.integer], classes: ClassTable) -> Pixels:
    """image | overlay, with a legend of the classes present below: colour, name, share of the pixels."""
    height, width = ids.shape
    if (image.shape[0], image.shape[1]) != (height, width):
        raise ValueError(f"image {image.shape[:2]} and class map {ids.shape} differ in size")
    factor = max(1, math.ceil(MIN_PANEL_WIDTH / (2 * width)))
    pair = np.concatenate([enlarged(image, factor), enlarged(overlay(image, ids, classes), factor)], axis=1)
    return under(pair, ids, classes)


def comparison(
    image: Pixels, label: NDArray[np.integer], prediction: NDArray[np.integer], classes: ClassTable
) -> Pixels:
    """image | ground truth | prediction in class colours, black where nothing is scored: (H, 3 W, 3), as published."""
    return np.concatenate([image, colour_map(label, classes), colour_map(prediction, classes)], axis=1)


def with_legend(picture: Pixels, ids: NDArray[np.integer], classes: ClassTable) -> Pixels:
    """A picture (H, W, 3) of `ids` (H, W) with the legend below, enlarged if that could not be read otherwise."""
    factor = max(1, math.ceil(MIN_PANEL_WIDTH / 2 / picture.shape[1]))
    return under(enlarged(picture, factor), ids, classes)


def under(picture: Pixels, ids: NDArray[np.integer], classes: ClassTable) -> Pixels:
    """The picture with the legend of `ids` below."""
    key = legend(class_shares(ids, classes), classes, picture.shape[1])
    return np.concatenate([picture, key], axis=0)


def enlarged(image: Pixels, factor: int) -> Pixels:
    """Every pixel `factor` times in both directions."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def legend(shares: list[Share], classes: ClassTable, width: int) -> Pixels:
    """A white strip of `width` pixels that names the colours of `shares`, in as many columns as fit."""
    text_height = max(12, width // 60)
    font = ImageFont.load_default(text_height)
    labels = [f"{share.name}  {percent(share.share)}" for share in shares]
    margin, swatch = text_height // 2, text_height
    column = max((math.ceil(font.getlength(label)) for label in labels), default=0) + swatch + 3 * margin
    columns = max(1, (width - margin) // column)
    rows = math.ceil(len(labels) / columns)
    line = text_height + margin
    canvas = Image.new("RGB", (width, rows * line + margin if rows else margin), "white")
    draw = ImageDraw.Draw(canvas)
    for position, (share, label) in enumerate(zip(shares, labels, strict=True)):
        x = margin + (position // rows) * column  # down the columns, so that the largest stand together
        y = margin + (position % rows) * line
        draw.rectangle((x, y, x + swatch, y + swatch), fill=classes.palette[share.class_index], outline="black")
        draw.text((x + swatch + margin, y + text_height // 2), label, fill="black", font=font, anchor="lm")
    return np.asarray(canvas)


def percent(share: float) -> str:
    """A share as a percentage that tells little from nothing.

    >>> percent(0.123), percent(0.0004), percent(0.0)
    ('12.3 %', '<0.1 %', '0 %')
    """
    if share == 0:
        return "0 %"
    return f"{100 * share:.1f} %" if share >= 0.0005 else "<0.1 %"
