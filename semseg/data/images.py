"""Stage 3: from files to pixels: read, check, orient, flip, resize, thin out the label.

Files are read once into memory and looked at before they are decoded, because decoders forgive too much: OpenCV gives
half a grey image for a truncated JPEG, Pillow gives half a label for a PNG with a wrong checksum, and both
unpack a file of 100 kB to gigabytes.

Arrays: image uint8 (H, W, 3) RGB; raw label (H, W) with the ids of the file; label int16 (H, W), class index or -1.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from semseg.data.decoders import pillow_without_limit, silent_stderr
from semseg.data.geometry import Size
from semseg.data.headers import (
    PNG_START,
    Header,
    HeaderError,
    check_pixels,
    header_of,
    open_image,
)
from semseg.data.label_cache import LabelCache, Runs
from semseg.data.label_map import IGNORED, ColourIds, LabelMap
from semseg.data.records import Record
from semseg.data.store import read_file
from semseg.errors import DataError

# Images are decoded side by side in the workers of a loader: threads within one image only get in each other's way,
# and OpenCV's pool of threads does not survive the fork of a worker.
cv2.setNumThreads(0)
# Why a file cannot be decoded is in our own sentence, not in lines of OpenCV's on standard error.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# Larger images are refused by their header: 134 Mpixel are more than any camera gives and 400 MB as RGB.
MAX_PIXELS = 2**27

_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
# OpenCV decodes these fast and as Pillow does; Pillow reads the rest.
_FOR_OPENCV = ("JPEG ", "PNG ", "WEBP ")
_MOST_FOR_OPENCV = 2**30  # pixels
_LONGEST_FOR_OPENCV = 10**6  # pixels of a side
_DARK = 2**14  # 16-bit values that stay below are a fraction of the range
_INVERSE = {6: 8, 8: 6}  # of EXIF orientations; the others are their own
_ID_MODES = frozenset({"1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N"})  # Pillow modes with one number a pixel
_HOW_TO_CONVERT = (
    "Labels are single-channel PNG files whose numbers are the class ids: look up the id of each colour and save the "
    "array of ids with PIL.Image.fromarray(ids.astype('uint8')).save('x.png')."
)


class Pair(NamedTuple):
    """An image and its label on the same pixel grid."""

    image: NDArray[np.uint8]  # (H, W, 3) RGB
    label: NDArray[np.int16] | None  # (H, W) class index, -1 = not scored; None: the record has none


# ---- reading


def read_image(path: str | Path, *, upright: bool = False, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Pixels of an image file: uint8 (H, W, 3) RGB, on the grid as stored, or turned as EXIF says if `upright`.

    Grey, palette and CMYK become RGB, alpha is dropped, 16 bits are scaled to 8.

    Raises:
        DataError: if the file is missing, empty, a folder, no image, broken, or larger than `max_pixels`.
    """
    return decode_image(_read_bytes(path), path, upright=upright, max_pixels=max_pixels)


def decode_image(
    data: bytes,
    name: str | Path,
    *,
    upright: bool = False,
    max_pixels: int = MAX_PIXELS,
    key: str = "data.max_pixels",
) -> NDArray[np.uint8]:
    """As `read_image`, of a file's bytes; `name` is what the file is called in errors, and `key` the limit.

    Raises:
        DataError: if the bytes are empty, no image, broken, or announce more than `max_pixels`.
    """
    image, header = _open(name, data, max_pixels, key)
    pixels = _decode(name, data, image, header)
    return oriented(pixels, header.orientation) if upright else pixels


