"""Stage 8: ids, colours and overlays as GeoTIFF, with the place of the image, written row by row. Needs semseg[geo].

rasterio is opened in the process that writes, with a small cache: GDAL would otherwise keep a part of all memory.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.data.header_cache import read_header_only
from semseg.data.headers import Header
from semseg.data.label_map import LabelMap
from semseg.data.raster_layout import has_geo_tags, read_picture_layout
from semseg.data.store import resolve_path
from semseg.data.windows import FinishedRows, RowSink, WindowReader
from semseg.errors import ConfigError, DataError, install_command, one_line
from semseg.reports.draw import blend_classes, find_borders
from semseg.storage.atomic import atomic_write, find_disk_error

TILE_SIDE = 512  # pixels; side of the tiles of a file, and rows that are written at once
GDAL_OPTIONS = {"GDAL_CACHEMAX": 64, "GDAL_NUM_THREADS": "1"}  # megabytes
MAX_PALETTE = 256  # colours of a GeoTIFF of 8 bits
OVERLAY_QUALITY = 90  # of overlays
WORLD_FILE_ENDS = ("w", ".wld")  # ends of the suffixes of world files


# Where an image has values: takes top, left, height and width of a window; gives (height, width), None for everywhere.
ReadValid = Callable[[int, int, int, int], NDArray[np.bool_] | None]


class GeoReference(NamedTuple):
    """Where an image lies on the earth."""

    crs: Any  # rasterio's; None: unknown
    transform: Any  # rasterio's Affine
    gcps: tuple[Any, Any] = ((), None)  # ground control points and their CRS, in place of a transform

    def turn_upright(self, header: Header) -> GeoReference:
        """The same place for the pixels that are turned by the orientation tag of their file, which GDAL ignores."""
        from rasterio.control import GroundControlPoint  # noqa: PLC0415 - an extra
        from rasterio.transform import Affine  # noqa: PLC0415

        to_stored = Affine(*_TO_STORED[header.orientation](header.stored.width, header.stored.height))
        gcps, crs = self.gcps
        turned = [
            GroundControlPoint(row, column, gcp.x, gcp.y, gcp.z, gcp.id, gcp.info)
            for gcp in gcps
            for column, row in [~to_stored * (gcp.col, gcp.row)]
        ]
        return GeoReference(self.crs, self.transform * to_stored, (tuple(turned), crs))


# Coefficients of (x, y, 1) upright -> stored, by the orientation of EXIF and TIFF and the stored width and height.
_TO_STORED: Mapping[int, Callable[[int, int], tuple[int, int, int, int, int, int]]] = {
    1: lambda width, height: (1, 0, 0, 0, 1, 0),
    2: lambda width, height: (-1, 0, width, 0, 1, 0),
    3: lambda width, height: (-1, 0, width, 0, -1, height),
    4: lambda width, height: (1, 0, 0, 0, -1, height),
    5: lambda width, height: (0, 1, 0, 1, 0, 0),
    6: lambda width, height: (0, 1, 0, -1, 0, height),
    7: lambda width, height: (0, -1, width, -1, 0, height),
    8: lambda width, height: (0, -1, width, 1, 0, 0),
}


def has_rasterio() -> bool:
    """Whether the packages of semseg[geo] are installed."""
    return find_spec("rasterio") is not None


def is_georeferenced(path: Path) -> bool:
    """Whether a file is a TIFF with the tags of GeoTIFF, or has a world file: a.tfw, a.jgw, a.pgw, ... beside a.tif."""
    return _has_geo_tags(path) or find_world_file(path) is not None


def find_world_file(path: Path) -> Path | None:
    """The text file with the transform of an image that lies beside it, by the names that GDAL knows."""
    kind = path.suffix[1:].lower()
    if not kind or not path.is_file():
        return None
    suffixes = (f".{kind[0]}{kind[-1]}w", f".{kind}w", ".wld")
    names = (path.with_suffix(form) for suffix in suffixes for form in (suffix, suffix.upper()))
    return next((name for name in names if name.is_file()), None)


def read_world_file(path: Path) -> Any:
    """The transform in a world file, rasterio's Affine.

    Raises:
        DataError: if the file is not six numbers.
    """
    from affine import loadsw  # noqa: PLC0415 - of an extra

    try:
        return loadsw(path.read_text(encoding="ascii"))
    except ValueError:
        raise DataError(f"{path}: a world file has six numbers, one a line. Correct or remove it.") from None


def _has_geo_tags(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return has_geo_tags(file)
    except OSError:
        return False  # in an archive


def read_georeference(path: Path) -> GeoReference | None:
    """Transform, CRS and control points of an image that is turned upright; None if it has none of them.

    Raises:
        DataError: if GDAL cannot open it, or its world file is not one.
    """
    if _has_geo_tags(path):
        with explain_damage(path, "georeference"), open_raster(path) as file:
            gcps, gcps_crs = file.gcps
            reference = GeoReference(file.crs, file.transform, (tuple(gcps), gcps_crs))
    elif (world_file := find_world_file(path)) is not None:
        reference = GeoReference(None, read_world_file(world_file))
    else:
        return None
    if reference.crs is None and reference.transform.is_identity and not reference.gcps[0]:
        return None
    return reference.turn_upright(read_header_only(str(path)))


def may_have_mask(path: Path) -> bool:
    """Whether GDAL may know of pixels without values in an image that is read as a picture.

    False for one that is turned upright, which GDAL does not do.
    """
    if not path.is_file() or not has_rasterio() or not _has_geo_tags(path):
        return False
    with path.open("rb") as file:
        layout = read_picture_layout(file)
    return layout is not None and layout.orientation == 1


def read_whole_mask(picture: object) -> NDArray[np.bool_] | None:
    """(H, W) where an image that is read as a picture has values; None: everywhere, and for what is not a path.

    Raises:
        DataError: if GDAL cannot read the mask.
    """
    if not isinstance(picture, str | os.PathLike) or not may_have_mask(path := resolve_path(os.fspath(picture))):
        return None
    with open_mask(path) as read_valid, open_raster(path) as file:
        return None if read_valid is None else read_valid(0, 0, file.height, file.width)


@contextmanager
def open_mask(path: Path) -> Iterator[ReadValid | None]:
    """Where a GeoTIFF has values by its nodata, alpha, or mask; None: everywhere.

    It is for networks of colours, whose images are read as pictures, without these.

    Raises:
        DataError: if GDAL cannot open the file; so does the function, if it is damaged in the window.
    """
    from rasterio.enums import MaskFlags  # noqa: PLC0415 - an extra
    from rasterio.windows import Window  # noqa: PLC0415 - an extra

    def read_valid(top: int, left: int, height: int, width: int) -> NDArray[np.bool_]:
        window = Window(left, top, width, height)  # pyright: ignore[reportCallIssue]
        with explain_damage(path, "mask"):
            return file.dataset_mask(window=window) != 0

    with ExitStack() as opened:
        with explain_damage(path, "mask"):
            file = opened.enter_context(open_raster(path))
        is_whole = all(MaskFlags.all_valid in flags for flags in file.mask_flag_enums)
        yield None if is_whole else read_valid


@contextmanager
def open_raster(path: Path) -> Iterator[Any]:
    """A GeoTIFF that is opened by rasterio, with a small cache.

    Raises:
        rasterio.errors.RasterioError: if it is damaged.
    """
    import rasterio  # noqa: PLC0415 - an extra

    with rasterio.Env(**GDAL_OPTIONS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of files without a transform
        with rasterio.open(path, driver="GTiff") as file:
            yield file


@contextmanager
def explain_damage(path: Path, part: str) -> Iterator[None]:
    """Within this context, errors of rasterio become a DataError that names the file.

    Args:
        part: what is read from it.
    """
    from rasterio.errors import RasterioError  # noqa: PLC0415 - an extra

    try:
        yield
    except RasterioError as error:
        reason = one_line(error)
        raise DataError(f"{path}: its {part} cannot be read ({reason}). Save the file again.") from None


@contextmanager
def checking_whole_file(path: Path) -> Iterator[None]:
    """A context in which GDAL writes a file: it must be whole in the end.

    GDAL writes what it has kept when it closes the file. If the disk is full by then, it says nothing.

    Raises:
        OSError: if the file cannot be written, or a part of it is missing.
    """
    import rasterio.errors  # noqa: PLC0415 - an extra

    try:
        yield
        is_whole = has_all_blocks(path)
    except rasterio.errors.RasterioIOError as error:
        raise find_disk_error(error, path.parent) or OSError(errno.EIO, os.strerror(errno.EIO)) from error
    if not is_whole:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def has_all_blocks(path: Path) -> bool:
    """Whether all tiles of a TIFF lie inside the file.

    Raises:
        rasterio.errors.RasterioIOError: if its directory is damaged.
    """
    num_bytes = path.stat().st_size
    with open_raster(path) as file:
        rows, columns = (-(-length // TILE_SIDE) for length in file.shape)
        for row in range(rows):
            for column in range(columns):
                offset, length = (
                    file.get_tag_item(f"BLOCK_{what}_{column}_{row}", "TIFF", bidx=1) for what in ("OFFSET", "SIZE")
                )
                if offset is None or length is None or int(offset) + int(length) > num_bytes:
                    return False
    return True


class RasterSink:
    """Writes a picture of a prediction as tiled TIFF, row of blocks by row of blocks, whole or not at all.

    Args:
        reference: None: an image without a place on the earth.

    Raises:
        ConfigError: if rasterio is not installed.
    """

    takes_probabilities = False
    num_bands = 1
    dtype = np.dtype(np.uint8)
    nodata: int | None = None
    compression: Mapping[str, Any] = {"compress": "deflate"}

    def __init__(self, path: Path, size: Size, *, reference: GeoReference | None = None) -> None:
        if not has_rasterio():
            raise ConfigError(f"{path}: writing TIFF needs rasterio: {install_command('geo')}")
        self.path, self.size, self.reference = path, size, reference
        self._waiting: list[NDArray] = []  # rows that do not fill a row of blocks yet
        self._top = self._num_waiting = 0
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        import rasterio  # noqa: PLC0415 - an extra

        with ExitStack() as opened:
            temporary = opened.enter_context(atomic_write(self.path))
            opened.enter_context(checking_whole_file(temporary))
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
                    count=self.num_bands,
                    dtype=self.dtype.name,
                    nodata=self.nodata,
                    tiled=True,
                    blockxsize=TILE_SIDE,
                    blockysize=TILE_SIDE,
                    BIGTIFF="IF_SAFER",
                    **self.compression,
                    **place,
                )
            )
            if self.reference is not None and self.reference.gcps[0]:
                self.file.gcps = (list(self.reference.gcps[0]), self.reference.gcps[1])
            self.describe()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._opened.__exit__(*error)  # pyright: ignore[reportArgumentType]
            return
        with self._opened:  # closed even if the last rows cannot be written
            self.finish()
            self._write_waiting()

    def describe(self) -> None:
        """Write what the file says about its numbers."""

    def finish(self) -> None:
        """Take the end of the rows."""

    def write_rows(self, rows: FinishedRows) -> None:
        """Take the next rows of a prediction."""
        raise NotImplementedError

    def write_pixels(self, pixels: NDArray) -> None:
        """Write the next rows of the picture, (n, width, bands)."""
        while len(pixels):
            part, pixels = pixels[: TILE_SIDE - self._num_waiting], pixels[TILE_SIDE - self._num_waiting :]
            self._waiting.append(part)
            self._num_waiting += len(part)
            if self._num_waiting == TILE_SIDE:
                self._write_waiting()

    def mask_pixels(self, pixels: NDArray, top: int) -> None:
        """Change rows of the picture that are about to be written, in place."""

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        from rasterio.windows import Window  # noqa: PLC0415 - an extra

        pixels = np.concatenate(self._waiting)
        self.mask_pixels(pixels, self._top)
        place = Window(0, self._top, self.size.width, len(pixels))  # pyright: ignore[reportCallIssue]
        self.file.write(pixels.transpose(2, 0, 1), window=place)
        self._top += len(pixels)
        self._waiting, self._num_waiting = [], 0


class GeoTiffSink(RasterSink):
    """Writes the class ids of a prediction, as in the label files of the data set.

        with GeoTiffSink(path, size, classes, label_map, reference=reference) as sink:
            predictor.predict_rows(reader, sink)

    Pixels of the image that hold no value get the file's nodata value.

    Args:
        label_map: the ids; one that begins with 0 writes class indices.
        read_valid: where the image has values; None: everywhere.

    Raises:
        ConfigError: if rasterio is not installed.
    """

    def __init__(
        self,
        path: Path,
        size: Size,
        classes: ClassTable,
        label_map: LabelMap,
        *,
        reference: GeoReference | None = None,
        read_valid: ReadValid | None = None,
    ) -> None:
        super().__init__(path, size, reference=reference)
        self.label_map, self.classes, self.read_valid = label_map, classes, read_valid
        # The last number is nodata. An ignored id may be the same: neither is a class.
        is_narrow = max(label_map.class_ids) < MAX_PALETTE - 1 and max(label_map.ignored_ids, default=0) < MAX_PALETTE
        self.dtype = np.dtype(np.uint8 if is_narrow else np.uint16)
        self.nodata = int(np.iinfo(self.dtype).max)

    def describe(self) -> None:
        """Write the names and colours of the classes."""
        self.file.update_tags(classes=", ".join(self.classes.names))
        if self.dtype == np.uint8:
            palette = zip(self.label_map.class_ids, self.classes.palette, strict=True)
            self.file.write_colormap(1, {raw: (*colour, 255) for raw, colour in palette})

    def write_rows(self, rows: FinishedRows) -> None:
        """Take the next rows of class indices."""
        self.write_pixels(self.label_map.to_raw(rows.ids).astype(self.dtype)[..., None])

    def mask_pixels(self, pixels: NDArray, top: int) -> None:
        """Put nodata where the image has no value."""
        if self.read_valid is None:
            return
        for left in range(0, self.size.width, TILE_SIDE):
            columns = slice(left, min(left + TILE_SIDE, self.size.width))
            valid = self.read_valid(top, left, len(pixels), columns.stop - left)
            if valid is not None:
                pixels[:, columns][~valid] = self.nodata


class OverlaySink(RasterSink):
    """Writes the image blended with its class colours, with dark lines between classes.

    Args:
        reader: of the image.
        draw: rows of its pixels (n, width, bands) as (n, width, 3) RGB, the same for all rows.
    """

    num_bands = 3
    compression: Mapping[str, Any] = {"compress": "jpeg", "photometric": "ycbcr", "jpeg_quality": OVERLAY_QUALITY}

    def __init__(
        self,
        path: Path,
        size: Size,
        classes: ClassTable,
        reader: WindowReader,
        draw: Callable[[NDArray], NDArray[np.uint8]],
        *,
        reference: GeoReference | None = None,
    ) -> None:
        super().__init__(path, size, reference=reference)
        self.classes, self.reader, self.draw = classes, reader, draw
        self._last: NDArray[np.int16] | None = None  # the row whose lower neighbour is not known yet
        self._drawn = 0

    def write_rows(self, rows: FinishedRows) -> None:
        """Take the next rows of class indices; the last one waits for its lower neighbour."""
        ids = rows.ids if self._last is None else np.concatenate([self._last, rows.ids])
        self._last = ids[-1:].copy()
        if len(ids) > 1:
            self._draw(ids, len(ids) - 1)

    def finish(self) -> None:
        """Draw the last row."""
        if self._last is not None:
            self._draw(self._last, 1)

    def _draw(self, ids: NDArray[np.int16], count: int) -> None:
        """Draw the first `count` rows of `ids`."""
        is_border = find_borders(ids)[:count]
        drawn = np.empty((count, self.size.width, 3), np.uint8)
        for left in range(0, self.size.width, TILE_SIDE):
            columns = slice(left, min(left + TILE_SIDE, self.size.width))
            image = self.draw(self.reader.read(self._drawn, left, count, columns.stop - left))
            drawn[:, columns] = blend_classes(image, ids[:count, columns], is_border[:, columns], self.classes)
        self._drawn += count
        self.write_pixels(drawn)


class SeveralSinks:
    """Hands the rows of a prediction to several sinks."""

    def __init__(self, sinks: Sequence[RowSink]) -> None:
        self.sinks = sinks

    @property
    def takes_probabilities(self) -> bool:
        """Whether one of them takes them."""
        return any(sink.takes_probabilities for sink in self.sinks)

    def write_rows(self, rows: FinishedRows) -> None:
        """Hand on the next rows."""
        for sink in self.sinks:
            sink.write_rows(rows)


def write_geotiff(
    path: Path,
    ids: NDArray[np.int16],
    classes: ClassTable,
    label_map: LabelMap,
    reference: GeoReference,
    *,
    is_valid: NDArray[np.bool_] | None = None,
) -> None:
    """Write a whole class map (H, W) of class indices with the georeference of its image.

    Args:
        is_valid: (H, W) where the image has values; None: everywhere.
    """

    def read_valid(top: int, left: int, height: int, width: int) -> NDArray[np.bool_] | None:
        return None if is_valid is None else is_valid[top : top + height, left : left + width]

    with GeoTiffSink(path, Size(*ids.shape), classes, label_map, reference=reference, read_valid=read_valid) as sink:
        sink.write_rows(FinishedRows(0, ids, np.zeros((0, 0), np.float32), None))
