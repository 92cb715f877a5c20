"""Stage 8: pixel counts and small class maps of every image, in files that mode=compare reads. No torch."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from semseg.errors import DataError
from semseg.storage.atomic import atomic_write

COUNTS_FILE = "per_image.npz"
MAPS_FILE = "class_maps.zip"
MAP_EDGE = 320  # pixels; a map of ADE20K takes about 3 KB
MAX_MAPS = 5000  # images of a split whose maps are kept, the first ones
MAX_MAP_BYTES = 2**24  # of one map in a file; larger ones were not written by us
ENTRY_DATE = (1980, 1, 1, 0, 0, 0)  # the same maps make the same file
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, cv2.error, NotImplementedError)


class ClassMaps(NamedTuple):
    """Label and prediction of one image, shrunk to MAP_EDGE, as PNG: class index + 1, and 0 where nothing is scored."""

    label: bytes
    prediction: bytes


class ImageCounts(NamedTuple):
    """The pixel counts of every image of an evaluation."""

    files: tuple[str, ...]  # N, named as in per_image.csv
    counts: NDArray[np.int32]  # (N, 3, K), see bootstrap.class_counts


class ShownMaps(NamedTuple):
    """Label and prediction of one image, read from a file: (h, w) class indices, -1 where nothing is scored."""

    label: NDArray[np.int32]
    prediction: NDArray[np.int32]


def encode_maps(label: NDArray[np.integer], prediction: NDArray[np.integer]) -> ClassMaps:
    """Encode (h, w) class indices, -1 where nothing is scored."""
    return ClassMaps(_encode_map(label), _encode_map(prediction))


def _encode_map(ids: NDArray[np.integer]) -> bytes:
    values = ids.astype(np.int32) + 1
    is_encoded, data = cv2.imencode(".png", values.astype(np.uint8 if values.max(initial=0) < 256 else np.uint16))
    assert is_encoded, "an array of class indices is a picture"
    return data.tobytes()


def write_image_counts(path: Path, files: Sequence[str], counts: Sequence[NDArray[np.int32]]) -> None:
    """Write the counts of images, `counts` from `bootstrap.class_counts`."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, files=np.array(files, np.str_), counts=np.stack(counts))


def read_image_counts(path: Path, num_classes: int) -> ImageCounts | None:
    """Read the counts of all images; None if an earlier version wrote none.

    Raises:
        DataError: if the file is damaged or holds the counts of other classes.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            files, counts = tuple(map(str, content["files"])), content["counts"]
        if counts.dtype != np.int32 or counts.shape != (len(files), 3, num_classes) or (counts < 0).any():
            raise ValueError(f"the counts are {counts.dtype} of shape {counts.shape}")
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read as the pixel counts of images ({error}). Evaluate again.") from error
    return ImageCounts(files, counts)


def write_class_maps(path: Path, maps: Sequence[ClassMaps | None]) -> None:
    """Write <row>_label.png and <row>_prediction.png for each row of per_image.csv, the first being 0."""
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for row, pair in enumerate(maps):
            if pair is not None:
                for kind, data in pair._asdict().items():
                    archive.writestr(zipfile.ZipInfo(_entry_name(row, kind), ENTRY_DATE), data)


def _entry_name(row: int, kind: str) -> str:
    return f"{row:06d}_{kind}.png"


class ClassMapReader:
    """The class maps of one evaluation.

    Args:
        rows: the row of each image in per_image.csv, by its name there.
        num_classes: values above it are an error.
    """

    def __init__(self, path: Path, rows: dict[str, int], num_classes: int) -> None:
        self.path = path
        self.rows = rows
        self.num_classes = num_classes

    def read(self, file: str) -> ShownMaps | None:
        """Read the maps of an image; None if it has none.

        Raises:
            DataError: if the file is damaged.
        """
        if file not in self.rows or not self.path.is_file():
            return None
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = [_entry_name(self.rows[file], kind) for kind in ClassMaps._fields]
                if names[0] not in archive.namelist():
                    return None
                maps = ShownMaps(*(self._decode(archive, name) for name in names))
            if maps.label.shape != maps.prediction.shape:
                raise ValueError("label and prediction differ in size")
        except DAMAGED as error:
            raise DataError(f"{self.path}: the maps of {file} are damaged ({error}). Evaluate again.") from error
        return maps

    def _decode(self, archive: zipfile.ZipFile, name: str) -> NDArray[np.int32]:
        if archive.getinfo(name).file_size > MAX_MAP_BYTES:
            raise ValueError(f"{name} is too large")
        values = cv2.imdecode(np.frombuffer(archive.read(name), np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None or values.ndim != 2 or max(values.shape) > MAP_EDGE or values.max() > self.num_classes:
            raise ValueError(f"{name} is no class map")
        return values.astype(np.int32) - 1
