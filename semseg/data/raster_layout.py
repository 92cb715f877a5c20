"""What the header of a raster says: a TIFF that is more than an 8-bit picture, or a NumPy array. Decodes no pixels.

A raster is a grid of numbers, any number of bands of any type. TIFF files of at most 8 bits with one or three colours,
CMYK or a palette, alpha or not, are pictures, which Pillow reads rightly; of others Pillow and OpenCV return wrong
pixels without an error. No torch.
"""

from __future__ import annotations

import ast
import io
import math
import struct
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import TiffImagePlugin

from semseg.data.geometry import Size

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_START = b"\x93NUMPY"
_COLOURS = {2: 3, 5: 4, 6: 3, 8: 3}  # bands of a photometric interpretation (tag 262) that are no extra ones; else 1
_IS_ALPHA = (1, 2)  # values of ExtraSamples (tag 338)
_KINDS = {1: "uint", 2: "int", 3: "float", 4: "uint"}  # sample formats (tag 339)
_MAX_PAGES, _MAX_TAGS, _MAX_VALUES = 1000, 4096, 2**16  # of a TIFF: more are not looked at
_TIFF_TYPES = {1: "B", 2: "c", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q"}  # letters of struct
GEO_TAGS = frozenset({33550, 33922, 34264, 34735})  # pixel scale, tie points, transform, keys
_NEEDED = (254, 256, 257, 258, 259, 262, 274, 277, 338, 339, 32997, 42113)  # tags
_MAX_NPY_HEADER = 10_000  # bytes, NumPy's own limit
_REDUCED_OR_MASK = 5  # bits of NewSubfileType (tag 254): a smaller copy, a mask


class RasterLayout(NamedTuple):
    """A raster as its header describes it."""

    format: str  # "TIFF" or "NPY"
    size: Size  # as stored
    num_bands: int  # with alpha
    dtype: str  # NumPy's name of the type of its numbers, such as uint16
    has_alpha: bool = False  # whether the last band is alpha
    orientation: int = 1  # as in EXIF
    nodata: float | None = None  # the number of pixels that hold none, NaN included; None: not declared
    num_pages: int = 1  # images of full resolution in the file
    is_rgb: bool = False  # whether the first three bands are red, green and blue
    has_white_zero: bool = False  # whether 0 is white in pictures; the numbers are as stored

    def describe(self) -> str:
        """What the file holds, for messages.

        >>> RasterLayout("TIFF", Size(2, 3), 4, "uint16", has_alpha=True).describe()
        '3 bands and alpha of uint16 values'
        """
        count = self.num_bands - self.has_alpha
        alpha = " and alpha" if self.has_alpha else ""
        return f"{count} band{'s' if count > 1 else ''}{alpha} of {self.dtype} values"


class LayoutError(ValueError):
    """Why the header of a raster cannot be read: a predicate for a sentence that begins with the file name."""


def read_layout(file: BinaryIO) -> RasterLayout | None:
    """The layout of a raster; None for pictures and files of other kinds. The position in the file stays.

    Raises:
        LayoutError: for a NumPy array that is damaged or no image.
    """
    position = file.tell()
    try:
        start = file.read(8)
        if start.startswith(TIFF_STARTS):
            return _read_tiff(file, position)
        return _read_npy(file, position) if start.startswith(NPY_START) else None
    finally:
        file.seek(position)


def read_picture_layout(file: BinaryIO) -> RasterLayout | None:
    """The layout of a TIFF that is a picture for `read_layout`; None for other files. The position stays."""
    position = file.tell()
    try:
        return _read_tiff(file, position, wants_picture=True) if file.read(4) in TIFF_STARTS else None
    finally:
        file.seek(position)


def has_geo_tags(file: BinaryIO) -> bool:
    """Whether a file is a TIFF with the tags of GeoTIFF. The position in the file stays."""
    position = file.tell()
    try:
        if file.read(4) not in TIFF_STARTS:
            return False
        return not GEO_TAGS.isdisjoint(_read_directories(file, position)[0])
    except (ValueError, struct.error, OverflowError, OSError):
        return False
    finally:
        file.seek(position)


# ---- TIFF


def _read_tiff(file: BinaryIO, start: int, *, wants_picture: bool = False) -> RasterLayout | None:
    """None for a picture unless it is wanted, and for a file that is so damaged that Pillow should say why."""
    try:
        directories = _read_directories(file, start)
        tags = directories[0]
        file.seek(start)
        is_foreign = file.read(4) == b"MM\0+"  # Pillow reads no BigTIFF in this byte order
        layout = _layout_of_tags(tags, wants_picture=wants_picture or is_foreign)
    except (ValueError, struct.error, OverflowError, OSError):
        return None
    if layout is None:
        return None
    pages = sum(not _number(directory, 254, 0) & _REDUCED_OR_MASK for directory in directories)
    depth = _number(tags, 32997, 1)  # ImageDepth: slices in one directory
    return layout._replace(num_pages=max(1, pages) * max(1, depth))


Tags = dict[int, tuple[int, ...] | bytes]


def _read_directories(file: BinaryIO, start: int) -> list[Tags]:
    """The needed tags of all images in a TIFF, BigTIFF included.

    Raises:
        ValueError: if there is no whole directory.
    """
    file.seek(start)
    begin = file.read(16)
    order, is_big = "<" if begin[:2] == b"II" else ">", 43 in begin[2:4]
    word, entry_size = ("Q", 20) if is_big else ("I", 12)
    (offset,) = struct.unpack_from(f"{order}{word}", begin, 8 if is_big else 4)
    found: list[Tags] = []
    seen: set[int] = set()
    while offset and offset not in seen and len(found) < _MAX_PAGES:
        seen.add(offset)
        file.seek(start + offset)
        (count,) = struct.unpack(f"{order}{'Q' if is_big else 'H'}", _read_all(file, 8 if is_big else 2))
        if count > _MAX_TAGS:
            raise ValueError("a directory has too many tags")
        entries = _read_all(file, count * entry_size)
        following = file.read(8 if is_big else 4)
        tags: Tags = {}
        for place in range(0, len(entries), entry_size):
            tag, kind = struct.unpack_from(f"{order}HH", entries, place)
            if tag in _NEEDED and kind in _TIFF_TYPES:
                (number,) = struct.unpack_from(f"{order}{word}", entries, place + 4)
                content = entries[place + (12 if is_big else 8) : place + entry_size]
                tags[tag] = _read_value(file, start, order, _TIFF_TYPES[kind], number, content)
            elif tag in GEO_TAGS:
                tags[tag] = b""
        found.append(tags)
        offset = struct.unpack(f"{order}{word}", following)[0] if len(following) == struct.calcsize(word) else 0
    if not found:
        raise ValueError("there is no directory")
    return found


def _read_value(  # noqa: PLR0917 - what an entry of a directory says
    file: BinaryIO, start: int, order: str, letter: str, number: int, content: bytes
) -> tuple[int, ...] | bytes:
    """The value of a tag: numbers, or text as bytes; a value that does not fit its entry is elsewhere in the file."""
    length = number * struct.calcsize(f"={letter}")
    if not 0 < number <= _MAX_VALUES:
        raise ValueError("a tag has too many values")
    if length > len(content):
        place = file.tell()
        (offset,) = struct.unpack(f"{order}{'Q' if len(content) == 8 else 'I'}", content)
        file.seek(start + offset)
        content = _read_all(file, length)
        file.seek(place)
    return content[:length] if letter == "c" else struct.unpack(f"{order}{number}{letter}", content[:length])


def _read_all(file: BinaryIO, length: int) -> bytes:
    content = file.read(length)
    if len(content) != length:
        raise ValueError("truncated")
    return content


def _number(tags: Tags, tag: int, default: int) -> int:
    value = tags.get(tag, (default,))
    return default if isinstance(value, bytes) else value[0]


def _numbers(tags: Tags, tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
    value = tags.get(tag, default)
    return default if isinstance(value, bytes) else value


def _layout_of_tags(tags: Tags, *, wants_picture: bool) -> RasterLayout | None:
    size = Size(_number(tags, 257, 0), _number(tags, 256, 0))
    samples, photometric = _number(tags, 277, 1), _number(tags, 262, 1)
    bits, formats, extras = set(_numbers(tags, 258, (1,))), set(_numbers(tags, 339, (1,))), _numbers(tags, 338, ())
    num_extra = max(len(extras), samples - _COLOURS.get(photometric, 1))
    has_alpha = num_extra > 0 and len(extras) == num_extra and extras[-1] in _IS_ALPHA
    is_known = _number(tags, 259, 1) in TiffImagePlugin.COMPRESSION_INFO
    is_picture = is_known and max(bits) <= 8 and formats <= {1, 4} and num_extra - has_alpha <= 0
    if (is_picture and not wants_picture) or min(size) < 1 or samples < 1:
        return None
    orientation = _number(tags, 274, 1)
    return RasterLayout(
        "TIFF",
        size,
        samples,
        _name_type(bits, formats),
        has_alpha,
        orientation if orientation in range(1, 9) else 1,
        parse_nodata(tags.get(42113)),
        is_rgb=photometric == 2,
        has_white_zero=photometric == 0,
    )


def _name_type(bits: set[int], formats: set[int]) -> str:
    """NumPy's name of a type, or a description of what NumPy has no name for."""
    if len(bits) != 1 or len(formats) != 1:
        return "mixed"
    (width,), (kind,) = bits, formats
    name = _KINDS.get(kind, f"format {kind} of ")
    if name == "uint" and 8 < width < 16:  # 12 bits of a camera are unpacked
        width = 16
    return f"{name}{width}"


def parse_nodata(text: Any) -> float | None:
    """The value of GDAL's tag, which is text; None if it is no number.

    >>> parse_nodata("-9999 "), parse_nodata("nan"), parse_nodata("none")
    (-9999.0, nan, None)
    """
    text = text.decode("ascii", "replace") if isinstance(text, bytes) else text
    try:
        return float(str(text).strip("\0 "))
    except ValueError:
        return None


# ---- NumPy


def _read_npy(file: BinaryIO, start: int) -> RasterLayout:
    header = read_npy_header(file, start)
    shape = header.shape
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise LayoutError(f"holds an array of shape {shape}; an image is (height, width) or (height, width, bands)")
    return RasterLayout("NPY", Size(shape[0], shape[1]), shape[2] if len(shape) == 3 else 1, header.dtype.name)


class NpyHeader(NamedTuple):
    """The header of a NumPy file."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype
    offset: int  # of the first number, in bytes


def read_npy_header(file: BinaryIO, start: int = 0) -> NpyHeader:
    """The header of a NumPy file.

    Raises:
        LayoutError: if it is damaged, or holds Python objects.
    """
    file.seek(start + len(NPY_START))
    version = tuple(file.read(2))
    length_bytes = 2 if version == (1, 0) else 4
    length = int.from_bytes(file.read(length_bytes), "little")
    if version not in ((1, 0), (2, 0), (3, 0)) or not 0 < length <= _MAX_NPY_HEADER:
        raise LayoutError("is a NumPy file with a damaged header. Save it again")
    text = file.read(length)
    try:
        plain = ast.literal_eval(text.decode("latin1"))
        shape, order, description = plain["shape"], plain["fortran_order"], plain["descr"]
        dtype = np.dtype(description) if isinstance(description, str) else None
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise LayoutError("is a NumPy file with a damaged header. Save it again") from None
    if dtype is None or dtype.hasobject or dtype.kind not in "buif":
        raise LayoutError(
            f"is a NumPy file of {str(description)[:40]!r} values, which are no numbers of pixels. Save it as uint8, "
            "uint16, int16 or float32"
        )
    is_shape = isinstance(shape, tuple) and all(type(side) is int and 0 <= side < 2**40 for side in shape)
    if not is_shape or not isinstance(order, bool):
        raise LayoutError("is a NumPy file with a damaged header. Save it again")
    offset = start + len(NPY_START) + 2 + length_bytes + length
    needed, here = math.prod(shape) * dtype.itemsize, file.seek(0, io.SEEK_END) - offset
    if here < needed:
        raise LayoutError(
            f"is truncated: its header declares {needed} bytes of numbers, there are {max(0, here)}. Download or copy "
            "it again"
        )
    return NpyHeader(shape, order, dtype, offset)
