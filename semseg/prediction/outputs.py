"""Stage 8: the files that a prediction becomes. Each is written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semseg.data.classes import ClassTable
from semseg.data.label_map import LabelMap
from semseg.reports.draw import Pixels, add_legend, colour_class_map, draw_overlay, draw_panel
from semseg.storage.atomic import replacing, temporary_beside, writing

MAX_INDEXED = 256  # colours of a PNG with a palette


class Prediction(Protocol):
    """What is written; `semseg.prediction.predictor.Result` is one."""

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


def write_outputs(found: Prediction, target: Path, outputs: Sequence[str]) -> list[Path]:
    """Write `<target>_<output>.<suffix>` for each of `outputs`.

    Raises:
        ValueError: for an unknown output, and for probabilities that are not there.
    """
    unknown = [output for output in outputs if output not in WRITERS]
    if unknown:
        raise ValueError(f"outputs {unknown} are not known; valid: {', '.join(WRITERS)}")
    return [WRITERS[output](found, target) for output in outputs]


def write_ids(found: Prediction, target: Path) -> Path:
    """The class ids of the data set's label files: one channel of 8 bits, or of 16 where an id is above 255."""
    raw = found.label_map.to_raw(found.ids)
    narrow = raw.astype(np.uint8) if raw.max(initial=0) < 256 else raw
    return write_png(Image.fromarray(narrow), target.with_name(f"{target.name}_ids.png"))


def write_color(found: Prediction, target: Path) -> Path:
    """Class indices (from 0) as an indexed-colour PNG, the palette in the file; RGB if there are more than 256."""
    if found.classes.num_classes > MAX_INDEXED:
        picture = Image.fromarray(colour_class_map(found.ids, found.classes))
    else:
        picture = Image.fromarray(found.ids.astype(np.uint8), "L")
        picture.putpalette(found.classes.colours().tobytes())
    return write_png(picture, target.with_name(f"{target.name}_color.png"))


def write_overlay(found: Prediction, target: Path) -> Path:
    """The picture under its class colours, with a legend below."""
    mixed = draw_overlay(found.image, found.ids, found.classes)
    pixels = add_legend(mixed, found.ids, found.classes)
    return write_png(Image.fromarray(pixels), target.with_name(f"{target.name}_overlay.png"))


def write_panel(found: Prediction, target: Path) -> Path:
    """image | overlay, with a legend below."""
    pixels = draw_panel(found.image, found.ids, found.classes)
    return write_png(Image.fromarray(pixels), target.with_name(f"{target.name}_panel.png"))


def write_probabilities(found: Prediction, target: Path) -> Path:
    """An .npz file with `probabilities` (K, H, W) float16, `names` (K) and `ids` (K); numpy.load reads it."""
    if found.probabilities is None:
        raise ValueError("there are no probabilities: ask for them with predict(..., probabilities=True)")
    path = target.with_name(f"{target.name}_probabilities.npz")
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        ids, names = np.array(found.label_map.class_ids, np.uint16), np.array(found.classes.names)
        arrays = {"probabilities": found.probabilities, "names": names, "ids": ids}
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
                for index in range(len(array)):  # plane by plane: the array may be larger than the memory
                    stream.write(array[index : index + 1].tobytes())
    return path


WRITERS: dict[str, Callable[[Prediction, Path], Path]] = {
    "ids": write_ids,
    "color": write_color,
    "overlay": write_overlay,
    "panel": write_panel,
    "probabilities": write_probabilities,
}


def write_png(picture: Image.Image, path: Path) -> Path:
    with replacing(path) as temporary:
        picture.save(temporary, "PNG")
    return path


def write_classes(path: Path, classes: ClassTable, label_map: LabelMap) -> None:
    """classes.json: what the numbers in the other files mean."""
    columns = zip(label_map.class_ids, classes.names, classes.palette, strict=True)
    rows = [
        {"id": raw_id, "index": index, "name": name, "color": list(colour)}
        for index, (raw_id, name, colour) in enumerate(columns)
    ]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"classes": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def array_on_disk(path: Path, shape: tuple[int, ...]) -> Iterator[NDArray[np.float16]]:
    """A float16 array in a temporary file beside `path`: 150 classes of a 12-megapixel photo are 3.6 GB."""
    temporary = temporary_beside(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.truncate(2 * math.prod(shape))
                if hasattr(os, "posix_fallocate"):  # writing to a mapped file on a full disk would kill the process
                    os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))
            array = np.memmap(temporary, np.float16, "r+", shape=shape)
        yield array
    finally:
        temporary.unlink(missing_ok=True)