def read_label(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, colours: ColourIds | None = None
) -> NDArray[np.integer]:
    """Raw ids of a label file: uint8, uint16 or int32 (H, W).

    Palette files give their indices, two-level files 0 and 1. A colour file is taken if red = green = blue everywhere.

    Args:
        colours: the ids that colours stand for; None: there are none.

    Raises:
        DataError: as `read_image`; if the file is coded in colours that `colours` does not know; if it is a JPEG, in
            which ids and colours are lost.
    """
    data = _read_bytes(path)
    image, header = _open(path, data, max_pixels)
    if header.lossy:
        raise DataError(
            f"{path}: a label must not be compressed by {header.lossy}, which may change ids. {_HOW_TO_CONVERT}"
        )
    _check_png(path, data)
    _tell_of_frames(path, header)
    in_colours = colours is not None and colours.always
    if header.kind == "PNG L" and header.bits == 8 and not in_colours and _suits_opencv(header):
        # Most labels, and the fast way.
        ids = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
        if ids is None:
            raise DataError(f"{path}: the label is broken and cannot be decoded. Get the file again.")
        return oriented(np.asarray(ids, np.uint8), header.orientation)
    try:
        with pillow_without_limit, _quiet(image):
            raw = np.asarray(image.convert("RGB") if in_colours else image)
    except Exception as error:  # what Pillow's decoders run into on damaged bytes has no common type
        raise DataError(f"{path}: the label is broken ({error}). Get the file again.") from error
    if image.format != "TIFF":  # Pillow has turned those
        raw = oriented(raw, header.orientation)
    is_rgb8 = image.mode in ("RGB", "RGBA") and header.bits <= 8
    if colours is not None and (in_colours or (is_rgb8 and not _is_grey(raw))):
        return colours(raw[..., :3], path)
    if is_rgb8:
        raw = _grey_of(raw, path)
    elif image.mode not in _ID_MODES:
        kind = f"{image.mode!r}" if header.bits <= 8 else f"{image.mode!r} and {header.bits} bits"
        raise DataError(f"{path}: a label with pixels of kind {kind} has no ids. {_HOW_TO_CONVERT}")
    return _as_stored(raw, image, header)


def _as_stored(raw: NDArray, image: Image.Image, header: Header) -> NDArray[np.integer]:
    """The numbers in a file of grey pixels, where Pillow has stretched them to the range of their type."""
    if raw.dtype == np.bool_:
        return raw.astype(np.uint8)
    if header.white and image.mode in ("L", "I"):
        stretched_to = 255 if raw.dtype == np.uint8 else 65535
        return raw if header.white == stretched_to else np.round(raw * (header.white / stretched_to)).astype(raw.dtype)
    return raw.astype(raw.dtype.newbyteorder("="), copy=False)


