"""Stage 3: from image files to RGB pixels: read, check, decode, orient, mirror. No torch.

Files are read into memory once and checked before they are decoded, because decoders are too tolerant: OpenCV returns
half a grey image for a truncated JPEG, Pillow returns half a label for a PNG with a wrong checksum, and both unpack a
file of 100 kB to gigabytes.

Images are uint8 (H, W, 3) RGB. Labels are read in labels.py, images and labels together in pairs.py.
"""

from __future__ import annotations

import io
import logging
import warnings
import zlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semseg.data.decoders import pillow_without_limit, silent_stderr
from semseg.data.geometry import Size
from semseg.data.headers import (
    PNG_START,
    Header,
    HeaderError,
    check_pixels,
    header_of,
    open_image,
    read_raster_header,
)
from semseg.data.raster_layout import RasterLayout
from semseg.data.rasters import check_layout, read_raster
from semseg.data.store import read_file
from semseg.errors import DataError

# Workers decode images in parallel: threads within one image only compete with each other, and OpenCV's thread pool
# does not survive the fork of a worker.
cv2.setNumThreads(0)
# Our own messages say why a file cannot be decoded; lines of OpenCV and Pillow on standard error are not needed.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)

# Larger images are rejected by their header: 134 megapixels exceed any camera and take 400 MB as RGB.
MAX_PIXELS = 2**27

_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
# Kinds that OpenCV decodes fast and with the result of Pillow; Pillow reads the others.
_OPENCV_KINDS = ("JPEG ", "PNG ", "WEBP ")
_MAX_PIXELS_OPENCV = 2**30
_MAX_SIDE_OPENCV = 10**6  # pixels
_DARK = 2**14  # a 16-bit image with all values below uses a fraction of its range
_INVERSE_ORIENTATION = {6: 8, 8: 6}  # EXIF orientations; the others are their own inverse


# ---- reading


