"""Stage 8: class ids as GeoTIFF, with the transform and CRS of the image, written row by row. Needs semseg[geo].

rasterio is opened in the process that writes, with a small cache: GDAL would otherwise keep a part of all memory.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from semseg.data.band_windows import BandWindows
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.data.label_map import LabelMap
from semseg.data.raster_layout import has_geo_tags
from semseg.data.windows import FinishedRows
from semseg.errors import ConfigError, DataError, install_command
from semseg.storage.atomic import atomic_write

TILE_SIDE = 512  # pixels; side of the tiles of a file, and rows that are written at once
GDAL_OPTIONS = {"GDAL_CACHEMAX": 64, "GDAL_NUM_THREADS": "1"}  # megabytes
MAX_PALETTE = 256  # colours of a GeoTIFF of 8 bits


class GeoReference(NamedTuple):
    """Where an image lies on the earth."""

    crs: Any  # rasterio's; None: unknown
    transform: Any  # rasterio's Affine
    gcps: tuple[Any, Any] = ((), None)  # ground control points and their CRS, in place of a transform


def has_rasterio() -> bool:
    """Whether the packages of semseg[geo] are installed."""
    return find_spec("rasterio") is not None


def is_georeferenced(path: Path) -> bool:
    """Whether a file is a TIFF with the tags of GeoTIFF."""
    try:
        with path.open("rb") as file:
            return has_geo_tags(file)
    except OSError:
        return False  # in an archive


def read_georeference(path: Path) -> GeoReference | None:
    """Transform, CRS and control points of a GeoTIFF; None if it has none of them.

    Raises:
        DataError: if GDAL cannot open it.
    """
    if not is_georeferenced(path):
        return None
    import rasterio.errors  # noqa: PLC0415 - an extra

    try:
        with warnings.catch_warnings(), rasterio.Env(**GDAL_OPTIONS), rasterio.open(path, driver="GTiff") as file:
            warnings.simplefilter("ignore")  # of files without a transform
            gcps, gcps_crs = file.gcps
            reference = GeoReference(file.crs, file.transform, (tuple(gcps), gcps_crs))
    except rasterio.errors.RasterioError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: its georeference cannot be read ({reason}). Save the file again.") from None
    is_placed = reference.crs is not None or not reference.transform.is_identity or gcps
    return reference if is_placed else None


class GeoTiffSink:
    """Writes the class ids of a prediction, as in the label files of the data set, whole or not at all.

        with GeoTiffSink(path, size, classes, label_map, reference=reference) as sink:
            predictor.predict_rows(reader, sink)

    Pixels of the image that hold no value get the file's nodata value.

    Args:
        reference: None: an image without a place on the earth.
        reader: of the image, if it has pixels without values.

    Raises:
        ConfigError: if rasterio is not installed.
    """

    takes_probabilities = False

    def __init__(
        self,
        path: Path,
        size: Size,
        classes: ClassTable,
        label_map: LabelMap,
        *,
        reference: GeoReference | None = None,
        reader: BandWindows | None = None,
    ) -> None:
        if not has_rasterio():
            raise ConfigError(f"{path}: writing TIFF needs rasterio: {install_command('geo')}")
        self.path, self.size, self.label_map, self.classes = path, size, label_map, classes
        self.reference, self.reader = reference, reader
        ids = [*label_map.class_ids, *label_map.ignored_ids]
        self.dtype = np.dtype(np.uint8 if max(ids) < MAX_PALETTE - 1 else np.uint16)
        self.nodata = int(np.iinfo(self.dtype).max)
        self._waiting: list[NDArray] = []  # rows that do not fill a row of blocks yet
        self._top = self._num_waiting = 0
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        import rasterio  # noqa: PLC0415 - an extra

        with ExitStack() as opened:
            temporary = opened.enter_context(atomic_write(self.path))
            opened.enter_context(rasterio.Env(**GDAL_OPTIONS))
            opened.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of files without a transform
            place = {} if self.reference is None else {"crs": self.reference.crs, "transform": self.reference.transform}
            self.file = opened.enter_context(
                rasterio.open(
                    temporary,
                    "w",
                    driver="GTiff",
                    height=self.size.height,
                    width=self.size.width,
                    count=1,
                    dtype=self.dtype.name,
                    nodata=self.nodata,
                    tiled=True,
                    blockxsize=TILE_SIDE,
                    blockysize=TILE_SIDE,
                    compress="deflate",
                    BIGTIFF="IF_SAFER",
                    **place,
                )
            )
            if self.reference is not None and self.reference.gcps[0]:
                self.file.gcps = (list(self.reference.gcps[0]), self.reference.gcps[1])
            self.file.update_tags(classes=", ".join(self.classes.names))
            if self.dtype == np.uint8:
                palette = zip(self.label_map.class_ids, self.classes.palette, strict=True)
                self.file.write_colormap(1, {raw: (*colour, 255) for raw, colour in palette})
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._write_waiting()
        self._opened.__exit__(*error)  # pyright: ignore[reportArgumentType]

    def write_rows(self, rows: FinishedRows) -> None:
        """Take the next rows of class indices."""
        raw = self.label_map.to_raw(rows.ids).astype(self.dtype)
        while len(raw):
            part, raw = raw[: TILE_SIDE - self._num_waiting], raw[TILE_SIDE - self._num_waiting :]
            self._waiting.append(part)
            self._num_waiting += len(part)
            if self._num_waiting == TILE_SIDE:
                self._write_waiting()

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        from rasterio.windows import Window  # noqa: PLC0415 - an extra

        rows = np.concatenate(self._waiting)
        for left in range(0, self.size.width, TILE_SIDE):
            columns = slice(left, min(left + TILE_SIDE, self.size.width))
            if self.reader is not None:
                valid = self.reader.read_valid(self._top, left, len(rows), columns.stop - left)
                if valid is not None:
                    rows[:, columns][~valid] = self.nodata
        self.file.write(rows, 1, window=Window(0, self._top, self.size.width, len(rows)))  # pyright: ignore[reportCallIssue]
        self._top += len(rows)
        self._waiting, self._num_waiting = [], 0


def write_geotiff(
    path: Path, ids: NDArray[np.int16], classes: ClassTable, label_map: LabelMap, reference: GeoReference
) -> None:
    """Write a whole class map (H, W) of class indices with the georeference of its image."""
    with GeoTiffSink(path, Size(*ids.shape), classes, label_map, reference=reference) as sink:
        sink.write_rows(FinishedRows(0, ids, np.zeros((0, 0), np.float32), None))
