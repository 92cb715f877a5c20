"""Stage 3: an image with named bands, from one file or several, as one array; pixels without values are filled.

A pixel holds no value where the file says so (GDAL's nodata), where it is NaN or infinite, and where alpha is 0.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from semseg.config.preprocessing import RGB
from semseg.data.bands import BandFile, BandOptions, describe_bands
from semseg.data.folders import IMAGE_SUFFIXES
from semseg.data.geometry import Size
from semseg.data.headers import Header
from semseg.data.images import (
    DATA_SET_ADVICE,
    MAX_PIXELS,
    apply_orientation,
    check_png,
    decode_alpha,
    decode_pixels,
    open_any,
    read_image_bytes,
    size_of_pixels,
)
from semseg.data.raster_layout import read_picture_layout
from semseg.data.rasters import as_bands, check_layout, read_raster
from semseg.data.store import UnusedFiles, is_file, list_folder
from semseg.errors import DataError

NAMING_ADVICE = "Name every band of a file; null instead of a name leaves a band out."  # for data sets
_PNG_BANDS = {0: 1, 2: 3, 4: 2, 6: 4}  # colour type -> bands, with alpha; 3 is a palette


class BandImage(NamedTuple):
    """An image as stored."""

    pixels: NDArray  # (H, W, C), of a type of PIXEL_TYPES; filled where there is no value
    is_valid: NDArray[np.bool_] | None  # (H, W): whether any band has a value; None: all have one everywhere
    header: Header  # of the first file
    is_missing: NDArray[np.bool_] | None = None  # (H, W, C) where a band has no value; None: nowhere

    def turn_upright(self) -> BandImage:
        """The image as displayed."""
        turned = apply_orientation(self.pixels, self.header.orientation)
        is_valid = None if self.is_valid is None else apply_orientation(self.is_valid, self.header.orientation)
        is_missing = None if self.is_missing is None else apply_orientation(self.is_missing, self.header.orientation)
        return BandImage(turned, is_valid, self.header, is_missing)


class FileBands(NamedTuple):
    """The numbers of one file."""

    pixels: NDArray  # (H, W, bands) without alpha
    alpha: NDArray | None  # (H, W) alpha, if the file has it
    nodata: float | None
    header: Header

    @property
    def place(self) -> PixelPlace:
        """Where its pixels lie."""
        return PixelPlace(self.header.stored, self.pixels.dtype.name, self.header.orientation)


class PixelPlace(NamedTuple):
    """What the files of an image have in common."""

    stored: Size
    dtype: str  # NumPy's name
    orientation: int = 1


def read_bands(
    path: str | Path,
    options: BandOptions,
    max_pixels: int = MAX_PIXELS,
    *,
    key: str = "data.max_pixels",
    advice: str = DATA_SET_ADVICE,
) -> BandImage:
    """The bands of an image as stored.

    Args:
        path: of its first file.
        key: configuration key of `max_pixels`, for messages.
        advice: what to do if the file is missing, for the message.

    Raises:
        DataError: if a file is missing, broken, too large, or does not hold the bands that `options` name.
    """
    main = read_image_bytes(path, advice=advice)

    def read_member(file: BandFile) -> tuple[str | Path, bytes]:
        if file is options.files[0]:
            return path, main
        member = find_band_file(path, options, file)
        return member, read_image_bytes(member, advice=advice)

    return join_files(map(read_member, options.files), options, max_pixels, key=key)


def decode_bands(
    data: bytes,
    name: str | Path,
    options: BandOptions,
    max_pixels: int,
    *,
    key: str = "data.max_pixels",
    naming: str = NAMING_ADVICE,
) -> BandImage:
    """As `read_bands`, for the bytes of the only file of an image.

    Args:
        name: of the file, for messages.
        naming: what to do about a file with other bands, for the message.
    """
    return join_files([(name, data)], options, max_pixels, key=key, naming=naming)


def join_files(
    members: Iterable[tuple[str | Path, bytes]],
    options: BandOptions,
    max_pixels: int,
    *,
    key: str,
    naming: str = NAMING_ADVICE,
) -> BandImage:
    """The bands of all files of an image, given as names and contents; see `read_bands`."""
    reads: list[FileBands] = []
    path: str | Path = ""
    first: PixelPlace | None = None
    for file, (member, data) in zip(options.files, members, strict=True):
        path = path or member
        read = split_alpha(member, decode_file_bands(member, data, max_pixels, key), file, naming)
        options.check_type(read.pixels.dtype, member)
        first = first or read.place
        check_same_pixels(member, read.place, path, first)
        reads.append(select_used(read, file))
    return join_bands(reads, options, reads[0].header)


def select_used(read: FileBands, file: BandFile) -> FileBands:
    """The bands of a file that have a name, without the memory of the others."""
    used = [index for index, name in enumerate(file.names) if name is not None]
    return read if len(used) == read.pixels.shape[-1] else read._replace(pixels=read.pixels[..., used])


def check_same_pixels(member: str | Path, found: PixelPlace, path: str | Path, first: PixelPlace) -> None:
    """Check that a file of an image has its bands on the same pixels and in the same type as the first one.

    Raises:
        DataError: with both files.
    """
    if (found.stored, found.orientation) != (first.stored, first.orientation):
        raise DataError(
            f"{member}: is {found.stored}, {path} is {first.stored} (height x width). The bands of an image must lie "
            "on the same pixels."
        )
    if found.dtype != first.dtype:
        raise DataError(
            f"{member}: holds {found.dtype} values, {path} {first.dtype} ones. Save the bands of an image in one type."
        )


def join_bands(reads: Iterable[FileBands], options: BandOptions, header: Header) -> BandImage:
    """The image, or a window of it, from the used bands of each of its files."""
    parts: list[NDArray] = []
    missing: list[NDArray | None] = []
    alphas: list[NDArray] = []
    for read in reads:
        parts.append(read.pixels)
        missing.append(find_empty(parts[-1], read.nodata))
        if read.alpha is not None:
            alphas.append(read.alpha)
    pixels = np.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]
    is_missing = join_missing(missing, [part.shape for part in parts])
    if options.order != list(range(len(options.names))):
        pixels = pixels[..., options.order]
        is_missing = None if is_missing is None else is_missing[..., options.order]
    return fill_missing(np.ascontiguousarray(pixels), is_missing, alphas, options, header)


def fill_missing(
    pixels: NDArray, is_missing: NDArray | None, alphas: list[NDArray], options: BandOptions, header: Header
) -> BandImage:
    """Put the fill values of `options` where there are none.

    Args:
        pixels: (H, W, C).
        is_missing: (H, W, C) where there is no value; None: nowhere.
        alphas: (H, W) each; 0 where there are no values.
    """
    is_valid = None if is_missing is None else ~is_missing.all(axis=2)
    for alpha in alphas:
        if alpha.all():
            continue
        is_valid = alpha != 0 if is_valid is None else is_valid & (alpha != 0)
        is_missing = (alpha == 0)[..., None] if is_missing is None else is_missing | (alpha == 0)[..., None]
    if is_missing is not None:
        is_missing = np.broadcast_to(is_missing, pixels.shape)
        pixels = np.where(is_missing, options.fill_values(pixels.dtype), pixels)
    return BandImage(pixels, None if is_valid is None or is_valid.all() else np.asarray(is_valid), header, is_missing)


def find_empty(pixels: NDArray, nodata: float | None) -> NDArray[np.bool_] | None:
    """(H, W, C) where a number is no value; None: nowhere."""
    is_missing: NDArray[np.bool_] | None = None
    if pixels.dtype.kind == "f":
        is_finite = np.isfinite(pixels)
        is_missing = None if is_finite.all() else ~is_finite
    if nodata is not None and np.isfinite(nodata):
        value = pixels.dtype.type(nodata) if pixels.dtype.kind == "f" else nodata
        is_nodata = np.asarray(pixels == value)  # no pixel has a number that its type does not have
        if is_nodata.any():
            is_missing = is_nodata if is_missing is None else is_missing | is_nodata
    return is_missing


def join_missing(missing: list[NDArray | None], shapes: list[tuple[int, ...]]) -> NDArray | None:
    """The results of `find_empty` for the parts of an image, one behind the other."""
    if all(mask is None for mask in missing):
        return None
    return np.concatenate(
        [np.zeros(shape, bool) if mask is None else mask for mask, shape in zip(missing, shapes, strict=True)], axis=2
    )


# ---- one file


def decode_file_bands(path: str | Path, data: bytes, max_pixels: int, key: str = "data.max_pixels") -> FileBands:
    """All bands of the bytes of a file, as stored.

    Raises:
        DataError: if it is broken, or too large.
    """
    image, header = open_any(path, data, max_pixels, key)
    if header.raster is not None:
        layout = header.raster
        pixels = read_raster(path, data, layout)
        alpha = pixels[..., -1] if layout.has_alpha else None
        return FileBands(pixels[..., :-1] if layout.has_alpha else pixels, alpha, layout.nodata, header)
    if header.kind.startswith("PNG ") and not header.has_frames and data[25] in _PNG_BANDS:
        return _read_png(path, data, header)
    if header.bits > 8:
        raise DataError(
            f"{path}: holds {header.bits} bits per value, which are read from PNG, TIFF and .npy only. Save it as one."
        )
    pixels = decode_pixels(path, data, image, header)
    is_grey = header.kind.endswith((" L", " 1", " LA"))
    alpha = decode_alpha(path, image, header)
    nodata = _find_nodata(data) if is_grey or header.kind.endswith((" RGB", " RGBA")) else None
    return FileBands(pixels[..., :1] if is_grey else pixels, alpha, nodata, header)


def _find_nodata(data: bytes) -> float | None:
    """GDAL's number of pixels without a value in a TIFF that is a picture, as its pixels are decoded."""
    layout = read_picture_layout(io.BytesIO(data))
    if layout is None or layout.nodata is None:
        return None
    return 255 - layout.nodata if layout.has_white_zero else layout.nodata


