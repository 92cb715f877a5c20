"""What users call a picture, as uint8 RGB pixels: a file, a PIL image, an array or a tensor. Upright, without alpha."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from semseg.config.preprocessing import PIXEL_TYPES
from semseg.data.band_images import BandImage, find_empty, read_bands
from semseg.data.bands import BandOptions
from semseg.data.images import MAX_PIXELS, decode_image, pil_to_rgb, read_image_bytes
from semseg.data.rasters import as_bands
from semseg.data.store import resolve_path
from semseg.errors import ArgumentError, DataError
from semseg.reports.draw import Pixels

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor

# How to make uint8 of other types, by the first letter of the type.
CONVERSIONS = {"f": "Multiply values from 0 to 1 by 255, and round them.", "u": "Divide 16-bit values by 257."}


def convert_to_pixels(picture: Picture, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Convert a picture to (H, W, 3) uint8 RGB that shares no memory with it; see `Predictor.predict`.

    Raises:
        DataError: if a file is missing, broken, not an image, or larger than `max_pixels`.
        ArgumentError: if `picture` is of another type, shape or dtype.
    """
    check_handle(picture)
    if isinstance(picture, str | os.PathLike):
        return read_picture(picture, max_pixels)
    if isinstance(picture, Image.Image):
        return convert_pil_image(picture, max_pixels)
    if isinstance(picture, Tensor):
        return convert_tensor(picture)
    if isinstance(picture, np.ndarray):
        return convert_array(picture)
    several = ". Predict them one by one: [net.predict(each) for each in pictures]"
    raise ArgumentError(
        f"a picture is a path, a PIL image, a NumPy array or a tensor, not {type(picture).__name__}"
        f"{several if isinstance(picture, list | tuple) else ''}."
    )


def convert_to_bands(
    picture: Picture | NDArray[Any], bands: BandOptions, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray, NDArray[np.bool_] | None]:
    """Convert what has other bands than 8-bit RGB to (H, W, bands); see `Predictor.predict`.

    Returns:
        The pixels, and (H, W) where any band has a value; None: everywhere.

    Raises:
        DataError: if a file is missing, broken, does not hold the bands, or is larger than `max_pixels`.
        ArgumentError: if `picture` is of another type, shape or dtype.
    """
    check_handle(picture)
    if isinstance(picture, str | os.PathLike):
        read = read_band_picture(picture, bands, max_pixels)
        return read.pixels, read.is_valid
    if isinstance(picture, Image.Image):
        upright = ImageOps.exif_transpose(picture)
        is_array = upright.mode in ("L", "LA", "RGB", "RGBA", "I", "F") or upright.mode.startswith("I;16")
        array = np.asarray(upright if is_array else upright.convert("L" if upright.mode == "1" else "RGB"))
    elif isinstance(picture, Tensor):
        _refuse_type(str(picture.dtype).removeprefix("torch."))
        array = picture.detach().cpu().numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    elif isinstance(picture, np.ndarray):
        array = picture
    else:
        return convert_to_pixels(picture), None  # which says what a picture is
    array, count = as_bands(array) if array.ndim == 2 else array, len(bands.names)
    refuse_empty(array)
    if array.ndim != 3 or array.shape[2] != count:
        order = "(bands, H, W)" if isinstance(picture, Tensor) else "(H, W, bands)"
        raise ArgumentError(
            f"a picture must be {order} with {count} bands, {', '.join(bands.names)}, not "
            f"{tuple(picture.shape) if isinstance(picture, Tensor) else array.shape}."
        )
    _refuse_type(array.dtype.name)
    try:
        bands.check_type(array.dtype, "the picture")
    except DataError as error:
        raise ArgumentError(str(error)) from None
    is_missing = find_empty(array, None)
    filled = array if is_missing is None else np.where(is_missing, bands.fill_values(array.dtype), array)
    is_valid = None if is_missing is None else np.asarray(~is_missing.all(axis=2))
    return np.array(filled, array.dtype.newbyteorder("="), order="C"), is_valid


def check_handle(picture: object) -> None:
    """Refuse texts that are no path, and tensors without numbers in memory.

    Raises:
        ArgumentError: with what it is.
    """
    if isinstance(picture, str) and (not picture or "\0" in picture):
        raise ArgumentError(f"{picture!r}: is no path of a picture.")
    if isinstance(picture, Tensor) and (picture.is_meta or picture.layout != torch.strided):
        kind = "one of the device meta, which has no numbers" if picture.is_meta else f"of layout {picture.layout}"
        raise ArgumentError(f"a tensor must hold its numbers one after the other, and not be {kind}.")


def _refuse_type(name: str) -> None:
    """Refuse numbers of a type that no file of an image holds."""
    if name not in PIXEL_TYPES:
        raise ArgumentError(f"a picture must be one of {', '.join(PIXEL_TYPES)}, not {name}. Convert it.")


