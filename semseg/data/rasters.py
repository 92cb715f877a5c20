"""Stage 3: from the bytes of a raster to its numbers, (H, W, bands), and from those of a picture to its bands.

TIFF files are read by tifffile with imagecodecs (the extra `tiff`), arrays by ourselves, 16-bit PNG by OpenCV, and
pictures as `images` reads them.
"""

from __future__ import annotations

import io
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semseg.config.preprocessing import PIXEL_TYPES
from semseg.data.decoders import silent_stderr
from semseg.data.lzw import decode_lzw
from semseg.data.raster_layout import RasterLayout, read_npy_header
from semseg.errors import DataError, install_command, one_line

LZW = 5  # compression (tag 259)
TIFF_EXTRA = ("tifffile", "imagecodecs")  # modules of semseg[tiff]


def list_missing_packages() -> list[str]:
    """The packages that reading TIFF by tifffile lacks."""
    return [name for name in TIFF_EXTRA if find_spec(name) is None]


def require_tifffile(path: str | Path) -> Any:
    """The module tifffile.

    Raises:
        DataError: with the command that installs it.
    """
    missing = list_missing_packages()
    if missing:
        raise DataError(f"{path}: TIFF files of this kind need {', '.join(missing)}: {install_command('tiff')}")
    import tifffile  # noqa: PLC0415 - an extra

    tifffile.TIFF.DECOMPRESSORS._codecs[LZW] = decode_lzw  # pyright: ignore[reportAttributeAccessIssue]
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # our errors say what is wrong with a file
    return tifffile


def check_layout(path: str | Path, layout: RasterLayout) -> None:
    """Refuse a raster whose numbers cannot be read without a loss, or that is a stack of images.

    Raises:
        DataError: with what it holds, and how to convert it.
    """
    if layout.dtype not in PIXEL_TYPES:
        way = "uint8" if layout.dtype == "bool" else "float32"
        raise DataError(
            f"{path}: holds {layout.describe()}, which are not supported: read are {', '.join(PIXEL_TYPES)}. Save it "
            f"as {way}."
        )
    if layout.num_pages > 1:
        raise DataError(
            f"{path}: holds {layout.num_pages} pages of {layout.describe()}, and which of them is the image is not "
            "known. Save each page as a file, or the bands as one page."
        )


def read_raster(path: str | Path, data: bytes, layout: RasterLayout) -> NDArray:
    """The numbers of a raster as stored, (H, W, bands), of a type of PIXEL_TYPES in the byte order of the machine.

    Args:
        layout: of `data`, whose number of pixels was checked.

    Raises:
        DataError: if it is of another type, a stack of pages, damaged, or needs packages.
    """
    check_layout(path, layout)
    pixels = read_array(data) if layout.format == "NPY" else _read_tiff(path, data, layout)
    expected = (*layout.size, layout.num_bands)
    if pixels.shape != expected or pixels.dtype.name != layout.dtype:
        raise DataError(
            f"{path}: the header declares {layout.size} (height x width) with {layout.describe()}, the pixels are "
            f"{pixels.dtype.name} of shape {pixels.shape}."
        )
    return pixels


def read_array(data: bytes) -> NDArray:
    """The numbers in a NumPy file of two or three dimensions, (H, W, bands), in the byte order of the machine.

    Raises:
        LayoutError: if it is damaged.
    """
    header = read_npy_header(io.BytesIO(data))
    count = int(np.prod(header.shape))
    flat = np.frombuffer(data, header.dtype, count, header.offset)
    pixels = flat.reshape(header.shape, order="F" if header.is_fortran else "C")
    return np.array(as_bands(pixels), header.dtype.newbyteorder("="), order="C")  # writable, as torch expects


def _read_tiff(path: str | Path, data: bytes, layout: RasterLayout) -> NDArray:
    tifffile = require_tifffile(path)
    try:
        with silent_stderr, tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            is_planar = page.axes == "SYX"
            if page.axes not in ("YX", "YXS", "SYX"):
                raise ValueError(f"its axes are {page.axes}")
            if (page.imagelength, page.imagewidth, page.samplesperpixel) != (*layout.size, layout.num_bands):
                raise ValueError(f"its shape is {page.shape}")
            for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):
                if offset + length > len(data):
                    raise ValueError(f"truncated: a part of it ends at byte {offset + length} of {len(data)}")
            pixels = page.asarray(maxworkers=1)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # tifffile and imagecodecs raise errors of many types for damaged bytes
        raise broken_tiff_error(path, error) from error
    pixels = as_bands(pixels.transpose(1, 2, 0) if is_planar else pixels)
    return np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("="))


def broken_tiff_error(path: str | Path, error: Exception) -> DataError:
    """The error for a TIFF that cannot be decoded, in one line."""
    reason = one_line(error)
    return DataError(f"{path}: the TIFF file is broken and cannot be decoded ({reason}). Download or copy it again.")


def as_bands(pixels: NDArray) -> NDArray:
    """(H, W) or (H, W, bands) as (H, W, bands)."""
    return pixels[..., None] if pixels.ndim == 2 else pixels
