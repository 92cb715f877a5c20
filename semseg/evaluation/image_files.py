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
MAP_EDGE = 320  # pixels; a map of ADE20K takes about 4 KB
MAX_MAPS = 5000  # images of a split whose maps are kept, the first ones
MAX_MAP_BYTES = 2**24  # of one map in a file; larger ones were not written by us
ENTRY_DATE = (1980, 1, 1, 0, 0, 0)  # the same maps make the same file
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


class ClassMaps(NamedTuple):
    """Label and prediction of one image, shrunk to MAP_EDGE, as PNG: class index + 1, and 0 where nothing is scored."""

    label: bytes
    prediction: bytes


class ImageCounts(NamedTuple):
    """The pixel counts of every image of an evaluation."""

    files: tuple[str, ...]  # N, named as in per_image.csv
    counts: NDArray[np.signedinteger]  # (N, 3, K), see bootstrap.class_counts


class DecodedMaps(NamedTuple):
    """Label and prediction of one image: (h, w) class indices, -1 where nothing is scored."""

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


def write_image_counts(path: Path, files: Sequence[str], counts: Sequence[NDArray[np.signedinteger]]) -> None:
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
        if (
            counts.dtype not in (np.int32, np.int64)
            or counts.shape != (len(files), 3, num_classes)
            or (counts < 0).any()
        ):
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


def read_class_maps(path: Path) -> dict[int, ClassMaps]:
    """Read the maps of all images that have some, by their row in per_image.csv; empty if there is no such file.

    Raises:
        DataError: if the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            rows = sorted(int(name.partition("_")[0]) for name in names if name.endswith("_label.png"))
            return {
                row: ClassMaps(*(_read_entry(archive, _entry_name(row, kind)) for kind in ClassMaps._fields))
                for row in rows
            }
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read as the class maps of images ({error}). Evaluate again.") from error


def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > MAX_MAP_BYTES:
        raise ValueError(f"{name} is too large")
    return archive.read(name)


def decode_maps(maps: ClassMaps, num_classes: int) -> DecodedMaps:
    """Decode the maps of one image.

    Raises:
        ValueError: if they are no maps of `num_classes` classes, or differ in size.
    """
    decoded = DecodedMaps(*(_decode_map(data, num_classes) for data in maps))
    if decoded.label.shape != decoded.prediction.shape:
        raise ValueError("label and prediction differ in size")
    return decoded


def _decode_map(data: bytes, num_classes: int) -> NDArray[np.int32]:
    try:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        values = None
    if values is None or values.ndim != 2 or max(values.shape) > MAP_EDGE or values.max() > num_classes:
        raise ValueError(f"is no map of {num_classes} classes")
    return values.astype(np.int32) - 1