def read_band_picture(
    path: str | os.PathLike[str], bands: BandOptions, max_pixels: int, *, key: str = "max_pixels"
) -> BandImage:
    """As `read_picture`, for images with other bands than 8-bit RGB."""
    if "://" in str(path):
        raise DataError(f"{path}: URLs are not supported. Download the file and give its path.")
    found = resolve_path(os.fspath(path))
    return read_bands(found, bands, max_pixels, key=key, advice="").turn_upright()


def read_picture(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, *, key: str = "max_pixels") -> Pixels:
    """Read an image file, turned upright.

    Args:
        key: name of `max_pixels`, for messages.

    Raises:
        DataError: if it is missing, broken, not an image, or larger than `max_pixels`.
    """
    if "://" in str(path):
        raise DataError(f"{path}: URLs are not supported. Download the file and give its path.")
    found = resolve_path(os.fspath(path))
    return decode_image(read_image_bytes(found, advice=""), found, upright=True, max_pixels=max_pixels, key=key)


def convert_pil_image(image: Image.Image, max_pixels: int) -> Pixels:
    """Convert a PIL image to (H, W, 3) uint8 RGB, turned upright; the image itself is not changed."""
    if image.width * image.height > max_pixels:
        raise DataError(
            f"the PIL image has {image.height} x {image.width} pixels, more than the limit "
            f"max_pixels={max_pixels}. Resize it, or raise the limit."
        )
    try:
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format  # defines the range of mode I
        return pil_to_rgb(upright, "the PIL image")
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow decodes lazily, and its errors have no common type
        raise DataError(f"the PIL image cannot be decoded ({error}).") from error


def convert_array(array: NDArray[Any]) -> Pixels:
    """Convert (H, W, 3) RGB, (H, W, 4) RGBA, or grey (H, W) or (H, W, 1), all uint8, to (H, W, 3) uint8."""
    refuse_empty(array)
    if array.dtype != np.uint8:
        raise ArgumentError(
            f"an array must be uint8, 0 to 255, not {array.dtype}.{advise_conversion(array.dtype.kind)}"
        )
    if not is_channels_last(array):
        is_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        raise ArgumentError(
            f"an array must be (H, W, 3), (H, W, 4) or (H, W), not {tuple(array.shape)}."
            f"{' Use array.transpose(1, 2, 0).' if is_first else ''}{advise_batch(array)}"
        )
    return copy_as_rgb(array)


def convert_tensor(tensor: Tensor) -> Pixels:
    """Convert (3, H, W) RGB, (4, H, W) RGBA, or grey (H, W) or (1, H, W), all uint8, to (H, W, 3) uint8."""
    refuse_empty(tensor)
    if tensor.dtype != torch.uint8:
        kind = "f" if tensor.dtype.is_floating_point else ""
        raise ArgumentError(f"a tensor must be uint8, 0 to 255, not {tensor.dtype}.{advise_conversion(kind)}")
    array = (tensor.permute(1, 2, 0) if tensor.ndim == 3 else tensor).detach().cpu().numpy()
    if not is_channels_last(array):
        is_last = tensor.ndim == 3 and tensor.shape[2] in (1, 3, 4)
        raise ArgumentError(
            f"a tensor must be (3, H, W), (4, H, W), (1, H, W) or (H, W), not {tuple(tensor.shape)}."
            f"{' Use tensor.permute(2, 0, 1).' if is_last else ''}{advise_batch(tensor)}"
        )
    return copy_as_rgb(array)


def is_channels_last(array: NDArray[Any]) -> bool:
    """Whether the shape is (H, W), or (H, W, C) with channels of grey, RGB or RGBA."""
    return array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))


def copy_as_rgb(array: NDArray[np.uint8]) -> Pixels:
    """A copy of grey, RGB or RGBA pixels as (H, W, 3): writable, and unchanged when the caller reuses its memory."""
    channels = array[..., None] if array.ndim == 2 else array[..., :3]
    return np.array(np.broadcast_to(channels, (*array.shape[:2], 3)), order="C")


def refuse_empty(picture: NDArray[Any] | Tensor) -> None:
    """Refuse arrays and tensors without pixels.

    Raises:
        ArgumentError: with the shape.
    """
    if 0 in picture.shape:
        raise ArgumentError(f"the picture has no pixels: its shape is {tuple(picture.shape)}.")


def advise_conversion(kind: str) -> str:
    """How to convert numbers of another kind to uint8: a sentence after a space, or nothing."""
    return f" {CONVERSIONS[kind]}" if kind in CONVERSIONS else ""


def advise_batch(pictures: NDArray[Any] | Tensor) -> str:
    """What to do with a batch: a sentence after a space, or nothing."""
    return " Predict the pictures of a batch one by one." if pictures.ndim == 4 else ""
