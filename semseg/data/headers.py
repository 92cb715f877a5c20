"""Format, size, orientation and bit depth of an image file, from its header. Decodes no pixels. No torch.

This module isolates what is special about Pillow: it applies the orientation of TIFF files, and only of those, to their
size and pixels; it finds metadata behind the pixels of a PNG only after decoding them; and it has its own limit of
pixels.
"""

from __future__ import annotations

import io
from typing import BinaryIO, NamedTuple

from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from semseg.data.decoders import pillow_without_limit
from semseg.data.geometry import Size
from semseg.data.raster_layout import TIFF_STARTS, LayoutError, RasterLayout, read_layout, read_picture_layout

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "AVIF", "PPM")  # as Pillow names them
SUPPORTED = "Supported are JPEG, PNG, WebP, BMP, TIFF, GIF, JPEG 2000, AVIF and PPM"
PNG_START = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
_LOSSY_TIFF = {  # compression (tag 259) -> name
    6: "JPEG", 7: "JPEG", 33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 34887: "LERC",
    34892: "lossy JPEG", 50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
_OTHER_FORMATS = (  # (offset, bytes at that offset, format), for formats that Pillow does not identify
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
)


class HeaderError(ValueError):
    """Why a file is not read: a predicate for a sentence that begins with the file name."""


class Header(NamedTuple):
    """What the header of an image file says about its pixels."""

    kind: str  # format and mode as Pillow names them: "JPEG RGB", "PNG P", "PNG I;16"; of a raster "TIFF uint16 x 4"
    stored: Size
    orientation: int = 1  # EXIF orientation, 1..8; 1: the stored image is upright
    bits: int = 8  # per channel
    max_value: int = 0  # the value that Pillow scales to the largest of 8 or 16 bits; 0 if it scales nothing
    has_frames: bool = False  # whether there are frames or pages after the first, which is the one that is read
    lossy: str = ""  # name of the compression, if it may change ids
    raster: RasterLayout | None = None  # for files that are no pictures of at most 8 bits, and that Pillow misreads

    @property
    def upright(self) -> Size:
        """The size as displayed, by the EXIF orientation."""
        return Size(*reversed(self.stored)) if self.orientation >= 5 else self.stored


def open_image(file: BinaryIO) -> Image.Image:
    """Open an image without decoding it.

    Raises:
        HeaderError: if it is not an image, or its format is not supported.
    """
    try:
        with pillow_without_limit:
            return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise HeaderError(_reason(file)) from None
    except Exception as error:  # Pillow's parsers raise errors of many types for damaged bytes
        raise HeaderError(f"has a header that cannot be read ({error}). Download or copy it again") from error


def read_raster_header(file: BinaryIO) -> Header | None:
    """The header of a raster; None for pictures, and for everything else.

    Raises:
        HeaderError: for a damaged one.
    """
    try:
        layout = read_layout(file)
    except LayoutError as error:
        raise HeaderError(str(error)) from None
    if layout is None:
        return None
    kind = f"{layout.format} {layout.dtype} x {layout.num_bands}"
    digits = "".join(character for character in layout.dtype if character.isdigit())
    return Header(
        kind, layout.size, layout.orientation, int(digits or 0), has_frames=layout.num_pages > 1, raster=layout
    )


def header_of(image: Image.Image, file: BinaryIO) -> Header:
    """The header of an image that `open_image` opened from `file`, before it is decoded."""
    orientation = _orientation(image, file)
    size = Size(image.height, image.width)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        size = Size(image.tag_v2.get(257, size.height), image.tag_v2.get(256, size.width))
    is_jpeg = image.format in ("JPEG", "MPO")  # images that cameras append to a photo are not frames
    has_frames = bool(getattr(image, "is_animated", False)) and not is_jpeg
    if has_frames and image.format == "TIFF":
        has_frames = _has_full_pages(file)
    kind = f"{'JPEG' if is_jpeg else image.format} {image.mode}"
    bits = _bits(image, file)
    max_value = _ppm_max_value(image) if image.format == "PPM" else 2**bits - 1 if image.mode == "L" and bits < 8 else 0
    return Header(kind, size, orientation, bits, max_value, has_frames, _lossy_codec(image, file))


def _has_full_pages(file: BinaryIO) -> bool:
    """Whether a TIFF of several pages has images behind the first that are neither smaller copies nor masks of it."""
    position = file.tell()
    file.seek(0)
    layout = read_picture_layout(file)
    file.seek(position)
    return layout is None or layout.num_pages > 1


# ---- orientation


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    try:
        if image.format == "PNG":
            late = _late_metadata(file)
            image = Image.open(late, formats=("PNG",)) if late else image
            exif = Image.Image.getexif(image)  # PngImageFile.getexif would decode the pixels first
        else:
            exif = image.getexif()
        value = exif.get(_ORIENTATION, 1)
    except Exception:
        return 1  # damaged EXIF: viewers display the image as stored
    return value if value in range(1, 9) else 1


def _late_metadata(file: BinaryIO) -> BinaryIO | None:
    """A PNG without pixels that has the metadata of `file`, if some of them are stored behind the pixels."""
    position = file.tell()
    kept, has_pixels, is_late = [], False, False
    try:
        file.seek(len(PNG_START))
        while len(start := file.read(8)) == 8 and start[4:] != b"IEND":
            length, kind = int.from_bytes(start[:4], "big"), start[4:]
            has_pixels = has_pixels or kind == b"IDAT"
            if kind not in (b"IHDR", b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                file.seek(length + 4, io.SEEK_CUR)
                continue
            is_late = is_late or has_pixels
            kept.append(start + file.read(length + 4))
    finally:
        file.seek(position)
    empty = b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    return io.BytesIO(PNG_START + b"".join(kept) + empty) if is_late else None


# ---- compression


def _lossy_codec(image: Image.Image, file: BinaryIO) -> str:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _LOSSY_TIFF.get(image.tag_v2.get(259, 1), "")
    if image.format == "WEBP":
        return "lossy WebP" if _is_lossy_webp(file) else ""
    return {"JPEG": "JPEG", "MPO": "JPEG", "JPEG2000": "JPEG 2000", "AVIF": "AVIF"}.get(image.format or "", "")


def _is_lossy_webp(file: BinaryIO) -> bool:
    """Whether the first frame is a chunk "VP8 "; lossless ones are "VP8L"."""
    before, kind = file.tell(), b""
    file.seek(12)
    while kind not in (b"VP8 ", b"VP8L") and len(start := file.read(8)) == 8:
        kind, length = start[:4], int.from_bytes(start[4:], "little")
        # A frame of an animation has a header of 16 bytes before its chunks.
        file.seek(16 if kind == b"ANMF" else length + length % 2, io.SEEK_CUR)
    file.seek(before)
    return kind != b"VP8L"


# ---- depth


def _bits(image: Image.Image, file: BinaryIO) -> int:
    """Bits per channel in the file, which Pillow may scale or truncate to 8; for PPM those of its maximum value."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(258, (1,)))
    if image.format == "PNG":
        position = file.tell()
        file.seek(24)
        bits = file.read(1)[0]
        file.seek(position)
        return bits
    if image.format == "PPM":
        return 32 if image.mode == "F" else max(1, _ppm_max_value(image).bit_length())
    return 16 if image.mode.startswith("I;16") else 1 if image.mode == "1" else 8


def _ppm_max_value(image: Image.Image) -> int:
    tile = getattr(image, "tile", None)
    match tile[0][3] if tile else None:
        case (_, int() as max_value) if image.mode in ("L", "RGB", "I") and max_value > 0:
            return max_value
    return {"1": 1, "I": 65535}.get(image.mode, 255)


# ---- unsupported files


def check_pixels(header: Header) -> None:
    """Reject an image whose pixel type does not define a value for white.

    Raises:
        HeaderError: if pixels are floats, signed, or 32-bit integers.
    """
    if header.kind.endswith(" F"):
        raise HeaderError(_unsupported_pixels(f"{header.bits}-bit float"))
    if header.kind.endswith(" I") and not header.kind.startswith("PPM"):
        raise HeaderError(
            _unsupported_pixels(f"{header.bits}-bit {'integer' if header.bits > 16 else 'signed integer'}")
        )


def _unsupported_pixels(pixels: str) -> str:
    return f"has {pixels} pixels, which are not supported. Save it with 8 or 16 bits"


def _reason(file: BinaryIO) -> str:
    """Why Pillow does not open a file."""
    file.seek(0)
    start = file.read(32)
    if not start:
        return "is an empty file. Download or copy it again"
    if start.startswith(TIFF_STARTS) and (reason := _tiff_reason(file)):
        return reason
    known = next((name for offset, magic, name in _OTHER_FORMATS if start[offset:].startswith(magic)), None)
    if known is None:
        file.seek(0)
        try:
            with pillow_without_limit:
                known = Image.open(file).format
        except Exception:
            known = None
    if known is None or known in FORMATS:
        return f"is not an image in a known format (begins with {start[:16]!r}). {SUPPORTED}"
    return f"is a {known} file, which is not supported. Save it as PNG or JPEG. {SUPPORTED}"


def _tiff_reason(file: BinaryIO) -> str | None:
    """Why Pillow does not open a TIFF; None if it is damaged."""
    try:
        file.seek(0)
        start = file.read(8)
        start += file.read(8) if start[2:4] in (b"+\0", b"\0+") else b""
        tags = TiffImagePlugin.ImageFileDirectory_v2(start)
        file.seek(tags.next)
        tags.load(file)
        bits, formats, channels = max(tags.get(258, (1,))), set(tags.get(339, (1,))), tags.get(277, 1)
    except Exception:
        return None
    if 256 not in tags or 257 not in tags:  # the width and height of every TIFF
        return "is a TIFF file with a truncated or damaged header. Download or copy it again"
    if formats & {3, 6}:
        return _unsupported_pixels(f"{bits}-bit float")
    if bits > 16 or formats & {2, 5}:
        return _unsupported_pixels(f"{bits}-bit {'signed ' if 2 in formats else ''}integer")
    if channels > 4:
        return f"has {channels} channels, but at most 4 are supported. Save the red, green and blue ones as a file"
    return f"is an unsupported kind of TIFF ({channels} channels of {bits} bits, compression {tags.get(259, 1)})"
