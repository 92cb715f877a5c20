"""Stage 8: write the files of a prediction. Each is written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semseg.data.classes import ClassTable
from semseg.data.label_map import LabelMap
from semseg.errors import ArgumentError, suggest
from semseg.prediction.annotations import write_annotations
from semseg.reports.draw import UNSCORED_COLOUR, Pixels, add_legend, colour_class_map, draw_overlay, draw_panel
from semseg.storage.atomic import atomic_write, make_folder, name_file_in_errors, temporary_path

MAX_PALETTE_SIZE = 256  # colours of a PNG
CLASSES_FILE = "classes.json"


class WritablePrediction(Protocol):
    """The content of the files; `semseg.prediction.predictor.PredictionResult` satisfies it."""

    @property
    def image(self) -> Pixels: ...
    @property
    def ids(self) -> NDArray[np.int16]: ...
    @property
    def classes(self) -> ClassTable: ...
    @property
    def label_map(self) -> LabelMap: ...
    @property
    def probabilities(self) -> NDArray[np.floating] | None: ...


def write_outputs(prediction: WritablePrediction, target: Path, outputs: Sequence[str]) -> list[Path]:
    """Write `<target>_<output>.<suffix>` for each of `outputs`.

    Raises:
        ArgumentError: for an unknown output, and if the prediction has no probabilities. Nothing is written then.
    """
    for output in outputs:
        if output not in OUTPUT_WRITERS:
            hint = suggest(str(output), OUTPUT_WRITERS)
            raise ArgumentError(f"outputs: {output!r} is not known.{hint} Valid: {', '.join(OUTPUT_WRITERS)}.")
    if "probabilities" in outputs and prediction.probabilities is None:
        raise ArgumentError("there are no probabilities: request them with predict(..., probabilities=True).")
    return [OUTPUT_WRITERS[output](prediction, target) for output in outputs]


def write_ids(prediction: WritablePrediction, target: Path) -> Path:
    """Write the class ids of the data set's label files: one channel of 8 bits, or of 16 if an id is above 255."""
    raw = prediction.label_map.to_raw(prediction.ids)
    narrow = raw.astype(np.uint8) if raw.max(initial=0) < 256 else raw
    return save_png(Image.fromarray(narrow), target.with_name(f"{target.name}_ids.png"))


def write_color(prediction: WritablePrediction, target: Path) -> Path:
    """Write class indices (from 0) as a PNG with a palette, or as RGB if there are more than 256 classes.

    Pixels that are not scored have the index behind the last class, and are black.
    """
    num_classes = prediction.classes.num_classes
    is_unscored = prediction.ids < 0
    if num_classes + bool(is_unscored.any()) > MAX_PALETTE_SIZE:
        picture = Image.fromarray(colour_class_map(prediction.ids, prediction.classes))
    else:
        picture = Image.fromarray(np.where(is_unscored, num_classes, prediction.ids).astype(np.uint8), "L")
        palette = prediction.classes.colours().tobytes() + bytes(UNSCORED_COLOUR)
        picture.putpalette(palette[: 3 * MAX_PALETTE_SIZE])  # 256 classes leave no room for unscored pixels
    return save_png(picture, target.with_name(f"{target.name}_color.png"))


def write_overlay(prediction: WritablePrediction, target: Path) -> Path:
    """Write the picture blended with its class colours, with a legend below."""
    blended = draw_overlay(prediction.image, prediction.ids, prediction.classes)
    pixels = add_legend(blended, prediction.ids, prediction.classes)
    return save_png(Image.fromarray(pixels), target.with_name(f"{target.name}_overlay.png"))


def write_panel(prediction: WritablePrediction, target: Path) -> Path:
    """Write image | overlay, with a legend below."""
    pixels = draw_panel(prediction.image, prediction.ids, prediction.classes)
    return save_png(Image.fromarray(pixels), target.with_name(f"{target.name}_panel.png"))


def write_probabilities(prediction: WritablePrediction, target: Path) -> Path:
    """Write `probabilities` (K, H, W) float16, `names` (K) and `ids` (K) for numpy.load."""
    assert prediction.probabilities is not None, "write_outputs checks it"
    path = target.with_name(f"{target.name}_probabilities.npz")
    with (
        atomic_write(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
    ):
        ids, names = np.array(prediction.label_map.class_ids, np.uint16), np.array(prediction.classes.names)
        arrays = {"probabilities": prediction.probabilities, "names": names, "ids": ids}
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
                for index in range(len(array)):  # one class at a time: the array may be larger than the memory
                    stream.write(array[index : index + 1].tobytes())
    return path


def write_coco(prediction: WritablePrediction, target: Path) -> Path:
    """Write the classes as COCO JSON, for an image of the name of `target`."""
    return _write_annotations("coco", prediction, target)


def write_label_studio(prediction: WritablePrediction, target: Path) -> Path:
    """Write the classes as a prediction of Label Studio, for an image of the name of `target`."""
    return _write_annotations("label_studio", prediction, target)


def _write_annotations(output: str, prediction: WritablePrediction, target: Path) -> Path:
    path, classes = target.with_name(f"{target.name}_{output}.json"), prediction.classes
    return write_annotations(
        output, path, prediction.ids, name=target.name, classes=classes, label_map=prediction.label_map
    )


OUTPUT_WRITERS: dict[str, Callable[[WritablePrediction, Path], Path]] = {
    "ids": write_ids,
    "color": write_color,
    "overlay": write_overlay,
    "panel": write_panel,
    "probabilities": write_probabilities,
    "coco": write_coco,
    "label_studio": write_label_studio,
}


def save_png(picture: Image.Image, path: Path) -> Path:
    with atomic_write(path) as temporary:
        picture.save(temporary, "PNG")
    return path


def write_classes(path: Path, classes: ClassTable, label_map: LabelMap) -> None:
    """Write classes.json: the id, index, name and colour of each class."""
    rows = list_class_rows(classes, label_map)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"classes": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def list_class_rows(classes: ClassTable, label_map: LabelMap) -> list[dict[str, Any]]:
    """The id, index, name and colour of each class, as JSON has them."""
    columns = zip(label_map.class_ids, classes.names, classes.palette, strict=True)
    return [
        {"id": raw_id, "index": index, "name": name, "color": list(colour)}
        for index, (raw_id, name, colour) in enumerate(columns)
    ]


@contextmanager
def array_on_disk(path: Path, shape: tuple[int, ...]) -> Iterator[NDArray[np.float16]]:
    """Map a float16 array to a temporary file beside `path`: 150 classes of a 12-megapixel photo are 3.6 GB."""
    temporary = temporary_path(path)
    try:
        with name_file_in_errors(path):
            make_folder(path.parent)
            with temporary.open("wb") as file:
                file.truncate(2 * math.prod(shape))
                if hasattr(os, "posix_fallocate"):  # writing to a mapped file on a full disk would kill the process
                    os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))
            array = np.memmap(temporary, np.float16, "r+", shape=shape)
        yield array
    finally:
        temporary.unlink(missing_ok=True)
