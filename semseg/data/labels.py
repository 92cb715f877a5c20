"""Stage 3: from label files to class indices: read, check, resize, subsample.

Arrays: raw label (H, W) with the ids of the file; label int16 (H, W), class index or -1.
"""

from __future__ import annotations

from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semseg.data.decoders import pillow_without_limit
from semseg.data.geometry import Size
from semseg.data.headers import Header
from semseg.data.images import (
    MAX_PIXELS,
    apply_orientation,
    check_png,
    open_any,
    open_checked,
    read_image_bytes,
    silence_decoder,
    size_of_pixels,
    suits_opencv,
    warn_of_frames,
)
from semseg.data.label_cache import LabelCache, LabelRuns
from semseg.data.label_map import IGNORED, ColourIds, LabelMap
from semseg.data.palette import Colour, pack_colours, unpack_colour
from semseg.data.raster_layout import NPY_START
from semseg.data.rasters import read_array
from semseg.errors import DataError

_ID_MODES = frozenset({"1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N"})  # Pillow modes with one number per pixel
_HOW_TO_CONVERT = (
    "Labels are single-channel PNG files of class ids, or PNG files in the colours of a class table in which every "
    "class has its own (data.classes=<CSV file with index,name,R,G,B>)."
)


def read_label(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, colours: ColourIds | None = None
) -> NDArray[np.integer]:
    """Raw ids of a label file: uint8, uint16 or int32 (H, W).

    Palette files give their indices, bilevel files 0 and 1. An RGB file is accepted if red = green = blue everywhere,
    or if `colours` decodes it.

    Args:
        colours: decodes colour-coded labels; None: they are rejected.

    Raises:
        DataError: as `read_image`; if the file has colours that `colours` does not know; if its compression is lossy,
            which changes ids and colours.
    """
    data = read_image_bytes(path)
    if data.startswith(NPY_START):
        return _read_array(path, data, max_pixels)
    image, header = open_checked(path, data, max_pixels)
    if header.lossy:
        raise DataError(
            f"{path}: labels must not be compressed with {header.lossy}, which may change ids. {_HOW_TO_CONVERT}"
        )
    check_png(path, data)
    warn_of_frames(path, header)
    is_colour_coded = colours is not None and colours.always
    if header.kind == "PNG L" and header.bits == 8 and not is_colour_coded and suits_opencv(header):
        # The fast path, for most labels.
        ids = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
        if ids is None:
            raise DataError(f"{path}: the label is broken and cannot be decoded. Download or copy it again.")
        return apply_orientation(np.asarray(ids, np.uint8), header.orientation)
    try:
        with pillow_without_limit, silence_decoder(image):
            raw = np.asarray(image.convert("RGB") if is_colour_coded else image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged bytes
        raise DataError(f"{path}: the label is broken ({error}). Download or copy it again.") from error
    if image.format != "TIFF":  # Pillow has applied the orientation of those
        raw = apply_orientation(raw, header.orientation)
    is_rgb8 = image.mode in ("RGB", "RGBA") and header.bits <= 8
    if colours is not None and (is_colour_coded or (is_rgb8 and (not _is_grey(raw) or colours.explains_grey(raw)))):
        return colours(raw[..., :3], path)
    if is_rgb8:
        raw = _grey_from_rgb(raw, path)
    elif image.mode not in _ID_MODES:
        kind = f"{image.mode!r}" if header.bits <= 8 else f"{image.mode!r} and {header.bits} bits"
        raise DataError(f"{path}: a label with pixels of kind {kind} has no ids. {_HOW_TO_CONVERT}")
    return _undo_stretch(raw, image, header)


class GreyColours(NamedTuple):
    """The levels of the grey colours that have a meaning, and of those the ones that are no ids."""

    colours: Set[int]
    without_id: Set[int]


def has_colours(path: str | Path, greys: GreyColours, *, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether a label is an RGB file of 8 bits coded in colours; False if it cannot be read.

    A file of greys alone is one if all of them are colours, and one of them is no id.
    """
    try:
        data = read_image_bytes(path)
        if data.startswith(NPY_START):
            return False
        image, header = open_checked(path, data, max_pixels)
        if image.mode not in ("RGB", "RGBA") or header.bits > 8:
            return False
        with pillow_without_limit, silence_decoder(image):
            pixels = np.asarray(image)
        if not _is_grey(pixels):
            return True
        levels = set(np.unique(pixels[..., 0]).tolist())
        return levels <= greys.colours and not levels.isdisjoint(greys.without_id)
    except Exception:  # reading it for training says why
        return False


def read_palette(path: str | Path) -> dict[int, Colour]:
    """The colour of each index of a palette file; empty for other files, and for those that cannot be read."""
    with suppress(DataError):
        image, _ = open_checked(path, read_image_bytes(path), MAX_PIXELS)
        if image.mode == "P" and (levels := image.getpalette("RGB")):
            return dict(enumerate(zip(levels[::3], levels[1::3], levels[2::3], strict=True)))
    return {}


def _read_array(path: str | Path, data: bytes, max_pixels: int) -> NDArray[np.integer]:
    """The ids in a NumPy file."""
    _, header = open_any(path, data, max_pixels)
    layout = header.raster
    assert layout is not None, "NumPy files are rasters"
    is_integer = layout.dtype == "bool" or layout.dtype.startswith(("uint", "int"))
    if layout.num_bands != 1 or not is_integer:
        raise DataError(f"{path}: holds {layout.describe()}; a label is (height, width) of integers. {_HOW_TO_CONVERT}")
    return check_id_range(read_array(data)[..., 0], path)


def check_id_range(raw: NDArray, path: str | Path) -> NDArray[np.integer]:
    """Integers or truth values (H, W) of any type as ids: uint8, uint16 or int32.

    Raises:
        DataError: for numbers that int32 does not hold.
    """
    if raw.dtype in (np.uint8, np.uint16):
        return raw
    low, high = int(raw.min()), int(raw.max())
    if not -(2**31) <= low <= high < 2**31:
        raise DataError(f"{path}: holds ids from {low} to {high}, which are no class ids.")
    return raw.astype(np.uint8 if raw.dtype == np.bool_ else np.int32)


def _undo_stretch(raw: NDArray, image: Image.Image, header: Header) -> NDArray[np.integer]:
    """The numbers of a grey file as stored; Pillow may have stretched them to the range of their type.

    Of TIFF files in which 0 is white (tag 262), it has also exchanged black and white, if they have up to 8 bits.
    """
    is_inverted = image.format == "TIFF" and image.mode in ("1", "L") and image.tag_v2.get(262) == 0  # pyright: ignore[reportAttributeAccessIssue]
    if is_inverted:
        raw = ~raw
    if raw.dtype == np.bool_:
        return raw.astype(np.uint8)
    if header.max_value and image.mode in ("L", "I"):
        stretched_to = 255 if raw.dtype == np.uint8 else 65535
        if header.max_value == stretched_to:
            return raw
        return np.round(raw * (header.max_value / stretched_to)).astype(raw.dtype)
    return raw.astype(raw.dtype.newbyteorder("="), copy=False)


def _is_grey(raw: NDArray[np.uint8]) -> bool:
    """Whether red = green = blue everywhere in (H, W, 3 or 4)."""
    return bool((raw[..., :3] == raw[..., :1]).all())


def _grey_from_rgb(raw: NDArray[np.uint8], path: str | Path) -> NDArray[np.uint8]:
    """(H, W, 3 or 4) with red = green = blue to (H, W)."""
    colours = raw[..., :3]
    if _is_grey(raw):
        return np.ascontiguousarray(colours[..., 0])
    unique = np.unique(pack_colours(colours))
    examples = " ".join(str(unpack_colour(code)) for code in unique[:4].tolist())
    raise DataError(f"{path}: the label has {len(unique)} colours, such as {examples}. {_HOW_TO_CONVERT}")


class RawLabel(NamedTuple):
    """A label as stored in its file, with all ids checked."""

    raw: NDArray[np.integer]  # (H, W) raw ids
    label_map: LabelMap
    path: str

    @property
    def size(self) -> Size:
        return size_of_pixels(self.raw)

    def to_array(self) -> NDArray[np.int16]:
        """The label, int16 (H, W): class index, -1 = not scored."""
        return self.label_map(self.raw, self.path)

    def select(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> NDArray[np.int16]:
        """The classes at these rows and columns, int16 (len(rows), len(columns)); only these ids are translated."""
        return self.label_map(self.raw[rows][:, columns], self.path)


class ArrayLabel(NamedTuple):
    """A label whose pixels are class indices already."""

    classes: NDArray[np.int16]  # (H, W), -1 = not scored

    @property
    def size(self) -> Size:
        return size_of_pixels(self.classes)

    def to_array(self) -> NDArray[np.int16]:
        """The label, int16 (H, W)."""
        return self.classes

    def select(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> NDArray[np.int16]:
        """The classes at these rows and columns, int16 (len(rows), len(columns))."""
        return self.classes[rows][:, columns]


Label = RawLabel | LabelRuns | ArrayLabel


def ignore_pixels(label: Label, is_valid: NDArray[np.bool_] | None) -> Label:
    """A label in which only the pixels `is_valid` (H, W) are scored; None: all are."""
    return label if is_valid is None else ArrayLabel(np.where(is_valid, label.to_array(), np.int16(IGNORED)))


def read_class_indices(
    path: str, label_map: LabelMap, *, max_pixels: int = MAX_PIXELS, cache: LabelCache | None = None
) -> Label:
    """The label of a file, which gives class indices for all pixels or for selected rows and columns.

    Args:
        cache: stores labels that were read before.

    Raises:
        DataError: as `read_label`; if an id is neither a class nor ignored.
    """
    entry = None if cache is None else cache.entry_path(path, label_map)
    if cache is not None and entry is not None:
        cached = cache.load(entry)
        if cached is not None and cached.size.height * cached.size.width <= max_pixels:
            return cached
    raw = read_label(path, max_pixels=max_pixels, colours=label_map.colours)
    label_map.check_ids(raw, path)
    label = RawLabel(raw, label_map, path)
    if cache is not None and entry is not None:
        cache.save(entry, label.to_array())
    return label


# ---- resizing


def resize_label(label: NDArray[np.int16], size: Size) -> NDArray[np.int16]:
    """int16 (H, W) to int16 of `size`, nearest: output i reads floor((i + 0.5) * in / out), as Pillow does."""
    # INTER_NEAREST would read floor(i * in / out): 1-2 % of the pixels differ.
    return np.asarray(cv2.resize(label, (size.width, size.height), interpolation=cv2.INTER_NEAREST_EXACT), label.dtype)


def resize_and_subsample_label(label: Label, size: Size, stride: int, *, flip: bool) -> NDArray[np.int16]:
    """`subsample_label(resize_label(label, size), stride)`, of the mirrored label if `flip`, in one step.

    Both steps take the nearest pixel, so that every pixel of the result is a pixel of `label`, and only those are read.
    The padding that `subsample_label` adds at the end is left out.
    """
    rows, columns = (nearest_positions(length, out, stride) for length, out in zip(label.size, size, strict=True))
    return label.select(rows, label.size.width - 1 - columns if flip else columns)


def nearest_positions(length: int, out_length: int, stride: int) -> NDArray[np.int64]:
    """Source positions, of `length`, that output positions `stride` * i + `stride` // 2 < `out_length` read."""
    steps = np.full(out_length, length / out_length)
    steps[0] /= 2  # to the centre of the first pixel
    # Summed one by one, as Pillow and OpenCV do: rounding decides where a sum is a whole number.
    positions = np.add.accumulate(steps)[stride // 2 :: stride]
    return np.minimum(positions.astype(np.int64), length - 1)


def pad_label(inside: NDArray[np.int16], size: Size, stride: int) -> NDArray[np.int16]:
    """A label of ceil(size / stride) with `inside` in its top left corner and -1 elsewhere."""
    strided = np.full([-(-length // stride) for length in size], IGNORED, np.int16)
    strided[: inside.shape[0], : inside.shape[1]] = inside
    return strided


def subsample_label(label: NDArray[np.int16], stride: int) -> NDArray[np.int16]:
    """(H, W) to (ceil(H / stride), ceil(W / stride)): pixel stride * i + stride // 2, or -1 if that lies outside.

    >>> subsample_label(np.arange(7, dtype=np.int16)[None].repeat(2, axis=0), stride=2).tolist()
    [[1, 3, 5, -1]]
    """
    return pad_label(label[stride // 2 :: stride, stride // 2 :: stride], Size(*label.shape), stride)