def read_image(path: str | Path, *, upright: bool = False, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Pixels of an image file: uint8 (H, W, 3) RGB, as stored, or rotated as EXIF says if `upright`.

    Grey, palette and CMYK images become RGB, alpha is dropped, 16 bits are scaled to 8.

    Raises:
        DataError: if the file is missing, empty, a folder, not an image, broken, or larger than `max_pixels`.
    """
    return decode_image(read_image_bytes(path), path, upright=upright, max_pixels=max_pixels)


def decode_image(
    data: bytes,
    name: str | Path,
    *,
    upright: bool = False,
    max_pixels: int = MAX_PIXELS,
    key: str = "data.max_pixels",
) -> NDArray[np.uint8]:
    """As `read_image`, for the bytes of a file.

    Args:
        name: of the file, for messages.
        key: configuration key of `max_pixels`, for messages.

    Raises:
        DataError: if the bytes are empty, not an image, broken, or declare more than `max_pixels`.
    """
    image, header = open_any(name, data, max_pixels, key)
    pixels = decode_pixels(name, data, image, header)
    return apply_orientation(pixels, header.orientation) if upright else pixels


def read_header(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Header:
    """The header of an image file that is complete, as far as can be checked without decoding it.

    Raises:
        DataError: as `read_image`.
    """
    data = read_image_bytes(path)
    _, header = open_any(path, data, max_pixels)
    _check_jpeg(path, data)
    check_png(path, data)
    return header


class LargestValue(NamedTuple):
    """The largest pixel value of an image, without alpha."""

    value: int
    max_value: int  # largest value of its bit depth: 255 or 65535


def read_largest(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> LargestValue:
    """The largest pixel value in an image file.

    Raises:
        DataError: as `read_image`.
    """
    data = read_image_bytes(path)
    image, header = open_any(path, data, max_pixels)
    if image is None:
        largest = int(_read_rgb_raster(path, data, header.raster).max())
        return LargestValue(largest, 65535 if header.bits == 16 else 255)
    if header.bits == 16 and header.kind.startswith("PNG "):
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
        deep = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if deep is not None:
            return LargestValue(int(deep.max()), 65535)
    value = int(decode_pixels(path, data, image, header).max())
    if header.bits == 16 and _is_16_bit_grey(image):
        return LargestValue(int(np.asarray(image).max()), 65535)
    return LargestValue(value << 8, 65535) if header.bits == 16 else LargestValue(value, 255)


def size_of_pixels(pixels: NDArray) -> Size:
    return Size(pixels.shape[0], pixels.shape[1])


DATA_SET_ADVICE = " Check data.root, and that the data set is complete."


def read_image_bytes(path: str | Path, *, advice: str = DATA_SET_ADVICE) -> bytes:
    """The content of an image file.

    Args:
        advice: what to do if it is missing, for the message.

    Raises:
        DataError: if it is missing, a folder, or cannot be read.
    """
    try:
        return read_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.{advice}") from None
    except IsADirectoryError:
        raise DataError(f"{path}: this is a folder, an image file was expected.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def open_checked(
    path: str | Path, data: bytes, max_pixels: int, key: str = "data.max_pixels"
) -> tuple[Image.Image, Header]:
    """Open an image with Pillow without decoding it, and check the number of its pixels."""
    if not data:
        raise DataError(f"{path}: the file is empty. Download or copy it again.")
    file = io.BytesIO(data)
    try:
        image = open_image(file)
    except HeaderError as error:
        raise DataError(f"{path}: {error}.") from error
    header = header_of(image, file)
    _check_size(path, header, max_pixels, key)
    return image, header


def open_any(
    path: str | Path, data: bytes, max_pixels: int, key: str = "data.max_pixels"
) -> tuple[Image.Image | None, Header]:
    """As `open_checked`, for rasters too, which Pillow cannot read or misreads: their image is None."""
    try:
        header = read_raster_header(io.BytesIO(data))
    except HeaderError as error:
        raise DataError(f"{path}: {error}.") from None
    if header is None:
        return open_checked(path, data, max_pixels, key)
    _check_size(path, header, max_pixels, key)
    return None, header


def _check_size(path: str | Path, header: Header, max_pixels: int, key: str) -> None:
    height, width = header.stored
    if height * width > max_pixels:
        raise DataError(
            f"{path}: the header declares {height} x {width} pixels, more than the limit {key}={max_pixels}. "
            "Scale or crop the image, or raise the limit."
        )


def decode_pixels(
    path: str | Path, data: bytes, image: Image.Image | None, header: Header, factor: int = 1
) -> NDArray[np.uint8]:
    """Pixels as stored, RGB; those of a JPEG at 1/`factor` of the stored size.

    Args:
        image, header: from `open_any`.
    """
    if image is None:
        return _raster_to_rgb(path, data, header.raster)
    _check_jpeg(path, data)
    check_png(path, data)
    try:
        check_pixels(header)
    except HeaderError as error:
        raise DataError(f"{path}: {error}.") from None
    warn_of_frames(path, header)
    pixels = _decode_by_opencv(path, data, header, factor) if suits_opencv(header) else None
    return _decode_by_pillow(path, image, header) if pixels is None else pixels


def decode_alpha(path: str | Path, image: Image.Image | None, header: Header) -> NDArray[np.uint8] | None:
    """Alpha (H, W) as stored, of a picture whose pixels `decode_pixels` returned; None if it has none.

    Args:
        image, header: from `open_any`.
    """
    if image is None or not header.kind.endswith((" RGBA", " LA", " PA")):
        return None
    try:
        with pillow_without_limit, silence_decoder(image):
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged bytes
        raise DataError(f"{path}: its alpha cannot be decoded ({error}). Download or copy it again.") from error
    if image.format == "TIFF":  # Pillow has applied the orientation already
        alpha = apply_orientation(alpha, _INVERSE_ORIENTATION.get(header.orientation, header.orientation))
    return alpha


def check_rgb_raster(path: str | Path, layout: RasterLayout) -> None:
    """Refuse a raster that is not grey or RGB of 8 or 16 bits.

    Raises:
        DataError: with what it holds and the key that reads it.
    """
    check_layout(path, layout)
    num_bands = layout.num_bands - layout.has_alpha
    if num_bands not in (1, 3):
        first = "red,green,blue," if layout.is_rgb else "first,second,third,"
        listed = f"[{first}...]" if num_bands > 4 else "[red,green,blue,nir]" if num_bands == 4 else "[vv,vh]"
        raise DataError(
            f"{path}: holds {layout.describe()}, and without data.bands images have red, green and blue. To train on "
            f"them, name all, such as data.bands={listed}; null instead of a name leaves a band out. A trained network "
            "takes the bands of its training only."
        )
    if layout.dtype not in ("uint8", "uint16"):
        named = "" if num_bands == 3 else "data.bands=[grey] "
        raise DataError(
            f"{path}: holds {layout.describe()}, which have no white. To train on them, set {named}"
            "data.value_range=[low,high], or auto; mode=check measures it. For a network trained without, convert the "
            "file to 8 or 16 bits."
        )


def _read_rgb_raster(path: str | Path, data: bytes, layout: RasterLayout | None) -> NDArray:
    """(H, W, 1 or 3) of a raster that passes `check_rgb_raster`, without alpha."""
    assert layout is not None, "only rasters have no image of Pillow"
    check_rgb_raster(path, layout)
    return read_raster(path, data, layout)[..., : layout.num_bands - layout.has_alpha]


def _raster_to_rgb(path: str | Path, data: bytes, layout: RasterLayout | None) -> NDArray[np.uint8]:
    pixels = _read_rgb_raster(path, data, layout)
    if layout is not None and layout.has_white_zero:  # as Pillow does with 8 bits
        pixels = np.iinfo(pixels.dtype).max - pixels
    if pixels.dtype == np.uint16:
        pixels = _to_8_bits(pixels, path)
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), np.uint8, order="C")  # writable, as torch expects


def suits_opencv(header: Header) -> bool:
    height, width = header.stored
    is_small = height * width <= _MAX_PIXELS_OPENCV and max(height, width) <= _MAX_SIDE_OPENCV
    return header.kind.startswith(_OPENCV_KINDS) and is_small and not header.has_frames


def _decode_by_opencv(path: str | Path, data: bytes, header: Header, factor: int) -> NDArray[np.uint8] | None:
    """As `decode_pixels`; None if OpenCV fails. Pillow then decodes the file, or reports why it cannot."""
    depth = cv2.IMREAD_ANYDEPTH if header.bits == 16 else 0
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[factor] | cv2.IMREAD_IGNORE_ORIENTATION | depth)
    except cv2.error:
        return None
    if pixels is None or (factor == 1 and size_of_pixels(pixels) != header.stored):
        return None
    if pixels.dtype == np.uint16:
        pixels = _to_8_bits(np.asarray(pixels, np.uint16), path)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels), np.uint8)


def _decode_by_pillow(path: str | Path, image: Image.Image, header: Header) -> NDArray[np.uint8]:
    try:
        with pillow_without_limit, silence_decoder(image):
            pixels = pil_to_rgb(image, path)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged bytes
        raise DataError(
            f"{path}: the {image.format} file is broken and cannot be decoded ({error}). Download or copy it again."
        ) from error
    if image.format == "TIFF":  # Pillow has applied the orientation already
        pixels = apply_orientation(pixels, _INVERSE_ORIENTATION.get(header.orientation, header.orientation))
    if size_of_pixels(pixels) != header.stored:
        raise DataError(
            f"{path}: the header declares {header.stored} (height x width), the pixels are {size_of_pixels(pixels)}."
        )
    return pixels


def pil_to_rgb(image: Image.Image, name: str | Path) -> NDArray[np.uint8]:
    """Pixels of a PIL image of any mode: uint8 (H, W, 3) RGB, 16 bits scaled to 8, alpha dropped.

    Args:
        name: of the image, for messages.

    Raises:
        DataError: for 32-bit pixels, which have no defined white.
    """
    if image.mode in ("I", "F") and not _is_16_bit_grey(image):
        kind = "32-bit float" if image.mode == "F" else "32-bit integer"
        raise DataError(f"{name}: has {kind} pixels, which are not supported. Save it with 8 or 16 bits.")
    if _is_16_bit_grey(image):
        return np.repeat(_to_8_bits(np.asarray(image), name)[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns when it converts these to RGB
        return np.ascontiguousarray(np.asarray(image.convert("RGBA"))[..., :3])
    return np.array(image.convert("RGB"))


def _is_16_bit_grey(image: Image.Image) -> bool:
    """Whether a PIL image has one channel of 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _to_8_bits(pixels: NDArray[np.integer], path: str | Path) -> NDArray[np.uint8]:
    """The high 8 of 16 bits, with a warning, above all for images that become nearly black."""
    largest = int(pixels.max(initial=0))
    way = "Training with data.value_range=[low,high] keeps all bits; mode=check measures it."
    if 0 < largest < _DARK:
        _warn_once(
            "dark",
            f"{path}: its 16-bit values reach {largest} of 65535, which is {largest >> 8} of 255 in 8 bits and nearly "
            f"black. {way}",
        )
    elif largest:
        _warn_once("deep", f"{path}: its 16-bit values are read as 8 bits. {way}")
    return (pixels >> 8).astype(np.uint8)


_warned_kinds: set[str] = set()


def _warn_once(kind: str, message: str) -> None:
    """Warn about the first file of a kind in this process."""
    if kind not in _warned_kinds:
        _warned_kinds.add(kind)
        warnings.warn(message, stacklevel=2)


def warn_of_frames(path: str | Path, header: Header) -> None:
    if header.has_frames:
        _warn_once("frames", f"{path}: contains several frames or pages; only the first is read.")


def silence_decoder(image: Image.Image) -> AbstractContextManager[None]:
    """A context for decoding with Pillow that hides what libtiff prints; Pillow raises an error for it as well."""
    return silent_stderr if image.format == "TIFF" else nullcontext()


def is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _check_jpeg(path: str | Path, data: bytes) -> None:
    if is_jpeg(data) and not _jpeg_is_whole(data):
        raise DataError(
            f"{path}: the JPEG is truncated (no end marker in {len(data)} bytes). Download or copy it again."
        )


def _jpeg_is_whole(data: bytes) -> bool:
    """Whether the end marker FF D9 follows the first scan. Bytes after it (phones append videos) do not matter."""
    if data.endswith(b"\xff\xd9"):
        return True
    position = 2
    # Skip the segments before the scan: a thumbnail in them has an end marker too.
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0xDA:  # start of scan: after it, FF D9 is always the end marker
            return data.find(b"\xff\xd9", position) >= 0
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def check_png(path: str | Path, data: bytes) -> None:
    """Verify the checksums of all chunks of a PNG file, which Pillow does not; other formats pass."""
    if not data.startswith(PNG_START):
        return
    position = len(PNG_START)
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind, end = data[position + 4 : position + 8], position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(memoryview(data)[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise DataError(
                f"{path}: the PNG file is broken (wrong checksum at byte {position}). Download or copy it again."
            )
        if kind == b"IEND":
            return
        position = end + 4
    raise DataError(
        f"{path}: the PNG file is broken (truncated: no end chunk in {len(data)} bytes). Download or copy it again."
    )


# ---- orienting


def apply_orientation(pixels: NDArray, orientation: int) -> NDArray:
    """Pixels (H, W, ...) as stored to pixels as displayed, by EXIF orientation 1..8."""
    if orientation >= 5:  # 5 to 8 exchange rows and columns
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def mirror(pixels: NDArray) -> NDArray:
    """Pixels (H, W, ...) mirrored left to right. Mirror before resizing: a nearest resize does not commute with it.

    Images that are stored as planes, as `resize_image` returns them, stay so.
    """
    planes = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
    if not planes.flags.c_contiguous:
        return cv2.flip(pixels, 1)
    mirrored = cv2.flip(planes.reshape(-1, planes.shape[-1]), 1).reshape(planes.shape)
    return mirrored.transpose(1, 2, 0) if pixels.ndim == 3 else mirrored[0]
