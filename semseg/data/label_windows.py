"""Stage 3, by parts: labels that are never decoded whole: TIFF and .npy files of class ids.

Labels of up to WHOLE_PIXELS are read whole, which is faster, and may be cached. Larger ones are read by window where
their format allows: a single band of class ids, of 8 or 16 bits in lossless TIFF, or of integers in .npy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from semseg.data.band_windows import FileWindows, NpyWindows, open_tiff_windows
from semseg.data.geometry import Size
from semseg.data.header_cache import read_header_only
from semseg.data.headers import HeaderError, read_raster_header
from semseg.data.images import MAX_PIXELS
from semseg.data.label_cache import LabelCache
from semseg.data.label_map import ColourIds, LabelMap
from semseg.data.labels import Label, check_id_range, read_class_indices
from semseg.data.raster_layout import NPY_START, TIFF_STARTS, RasterLayout, read_picture_layout
from semseg.data.rasters import list_missing_packages
from semseg.data.windows import STRIP_PIXELS, WHOLE_PIXELS, Window, row_strips
from semseg.errors import DataError

_ID_PHOTOMETRICS = (1, 3)  # tag 262: 0 is black, and indices of a palette


class IdWindows:
    """A file of ids whose windows are read on request.

    Args:
        file: of one band.
    """

    def __init__(self, path: str, file: FileWindows) -> None:
        self.path, self.file = path, file
        self.size: Size = file.layout.size

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def read_ids(self, window: Window) -> NDArray[np.integer]:
        """The ids of a window, (height, width), as `read_label` gives them.

        Raises:
            DataError: if the file is damaged there, or holds values that are not ids.
        """
        return check_id_range(self.file.read(window)[..., 0], self.path)


class LabelWindows(IdWindows):
    """A label whose windows are read on request.

    Args:
        file: of one band.
    """

    def __init__(self, path: str, file: FileWindows, label_map: LabelMap) -> None:
        super().__init__(path, file)
        self.label_map = label_map

    def read(self, window: Window) -> NDArray[np.int16]:
        """The class indices of a window, (height, width); -1 = not scored.

        Raises:
            DataError: as `read_ids`, and for an id that is neither a class nor ignored.
        """
        return self.label_map(self.read_ids(window), self.path)

    def read_strips(self, num_pixels: int = STRIP_PIXELS) -> Iterator[tuple[Window, NDArray[np.int16]]]:
        """The class indices of the whole label, from top to bottom in strips of rows of about `num_pixels`."""
        for window in row_strips(self.size, num_pixels):
            yield window, self.read(window)


def open_id_windows(path: str, colours: ColourIds | None = None, *, above: int = 0) -> IdWindows | None:
    """Open a mask of more than `above` pixels to read its ids by window; None where that is not possible.

    That is for PNG and other files without random access, in archives, with colours instead of ids, with several pages,
    and without the packages that read TIFF.

    Args:
        colours: decodes masks in colours.

    Raises:
        DataError: if the file is damaged.
    """
    file = None if colours is not None and colours.always else _open_file(path, above)
    return None if file is None else IdWindows(path, file)


def open_label_windows(path: str, label_map: LabelMap, *, above: int = 0) -> LabelWindows | None:
    """As `open_id_windows`, for the classes of a label."""
    ids = open_id_windows(path, label_map.colours, above=above)
    return None if ids is None else LabelWindows(path, ids.file, label_map)


def _open_file(path: str, above: int) -> FileWindows | None:
    try:
        file = Path(path).open("rb")  # noqa: SIM115 - closed below
    except OSError:
        return None  # in an archive, or missing, which is reported where it is read whole
    try:
        start = file.read(8)
        file.seek(0)
        if start.startswith(NPY_START):
            windows = NpyWindows(path)
            layout = windows.layout
            is_of_ids = layout.num_bands == 1 and (layout.dtype == "bool" or layout.dtype.startswith(("uint", "int")))
            return windows if is_of_ids and math.prod(layout.size) > above else None
        if not start.startswith(TIFF_STARTS) or list_missing_packages():
            return None
        header = read_raster_header(file)
        layout = read_picture_layout(file) if header is None else header.raster
        if layout is None or not _is_of_ids(layout) or math.prod(layout.size) <= above:
            return None
        return open_tiff_windows(path, layout, is_lossless=True, photometrics=_ID_PHOTOMETRICS)
    except HeaderError as error:
        raise DataError(f"{path}: {error}.") from None
    finally:
        file.close()


def _is_of_ids(layout: RasterLayout) -> bool:
    is_one_band = layout.num_bands == 1 and layout.num_pages == 1 and layout.orientation == 1
    return is_one_band and layout.dtype in ("uint8", "uint16")


@contextmanager
def open_label(
    path: str,
    label_map: LabelMap,
    *,
    max_pixels: int = MAX_PIXELS,
    cache: LabelCache | None = None,
    may_be_too_large: bool = False,
) -> Iterator[Label | LabelWindows]:
    """A label: read by window if it has more than WHOLE_PIXELS and its format allows, else whole.

    Args:
        may_be_too_large: whether its image has more than `max_pixels`; the message then says which labels may, too.

    Raises:
        DataError: as `read_class_indices`. Of what is read by window, ids are checked where they are read.
    """
    windows = open_label_windows(path, label_map, above=min(WHOLE_PIXELS, max_pixels))
    if windows is None:
        if may_be_too_large:
            check_whole_size(path, max_pixels)
        yield read_class_indices(path, label_map, max_pixels=max_pixels, cache=cache)
        return
    try:
        yield windows
    finally:
        windows.close()


def check_whole_size(path: str, max_pixels: int) -> None:
    """Refuse a mask that has to be read whole, and is larger than `max_pixels`.

    Raises:
        DataError: with the formats that are read by window.
    """
    size = read_header_only(path).upright
    if math.prod(size) > max_pixels:
        raise DataError(
            f"{path}: a mask of {size} pixels, more than data.max_pixels={max_pixels}, is read by window, which needs "
            "one band of ids in TIFF (8 or 16 bits, lossless) or .npy. Save it as one of them, or raise the limit."
        )
