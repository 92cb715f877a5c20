"""Find the images that networks predict most differently, and draw their predictions side by side. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.data.classes import ClassTable
from semseg.data.store import is_file
from semseg.errors import DataError
from semseg.evaluation.image_files import MAPS_FILE, ClassMaps, DecodedMaps, decode_maps, read_class_maps
from semseg.reports.compared_runs import ComparedRun
from semseg.reports.draw import Pixels, colour_class_map
from semseg.reports.photographs import find_reading, read_photograph
from semseg.reports.pictures import HATCH_LEVELS, STRIPE_WIDTH, encode_jpeg_uri, encode_png_uri

BASE_COLOUR, OTHER_COLOUR = np.array((31, 111, 235)), np.array((217, 115, 13))  # of the runs' curves in page.css
PAPER = 235  # grey level over which the photograph is drawn where both are right
NO_PHOTOGRAPH = 128  # grey level in place of the photograph


class DifferingImage(NamedTuple):
    """An image with the maps of all runs, which have the same size."""

    file: str
    share: float  # of the scored pixels that a run predicts otherwise than the base, the largest of all runs, 0..1
    label: NDArray[np.int32]  # (h, w) class indices, -1 where nothing is scored
    predictions: tuple[NDArray[np.int32], ...]  # (h, w) of each run


class ComparedPicture(NamedTuple):
    """A picture of the page."""

    name: str
    uri: str  # data: URI
    is_map: bool  # pixels are classes, so that they are not blended when the page scales them


class MapTable:
    """The class maps of one evaluation, by the names of the images.

    Raises:
        DataError: if their file is damaged.
    """

    def __init__(self, run: ComparedRun) -> None:
        self.path = run.folder / MAPS_FILE
        self.num_classes = len(run.metrics["classes"])
        files = run.counts.files if run.counts is not None else ()
        rows = read_class_maps(self.path)
        self.maps: Mapping[str, ClassMaps] = {file: rows[row] for row, file in enumerate(files) if row in rows}

    def decode(self, file: str) -> DecodedMaps:
        """Decode the maps of an image that is in `maps`.

        Raises:
            DataError: if they are damaged.
        """
        try:
            return decode_maps(self.maps[file], self.num_classes)
        except ValueError as error:
            raise DataError(f"{self.path}: the maps of {file} are damaged ({error}). Evaluate again.") from error


def find_differing_images(runs: Sequence[ComparedRun], max_images: int) -> list[DifferingImage] | None:
    """Find the images with the largest shares of pixels that the runs predict differently; None without class maps.

    Raises:
        DataError: if a file of maps is damaged.
    """
    tables = [MapTable(run) for run in runs]
    if not all(table.maps for table in tables):
        return None
    common = [file for file in tables[0].maps if all(file in table.maps for table in tables)]
    shares = {file: image.share for file in common if (image := load_maps(tables, file)) is not None and image.share}
    largest = sorted(shares, key=lambda file: -shares[file])[:max_images]
    return [image for file in largest if (image := load_maps(tables, file)) is not None]


def load_maps(tables: Sequence[MapTable], file: str) -> DifferingImage | None:
    """Load the maps of an image from all runs; None if they differ in size, or no pixel is scored."""
    maps = [table.decode(file) for table in tables]
    label, predictions = maps[0].label, tuple(evaluated.prediction for evaluated in maps)
    is_scored = label >= 0
    if any(prediction.shape != label.shape for prediction in predictions) or not is_scored.any():
        return None
    share = max(float((other != predictions[0])[is_scored].mean()) for other in predictions[1:])
    return DifferingImage(file, share, label, predictions)


# ---- pictures


def draw_pictures(
    image: DifferingImage, names: Sequence[str], classes: ClassTable, photograph: Pixels | None
) -> list[ComparedPicture]:
    """Draw photograph, label and all predictions; for two runs also which of them is right."""
    pictures = [] if photograph is None else [ComparedPicture("photograph", encode_jpeg_uri(photograph), is_map=False)]
    pictures.append(ComparedPicture("label", encode_png_uri(colour_class_map(image.label, classes)), is_map=True))
    for name, prediction in zip(names, image.predictions, strict=True):
        pictures.append(ComparedPicture(name, encode_png_uri(colour_class_map(prediction, classes)), is_map=True))
    if len(names) == 2:
        pictures.append(ComparedPicture("who is right", encode_jpeg_uri(draw_winners(image, photograph)), is_map=False))
    return pictures


def draw_winners(image: DifferingImage, photograph: Pixels | None) -> Pixels:
    """Draw where only the first of two runs is right, where only the second is, and where both are wrong (dark).

    Args:
        photograph: (h, w, 3) uint8 RGB, drawn in pale grey where both are right.
    """
    label, (base, other) = image.label, image.predictions
    grey = np.full((*label.shape, 1), float(NO_PHOTOGRAPH)) if photograph is None else photograph.mean(2, keepdims=True)
    pixels = np.repeat(0.35 * grey + 0.65 * PAPER, 3, axis=2)
    is_right, is_other_right = label == base, label == other
    pixels[is_right & ~is_other_right] = BASE_COLOUR
    pixels[~is_right & is_other_right] = OTHER_COLOUR
    is_both_wrong = ~is_right & ~is_other_right
    pixels[is_both_wrong] = np.repeat(0.3 * grey, 3, axis=2)[is_both_wrong]
    rows, columns = np.indices(label.shape)
    stripes = np.where((rows + columns) // STRIPE_WIDTH % 2, *HATCH_LEVELS)[..., None]
    return np.where((label < 0)[..., None], stripes, pixels).round().astype(np.uint8)


def load_photograph(run: ComparedRun, file: str, shape: tuple[int, int]) -> Pixels | None:
    """Load an image of the data set at `shape` (height, width), as the evaluation has read it.

    None if it is not there any more, or cannot be read.
    """
    root, data = run.metrics.get("root"), find_reading(run.metrics)
    path = Path(root, file) if isinstance(root, str) else None
    try:
        return None if path is None or data is None or not is_file(path) else read_photograph(path, data, shape)
    except (DataError, OSError):
        return None