def read_header(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Header:
    """The header of an image file that is whole, as far as that can be told without decoding it.

    Raises:
        DataError: as `read_image`.
    """
    data = _read_bytes(path)
    _, header = _open(path, data, max_pixels)
    _check_jpeg(path, data)
    _check_png(path, data)
    return header


class Largest(NamedTuple):
    """The largest value of the pixels of an image, alpha aside."""

    value: int
    white: int  # the largest that its depth has: 255 or 65535


def read_largest(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Largest:
    """The largest value in an image file.

    Raises:
        DataError: as `read_image`.
    """
    data = _read_bytes(path)
    image, header = _open(path, data, max_pixels)
    if header.bits == 16 and header.kind.startswith("PNG "):
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
        deep = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if deep is not None:
            return Largest(int(deep.max()), 65535)
    value = int(_decode(path, data, image, header).max())
    if header.bits == 16 and _is_deep(image):
        return Largest(int(np.asarray(image).max()), 65535)
    return Largest(value << 8, 65535) if header.bits == 16 else Largest(value, 255)


class RawLabel(NamedTuple):
    """A label as its file holds it, every id of it known."""

    raw: NDArray[np.integer]  # (H, W) ids of the file
    label_map: LabelMap
    path: str

    @property
    def size(self) -> Size:
        return _size(self.raw)

    def whole(self) -> NDArray[np.int16]:
        """The label, int16 (H, W): class index, -1 = not scored."""
        return self.label_map(self.raw, self.path)

    def at(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> NDArray[np.int16]:
        """What stands in these rows and columns, int16 (len(rows), len(columns)); no other id is translated."""
        return self.label_map(self.raw[rows][:, columns], self.path)


Label = RawLabel | Runs


def read_classes(
    path: str, label_map: LabelMap, *, max_pixels: int = MAX_PIXELS, cache: LabelCache | None = None
) -> Label:
    """The label of a file, to have as class indices as a whole or in places.

    Args:
        cache: where labels are kept once they were read; made with `label_map`.

    Raises:
        DataError: as `read_label`; if an id is neither a class nor ignored.
    """
    place = None if cache is None else cache.place(path)
    if cache is not None and place is not None:
        kept = cache.get(place)
        if kept is not None and kept.size.height * kept.size.width <= max_pixels:
            return kept
    raw = read_label(path, max_pixels=max_pixels, colours=label_map.colours)
    label_map.check_ids(raw, path)
    label = RawLabel(raw, label_map, path)
    if cache is not None and place is not None:
        cache.put(place, label.whole())
    return label


class Thumbnail(NamedTuple):
    """An image that was decoded at a reduced size, and its label at full size, on grids that correspond."""

    image: NDArray[np.uint8]  # (h, w, 3) RGB; a JPEG that is much larger than what was asked for is a fraction of H, W
    label: Label  # of H, W


def read_reduced(
    record: Record,
    wanted: Callable[[Size], Size],
    label_map: LabelMap,
    *,
    max_pixels: int = MAX_PIXELS,
    cache: LabelCache | None = None,
) -> Thumbnail:
    """The image of a record and its label for training, with no more pixels of the image decoded than needed.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is still at least `wanted` (of the full size): its
    decoder averages blocks of pixels, which is most of what an antialiased resize would do.

    Raises:
        DataError: as `read_pair`.
    """
    assert record.label is not None, "a record to train on has a label"
    try:
        label = read_classes(record.label, label_map, max_pixels=max_pixels, cache=cache)
        full = label.size
        data = _read_bytes(record.image)
        image, header = _open(record.image, data, max_pixels)
        factor = reduction(full, wanted(full)) if _is_jpeg(data) else 1
        pixels = _decode(record.image, data, image, header, factor)
        stored, is_upright = header.stored, _reads_upright(record, header, full)
        if record.size not in (stored, full):
            raise DataError(wrong_size(record, full))
    except DataError as error:
        raise DataError(f"{record.origin}: {error}") from error
    return Thumbnail(oriented(pixels, header.orientation) if is_upright else pixels, label)


def reduction(full: Size, target: Size) -> int:
    """By how much a JPEG can be reduced while it is decoded and still be at least as large as `target`.

    >>> reduction(Size(1200, 1600), Size(450, 600)), reduction(Size(1200, 1600), Size(150, 200))
    (2, 8)
    """
    fits = (
        factor for factor in (8, 4, 2) if full.height >= factor * target.height and full.width >= factor * target.width
    )
    return next(fits, 1)


def read_pair(
    record: Record, label_map: LabelMap | None, *, max_pixels: int = MAX_PIXELS, cache: LabelCache | None = None
) -> Pair:
    """The image of a record and its label, on one grid.

    A photo may carry an EXIF orientation. Which grid its label was drawn on shows in the label's size; where both have
    one size, `record.is_upright` says it. Without a label or `label_map` the image is upright.

    Raises:
        DataError: as the readers; if image and label differ in size; if the size in the list is not the file's. Begins
            with the record's origin.
    """
    try:
        data = _read_bytes(record.image)
        image, header = _open(record.image, data, max_pixels)
        pixels = _decode(record.image, data, image, header)
        if record.label is None or label_map is None:
            label, is_upright = None, True
        else:
            label = read_classes(record.label, label_map, max_pixels=max_pixels, cache=cache).whole()
            is_upright = _reads_upright(record, header, _size(label))
        pair = Pair(oriented(pixels, header.orientation) if is_upright else pixels, label)
        if record.size not in (header.stored, _size(pair.image)):
            raise DataError(wrong_size(record, _size(pair.image)))
    except DataError as error:
        raise DataError(f"{record.origin}: {error}") from error
    return pair


def _reads_upright(record: Record, header: Header, label: Size) -> bool:
    """Whether an image is to be turned upright to lie on its label.

    Raises:
        DataError: if the label has neither size.
    """
    if label not in (header.stored, header.upright):
        raise DataError(
            f"image and label differ in size: {record.image} is {header.stored}, {record.label} is {label} "
            "(height x width). They must be drawn on the same pixels."
        )
    return record.is_upright if header.stored == header.upright else label == header.upright


def wrong_size(record: Record, found: Size) -> str:
    return (
        f"{record.image}: the list says {record.size} (height x width), the file is {found}. "
        "Write the list again from the files."
    )


def _size(pixels: NDArray) -> Size:
    return Size(pixels.shape[0], pixels.shape[1])


def _read_bytes(path: str | Path) -> bytes:
    try:
        return read_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file. Is data.root right, and the data set complete?") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, an image file was expected.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _open(path: str | Path, data: bytes, max_pixels: int, key: str = "data.max_pixels") -> tuple[Image.Image, Header]:
    """An image of which nothing is decoded, with the number of its pixels checked."""
    if not data:
        raise DataError(f"{path}: the file is empty. Get it again.")
    file = io.BytesIO(data)
    try:
        image = open_image(file)
    except HeaderError as error:
        raise DataError(f"{path}: {error}.") from error
    header = header_of(image, file)
    height, width = header.stored
    if height * width > max_pixels:
        raise DataError(
            f"{path}: the header announces {height} x {width} pixels, more than {max_pixels} are not read ({key}). "
            "Scale or cut the image, or raise the limit."
        )
    return image, header


def _decode(path: str | Path, data: bytes, image: Image.Image, header: Header, factor: int = 1) -> NDArray[np.uint8]:
    """Pixels on the stored grid, or a JPEG's at 1/`factor` of it."""
    _check_jpeg(path, data)
    _check_png(path, data)
    try:
        check_pixels(header)
    except HeaderError as error:
        raise DataError(f"{path}: {error}.") from None
    _tell_of_frames(path, header)
    pixels = _decode_by_opencv(path, data, header, factor) if _suits_opencv(header) else None
    return _decode_by_pillow(path, image, header) if pixels is None else pixels


def _suits_opencv(header: Header) -> bool:
    height, width = header.stored
    is_small = height * width <= _MOST_FOR_OPENCV and max(height, width) <= _LONGEST_FOR_OPENCV
    return header.kind.startswith(_FOR_OPENCV) and is_small and not header.has_frames


def _decode_by_opencv(path: str | Path, data: bytes, header: Header, factor: int) -> NDArray[np.uint8] | None:
    """As `_decode`; None if OpenCV cannot: then Pillow does, or says why."""
    depth = cv2.IMREAD_ANYDEPTH if header.bits == 16 else 0
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[factor] | cv2.IMREAD_IGNORE_ORIENTATION | depth)
    except cv2.error:
        return None
    if pixels is None or (factor == 1 and _size(pixels) != header.stored):
        return None
    if pixels.dtype == np.uint16:
        pixels = _eight_bits(np.asarray(pixels, np.uint16), path)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels), np.uint8)