def _read_png(path: str | Path, data: bytes, header: Header) -> FileBands:
    """A PNG without a palette, of 8 or 16 bits, with its alpha."""
    check_png(path, data)
    num_bands = _PNG_BANDS[data[25]]
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        pixels = None
    if pixels is None or size_of_pixels(pixels) != header.stored:
        raise DataError(f"{path}: the PNG file is broken and cannot be decoded. Download or copy it again.")
    pixels = as_bands(pixels)
    if num_bands == 2 and pixels.shape[2] == 4:  # OpenCV expands grey with alpha
        pixels = pixels[..., [0, 3]]
    elif pixels.shape[2] >= 3:
        pixels = pixels[..., [2, 1, 0, *range(3, pixels.shape[2])]]
    has_alpha = pixels.shape[2] in (2, 4)
    alpha = pixels[..., -1] if has_alpha else None
    return FileBands(pixels[..., :-1] if has_alpha else pixels, alpha, None, header)


class BandCount(NamedTuple):
    """What the header of a file says about its bands."""

    num_bands: int  # without alpha
    has_alpha: bool
    dtype: str  # NumPy's name


def count_bands(header: Header) -> BandCount:
    """The bands of a picture or a raster as they are read."""
    if header.raster is not None:
        layout = header.raster
        return BandCount(layout.num_bands - layout.has_alpha, layout.has_alpha, layout.dtype)
    mode = header.kind.partition(" ")[2]
    is_grey = mode in ("1", "L", "LA", "I", "F") or mode.startswith("I;16")
    return BandCount(1 if is_grey else 3, mode in ("LA", "RGBA", "PA"), "uint16" if header.bits == 16 else "uint8")


