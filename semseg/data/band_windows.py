"""Stage 3, by parts: the readers of images that are never decoded whole: tiled and stripped TIFF, and .npy.

A file is opened in the process that reads it. What was decoded last is kept up to CACHE_BYTES: windows overlap.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from semseg.data.band_images import (
    BandImage,
    FileBands,
    PixelPlace,
    check_header,
    check_same_pixels,
    find_band_file,
    join_bands,
    select_used,
    split_alpha,
)
from semseg.data.bands import BandOptions
from semseg.data.geometry import Size
from semseg.data.headers import Header, HeaderError, read_raster_header
from semseg.data.raster_layout import NPY_START, TIFF_STARTS, RasterLayout, read_npy_header, read_picture_layout
from semseg.data.rasters import as_bands, broken_tiff_error, check_layout, list_missing_packages, require_tifffile
from semseg.data.windows import Window, check_inside
from semseg.errors import DataError

CACHE_BYTES = 2**26  # of the decoded parts of one file that are kept
MAX_PART_BYTES = 2**27  # a file whose strips or tiles are larger is decoded whole
_LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 50000)  # compressions (tag 259): none, LZW, deflate, packbits, LZMA, zstd


class FileWindows(Protocol):
    """The numbers of one file by window."""

    layout: RasterLayout

    def read(self, window: Window) -> NDArray:
        """(height, width, bands), with alpha, in the byte order of the machine; not to be changed.

        Raises:
            DataError: if the file is damaged there.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class BandWindows:
    """An image with named bands, or a plain RGB one, that is read by window; see `open_windows`.

    Args:
        files: one for each of `options.files`.
        options: None: the file holds 8-bit RGB.
    """

    def __init__(self, path: str | Path, files: Sequence[FileWindows], options: BandOptions | None) -> None:
        self.path, self.files, self.options = path, list(files), options
        layout = self.files[0].layout
        self.layout = layout
        self.height, self.width = layout.size
        self.num_bands = 3 if options is None else len(options.names)
        self.dtype = np.dtype(layout.dtype)

    @property
    def may_lack_values(self) -> bool:
        """Whether pixels may have no value: NaN, nodata, or alpha."""
        layouts = [file.layout for file in self.files] if self.options is not None else []
        return any(
            layout.nodata is not None or layout.has_alpha or np.dtype(layout.dtype).kind == "f" for layout in layouts
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()

    def read(self, top: int, left: int, height: int, width: int) -> NDArray:
        """The pixels of a window, (height, width, num_bands); those without a value are filled.

        Raises:
            DataError: if a file is damaged there.
        """
        return self.read_image(top, left, height, width).pixels

    def read_valid(self, top: int, left: int, height: int, width: int) -> NDArray[np.bool_] | None:
        """(height, width) whether any band has a value; None: all have one everywhere."""
        return self.read_image(top, left, height, width).is_valid

    def read_image(self, top: int, left: int, height: int, width: int) -> BandImage:
        """Pixels and validity of a window."""
        window = Window(top, left, height, width)
        check_inside(window, Size(self.height, self.width))
        header = Header("", Size(height, width))
        if self.options is None:
            pixels = self.files[0].read(window)
            return BandImage(np.ascontiguousarray(np.broadcast_to(pixels, (height, width, 3))), None, header)
        reads = []
        for file, names in zip(self.files, self.options.files, strict=True):
            layout, pixels = file.layout, file.read(window)
            alpha = pixels[..., -1] if layout.has_alpha else None
            given = FileBands(pixels[..., :-1] if layout.has_alpha else pixels, alpha, layout.nodata, header)
            reads.append(select_used(split_alpha(self.path, given, names), names))
        return join_bands(reads, self.options, header)


def open_windows(path: str | Path, bands: BandOptions | None = None) -> BandWindows | None:
    """Open an image to read it by window, whatever its number of pixels; None for formats without random access.

    These are: JPEG, PNG and the like, files in archives, TIFF that is compressed as one piece or rotated by a tag, and,
    without `bands`, everything but lossless TIFF of 8 bits in grey or RGB.

    Args:
        bands: of the image; None: it is 8-bit RGB.

    Raises:
        DataError: if a file is missing, damaged, or does not hold the bands.
    """
    if bands is None:
        file = open_file_windows(path, is_plain=True)
        return None if file is None else BandWindows(path, [file], None)
    with ExitStack() as opened:
        files: list[FileWindows] = []
        for band_file in bands.files:
            member = path if band_file is bands.files[0] else find_band_file(path, bands, band_file)
            file = open_file_windows(member)
            if file is None:
                return None
            opened.callback(file.close)
            check_header(member, Header("", file.layout.size, raster=file.layout), band_file, bands)
            files.append(file)
            own, first = (PixelPlace(each.layout.size, each.layout.dtype) for each in (file, files[0]))
            check_same_pixels(member, own, path, first)
        opened.pop_all()
    return BandWindows(path, files, bands)


def open_file_windows(path: str | Path, *, is_plain: bool = False) -> FileWindows | None:
    """Open one file; None if it has no random access.

    Args:
        is_plain: only lossless TIFF of 8 bits in grey or RGB, without alpha.

    Raises:
        DataError: if it cannot be opened, or is damaged.
    """
    try:
        file = Path(path).open("rb")  # noqa: SIM115 - kept by the reader
    except OSError:
        return None  # a file in an archive, or one that does not exist, which is reported where it is read whole
    try:
        start = file.read(8)
        file.seek(0)
        if start.startswith(NPY_START) and not is_plain:
            file.close()
            return NpyWindows(path)
        if not start.startswith(TIFF_STARTS):
            return None
        header = read_raster_header(file)
        layout = read_picture_layout(file) if header is None else header.raster
        if layout is None or layout.orientation != 1:
            return None
        is_8_bit = layout.dtype == "uint8" and layout.num_bands in (1, 3) and not layout.has_alpha
        if (is_plain or header is None) and (not is_8_bit or list_missing_packages()):
            return None  # Pillow reads pictures whole
        if header is not None:
            check_layout(path, layout)
        return open_tiff_windows(path, layout, is_lossless=is_plain or header is None)
    except HeaderError as error:
        raise DataError(f"{path}: {error}.") from None
    finally:
        file.close()


# ---- NumPy


class NpyWindows:
    """A NumPy array on disk. Of its pages only those of a window are in memory, and only while it is read.

    Raises:
        DataError: if it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            try:
                header = read_raster_header(file)
                self.header = read_npy_header(file)
            except (HeaderError, ValueError) as error:
                raise DataError(f"{path}: {error}.") from None
        assert header is not None and header.raster is not None, "NumPy files are rasters"
        self.layout = header.raster

    def read(self, window: Window) -> NDArray:
        """As FileWindows.read."""
        order = "F" if self.header.is_fortran else "C"
        pixels = np.memmap(self.path, self.header.dtype, "r", self.header.offset, self.header.shape, order)
        rows, columns = _slices(window)
        return as_bands(np.array(pixels[rows, columns], self.header.dtype.newbyteorder("="), order="C"))

    def close(self) -> None:
        """Nothing is open between windows."""


def _slices(window: Window) -> tuple[slice, slice]:
    top, left, height, width = window
    return slice(top, top + height), slice(left, left + width)


# ---- TIFF


class PartGrid(NamedTuple):
    """The strips or tiles of a TIFF."""

    height: int  # of a part, in pixels
    width: int
    columns: int  # parts beside each other
    per_plane: int  # parts of one band, if bands are stored one after the other
    is_planar: bool


def open_tiff_windows(
    path: str | Path, layout: RasterLayout, *, is_lossless: bool, photometrics: Sequence[int] = (1, 2)
) -> TiffWindows | None:
    """Open a TIFF; None if its parts are too large, or it is decoded otherwise than here.

    Args:
        is_lossless: whether lossy compressions are refused, whose decoders differ.
        photometrics: the meanings of its numbers (tag 262) that are read: 1 grey, 2 RGB, 3 indices of a palette.

    Raises:
        DataError: if it is damaged, or packages are missing.
    """
    tifffile = require_tifffile(path)
    opened: Any = None
    try:
        opened = tifffile.TiffFile(path)
        page = opened.pages[0]
        if page.axes not in ("YX", "YXS", "SYX") or int(page.photometric) not in photometrics:
            opened.close()
            return None
        if (page.imagelength, page.imagewidth, page.samplesperpixel) != (*layout.size, layout.num_bands):
            raise ValueError(f"its shape is {page.shape}")
        is_planar = page.axes == "SYX"
        height = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
        width = page.tilewidth if page.is_tiled else page.imagewidth
        rows, columns = -(-page.imagelength // height), -(-page.imagewidth // width)
        grid = PartGrid(height, width, columns, rows * columns, is_planar)
        num_parts = grid.per_plane * (layout.num_bands if is_planar else 1)
        if len(page.dataoffsets) != num_parts or len(page.databytecounts) != num_parts:
            raise ValueError(f"it has {len(page.dataoffsets)} parts, {num_parts} are needed")
        part_bytes = height * width * (1 if is_planar else layout.num_bands) * np.dtype(layout.dtype).itemsize
        is_mapped = not page.is_tiled and page.is_memmappable and page.is_contiguous
        is_usable = is_mapped or part_bytes <= MAX_PART_BYTES
        if not is_usable or (is_lossless and int(page.compression) not in _LOSSLESS):
            opened.close()
            return None
        return TiffWindows(path, layout, opened, grid, is_mapped=is_mapped)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # tifffile raises errors of many types for damaged bytes
        if opened is not None:
            opened.close()
        raise broken_tiff_error(path, error) from error


class TiffWindows:
    """A TIFF whose strips or tiles are decoded when a window needs them.

    Args:
        file: an open tifffile.TiffFile.
        is_mapped: whether its numbers lie in the file as in memory.
    """

    def __init__(self, path: str | Path, layout: RasterLayout, file: Any, grid: PartGrid, *, is_mapped: bool) -> None:
        self.path, self.layout, self.file, self.grid, self.is_mapped = path, layout, file, grid, is_mapped
        self.page = file.pages[0]
        self.num_bytes = file.filehandle.size
        self._parts: OrderedDict[int, NDArray | None] = OrderedDict()
        self._kept = 0  # bytes of the parts

    def close(self) -> None:
        """Close the file, and forget what was decoded."""
        self._parts.clear()
        self.file.close()

    def read(self, window: Window) -> NDArray:
        """As FileWindows.read."""
        try:
            return self._read_mapped(window) if self.is_mapped else self._read_parts(window)
        except MemoryError:
            raise
        except Exception as error:  # tifffile and imagecodecs raise errors of many types for damaged bytes
            raise broken_tiff_error(self.path, error) from error

    def _read_mapped(self, window: Window) -> NDArray:
        layout, page = self.layout, self.page
        dtype = np.dtype(layout.dtype).newbyteorder(page.parent.byteorder)
        planes = (layout.num_bands, *layout.size) if self.grid.is_planar else (*layout.size, layout.num_bands)
        if page.dataoffsets[0] + math.prod(planes) * dtype.itemsize > self.num_bytes:
            raise ValueError("truncated")
        pixels = np.memmap(self.file.filehandle.path, dtype, "r", page.dataoffsets[0], planes)
        rows, columns = _slices(window)
        chosen = pixels[:, rows, columns].transpose(1, 2, 0) if self.grid.is_planar else pixels[rows, columns]
        return np.array(chosen, np.dtype(layout.dtype), order="C")

    def _read_parts(self, window: Window) -> NDArray:
        grid, num_bands = self.grid, self.layout.num_bands
        fill = self.layout.nodata if self.layout.nodata is not None and math.isfinite(self.layout.nodata) else 0
        out = np.full((window.height, window.width, num_bands), fill, self.layout.dtype)
        for row in range(window.top // grid.height, -(-(window.top + window.height) // grid.height)):
            for column in range(window.left // grid.width, -(-(window.left + window.width) // grid.width)):
                for plane in range(num_bands if grid.is_planar else 1):
                    part = self._part(plane * grid.per_plane + row * grid.columns + column)
                    if part is not None:  # a part of a sparse file has no numbers
                        bands = slice(plane, plane + 1) if grid.is_planar else slice(None)
                        _paste(part, row * grid.height, column * grid.width, out[..., bands], window)
        return out

    def _part(self, index: int) -> NDArray | None:
        """A decoded strip or tile, (h, w, bands); None if the file holds nothing for it."""
        if index in self._parts:
            self._parts.move_to_end(index)
            return self._parts[index]
        page, num_bytes = self.page, self.page.databytecounts[index]
        if page.dataoffsets[index] + num_bytes > self.num_bytes:
            raise ValueError(f"truncated: a part of it ends at byte {page.dataoffsets[index] + num_bytes}")
        part = None
        if num_bytes:
            handle = self.file.filehandle
            handle.seek(page.dataoffsets[index])
            decoded, _, _ = page.decode(handle.read(num_bytes), index, jpegtables=page.jpegtables, _fullsize=False)
            part = None if decoded is None else np.asarray(decoded[0])  # (depth, h, w, samples)
        self._parts[index] = part
        self._kept += 0 if part is None else part.nbytes
        while self._kept > CACHE_BYTES and len(self._parts) > 1:
            _, dropped = self._parts.popitem(last=False)
            self._kept -= 0 if dropped is None else dropped.nbytes
        return part


def _paste(part: NDArray, part_top: int, part_left: int, out: NDArray, window: Window) -> None:
    """Copy what a part and a window have in common into the pixels of the window."""
    top, left = max(window.top, part_top), max(window.left, part_left)
    bottom = min(window.top + window.height, part_top + part.shape[0])
    right = min(window.left + window.width, part_left + part.shape[1])
    if top < bottom and left < right:
        target = out[top - window.top : bottom - window.top, left - window.left : right - window.left]
        target[:] = part[top - part_top : bottom - part_top, left - part_left : right - part_left]