def _decode_by_pillow(path: str | Path, image: Image.Image, header: Header) -> NDArray[np.uint8]:
    try:
        with pillow_without_limit, _quiet(image):
            pixels = rgb_of(image, path)
    except DataError:
        raise
    except Exception as error:  # what Pillow's decoders run into on damaged bytes has no common type
        raise DataError(
            f"{path}: the {image.format} file is broken and cannot be decoded ({error}). Get it again."
        ) from error
    if image.format == "TIFF":  # Pillow has turned it already
        pixels = oriented(pixels, _INVERSE.get(header.orientation, header.orientation))
    if _size(pixels) != header.stored:
        raise DataError(f"{path}: the header says {header.stored} (height x width), its pixels are {_size(pixels)}.")
    return pixels


def rgb_of(image: Image.Image, name: str | Path) -> NDArray[np.uint8]:
    """Pixels of a PIL image, of any mode: uint8 (H, W, 3) RGB, 16 bits scaled to 8, alpha dropped.

    Raises:
        DataError: for pixels that have no range; `name` is what the image is called there.
    """
    if image.mode in ("I", "F") and not _is_deep(image):
        kind = "32-bit float" if image.mode == "F" else "32-bit integer"
        raise DataError(f"{name}: has {kind} pixels, which are not read. Save it with 8 or 16 bits.")
    if _is_deep(image):
        return np.repeat(_eight_bits(np.asarray(image), name)[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:  # to RGB, Pillow warns of what is wanted here
        return np.ascontiguousarray(np.asarray(image.convert("RGBA"))[..., :3])
    return np.array(image.convert("RGB"))


def _is_deep(image: Image.Image) -> bool:
    """Whether a PIL image has one channel of 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _eight_bits(pixels: NDArray[np.integer], path: str | Path) -> NDArray[np.uint8]:
    """The high 8 of 16 bits."""
    largest = int(pixels.max(initial=0))
    if 0 < largest < _DARK:
        _tell_once(
            "dark",
            f"{path}: its 16-bit values reach {largest} of 65535, which is {largest >> 8} of 255 in 8 bits and nearly "
            "black. Scale such images to the whole range; mode=check counts them.",
        )
    return (pixels >> 8).astype(np.uint8)


_told: set[str] = set()


def _tell_once(kind: str, sentence: str) -> None:
    """Warn of the first file of a kind in this process."""
    if kind not in _told:
        _told.add(kind)
        warnings.warn(sentence, stacklevel=2)


def _tell_of_frames(path: str | Path, header: Header) -> None:
    if header.has_frames:
        _tell_once("frames", f"{path}: holds several frames or pages, of which the first is read.")


def _quiet(image: Image.Image) -> AbstractContextManager[None]:
    """For decoding with Pillow: it raises an error for what libtiff prints of a damaged file."""
    return silent_stderr if image.format == "TIFF" else nullcontext()


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _check_jpeg(path: str | Path, data: bytes) -> None:
    if _is_jpeg(data) and not _jpeg_is_whole(data):
        raise DataError(f"{path}: the JPEG is truncated (no end marker in {len(data)} bytes). Get it again.")


def _jpeg_is_whole(data: bytes) -> bool:
    """Whether the end marker FF D9 follows the first scan. Bytes after it (phones append films) do not matter."""
    if data.endswith(b"\xff\xd9"):
        return True
    place = 2
    # Walk over the segments before the scan: a thumbnail in them has an end marker of its own.
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker == 0xDA:  # start of scan: from here on FF D9 cannot be anything else
            return data.find(b"\xff\xd9", place) >= 0
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def _check_png(path: str | Path, data: bytes) -> None:
    """Checksums of all chunks of a PNG file, which Pillow does not look at; other formats pass."""
    if not data.startswith(PNG_START):
        return
    place = len(PNG_START)
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        kind, end = data[place + 4 : place + 8], place + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(memoryview(data)[place + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise DataError(f"{path}: the PNG file is broken (wrong checksum at byte {place}). Get it again.")
        if kind == b"IEND":
            return
        place = end + 4
    raise DataError(f"{path}: the PNG file is broken (truncated: no end in {len(data)} bytes). Get it again.")


def _is_grey(raw: NDArray[np.uint8]) -> bool:
    """Whether red = green = blue everywhere in (H, W, 3 or 4)."""
    return bool((raw[..., :3] == raw[..., :1]).all())


def _grey_of(raw: NDArray[np.uint8], path: str | Path) -> NDArray[np.uint8]:
    """(H, W, 3 or 4) with equal colours to (H, W)."""
    colours = raw[..., :3]
    if _is_grey(raw):
        return np.ascontiguousarray(colours[..., 0])
    packed = colours.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    found = np.unique(packed)
    shown = " ".join(f"({code >> 16}, {code >> 8 & 255}, {code & 255})" for code in found[:4].tolist())
    raise DataError(f"{path}: the label is coded by {len(found)} colours, such as {shown}. {_HOW_TO_CONVERT}")


# ---- turning and resizing


def oriented(pixels: NDArray, orientation: int) -> NDArray:
    """Pixels (H, W, ...) turned as EXIF orientation 1..8 says that they shall be seen."""
    if orientation >= 5:  # 5 to 8 exchange rows and columns
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def flipped(pixels: NDArray) -> NDArray:
    """Pixels (H, W, ...) mirrored left and right. Before a resize: a nearest resize does not commute with it.

    What lies in memory as planes, as `resize_image` leaves it, stays so.
    """
    planes = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
    if not planes.flags.c_contiguous:
        return cv2.flip(pixels, 1)
    mirrored = cv2.flip(planes.reshape(-1, planes.shape[-1]), 1).reshape(planes.shape)
    return mirrored.transpose(1, 2, 0) if pixels.ndim == 3 else mirrored[0]


def resize_image(image: NDArray[np.uint8], size: Size, *, antialias: bool, fast: bool = False) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) to uint8 (size, 3), bilinear.

    fast: enlarge with OpenCV, whose rounding differs by a grey level now and then.

    antialias=True averages over the source pixels when shrinking, within one grey level of Pillow (training, and
    evaluation since 2020); False is the 2018 evaluation, exactly.
    """
    if image.shape[:2] == size:
        return image
    if not antialias or (fast and size.height >= image.shape[0] and size.width >= image.shape[1]):
        return np.asarray(cv2.resize(image, (size.width, size.height), interpolation=cv2.INTER_LINEAR), np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W), a view: channels_last is the fast path
    resized = F.interpolate(planes, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()  # planes in memory, as a batch has them: see `flipped`, `collate`


def resize_label(label: NDArray[np.int16], size: Size) -> NDArray[np.int16]:
    """int16 (H, W) to int16 of `size`, nearest: output i reads floor((i + 0.5) * in / out), as Pillow does."""
    # Not INTER_NEAREST, which reads floor(i * in / out): 1-2 % of the pixels differ.
    return np.asarray(cv2.resize(label, (size.width, size.height), interpolation=cv2.INTER_NEAREST_EXACT), label.dtype)


def scaled_label(label: Label, size: Size, stride: int, *, flip: bool) -> NDArray[np.int16]:
    """resize_label(label, size), of the mirrored label if `flip`, and of that every `stride`-th pixel: `stride_label`.

    Both resizes are by nearest pixel, so each pixel of the answer is one of `label`: only those are looked at. Pixels
    that `stride_label` adds beyond the end are not there.
    """
    rows, columns = (nearest_places(length, out, stride) for length, out in zip(label.size, size, strict=True))
    return label.at(rows, label.size.width - 1 - columns if flip else columns)


def nearest_places(length: int, out_length: int, stride: int) -> NDArray[np.int64]:
    """Which of `length` places each place `stride` * i + `stride` // 2 of `out_length` reads, those inside alone."""
    steps = np.full(out_length, length / out_length)
    steps[0] /= 2  # to the middle of the first place
    # Added up one by one, as Pillow and OpenCV do: where a sum is a whole number, rounding decides.
    places = np.add.accumulate(steps)[stride // 2 :: stride]
    return np.minimum(places.astype(np.int64), length - 1)


def padded_label(inside: NDArray[np.int16], size: Size, stride: int) -> NDArray[np.int16]:
    """`inside` in the top left corner of (ceil(size / stride)), -1 elsewhere."""
    strided = np.full([-(-length // stride) for length in size], IGNORED, np.int16)
    strided[: inside.shape[0], : inside.shape[1]] = inside
    return strided


def stride_label(label: NDArray[np.int16], stride: int) -> NDArray[np.int16]:
    """(H, W) to (ceil(H / stride), ceil(W / stride)): pixel stride * i + stride // 2, or -1 where that lies outside.

    >>> stride_label(np.arange(7, dtype=np.int16)[None].repeat(2, axis=0), stride=2).tolist()
    [[1, 3, 5, -1]]
    """
    return padded_label(label[stride // 2 :: stride, stride // 2 :: stride], Size(*label.shape), stride)