def check_header(path: str | Path, header: Header, file: BandFile, options: BandOptions) -> None:
    """Refuse a file without the bands that are named, or of another type, before it is decoded.

    Raises:
        DataError: with what it holds.
    """
    if header.raster is not None:
        check_layout(path, header.raster)
    found = count_bands(header)
    pixel = np.zeros((1, 1, found.num_bands + found.has_alpha), found.dtype)
    alpha = pixel[..., -1] if found.has_alpha else None
    split_alpha(path, FileBands(pixel[..., : found.num_bands], alpha, None, header), file)
    options.check_type(pixel.dtype, path)


def split_alpha(path: str | Path, read: FileBands, file: BandFile, naming: str = NAMING_ADVICE) -> FileBands:
    """The bands of a file that its names stand for: alpha is one of them if there is a name for it.

    Grey files are red, green and blue alike where these three are expected.

    Args:
        naming: what to do about a file with other bands, for the message.

    Raises:
        DataError: if the file holds another number of bands than there are names.
    """
    num_names, found = len(file.names), read.pixels.shape[2]
    if found == num_names:
        return read
    if found + 1 == num_names and read.alpha is not None:
        return read._replace(pixels=np.concatenate([read.pixels, read.alpha[..., None]], axis=2), alpha=None)
    if found == 1 and file.names == RGB:
        return read._replace(pixels=np.repeat(read.pixels, 3, axis=2))
    layout = read.header.raster
    if layout is not None:
        holds = layout.describe()
    else:
        alpha = "" if read.alpha is None else " and alpha"
        holds = f"{found} band{'s' if found > 1 else ''}{alpha} of {read.pixels.dtype} values"
    where = f" for the files {file.suffix}" if file.suffix else ""
    raise DataError(
        f"{path}: holds {holds}, but data.bands names {num_names}{where}: {describe_bands(file.names)}. {naming}"
    )


# ---- the other files of an image


def find_band_file(path: str | Path, options: BandOptions, file: BandFile) -> Path:
    """Another file of the image whose first file is `path`: the same folder and stem, with another end.

    Raises:
        DataError: if there is none, or one whose name differs in upper and lower case.
    """
    main = Path(path)
    if not main.stem.endswith(options.main_suffix):
        raise DataError(f"{path}: its name must end in {options.main_suffix}, as data.band_files says.")
    stem = main.stem.removesuffix(options.main_suffix) + file.suffix
    found = main.with_name(f"{stem}{main.suffix}")
    if is_file(found):
        return found
    alternatives = [found.with_name(f"{stem}{suffix}") for suffix in sorted(IMAGE_SUFFIXES)]
    others = [path for path in alternatives if is_file(path)]
    if len(others) == 1:
        return others[0]
    names = list_folder(main.parent, UnusedFiles()) if os.path.isdir(main.parent) or main.parent.suffix else []  # noqa: PTH112
    others = [name for name in names if Path(name).stem == stem]
    if len(others) == 1:
        return main.with_name(others[0])
    alike = [name for name in names if Path(name).stem.lower() == stem.lower()]
    hint = f" There is {alike[0]}, which differs in upper and lower case: rename it." if alike else ""
    bands = ", ".join(name for name in file.names if name is not None)
    raise DataError(f"{found}: there is no such file, which holds {bands} of {main.name} (data.band_files).{hint}")
