"""What an image file says of itself: format, size, orientation, depth. Pixels are not decoded. No torch.

The one place that knows how Pillow counts: its size of a TIFF is the upright one and its pixels of a TIFF are turned
already, which is true of no other format; metadata behind a PNG's pixels appear only once those are decoded; and its
limit of pixels is not ours.
"""

from __future__ import annotations

import io
from typing import BinaryIO, NamedTuple

from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from semseg.data.decoders import pillow_without_limit
from semseg.data.geometry import Size

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "AVIF", "PPM")  # in Pillow's words
READABLE = "JPEG, PNG, WebP, BMP, TIFF, GIF, JPEG 2000, AVIF and PPM files are"
PNG_START = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LOSSY_TIFF = {  # tag 259
    6: "JPEG", 7: "JPEG", 33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 34887: "LERC",
    34892: "lossy JPEG", 50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
_FOREIGN = (  # (place, bytes there, what such a file is), of what Pillow does not know
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
    """Why a file is not read; continues a sentence that begins with its name."""


class Header(NamedTuple):
    """What an image file says of itself before it is decoded."""

    kind: str  # format and mode in Pillow's words: "JPEG RGB", "PNG P", "PNG I;16"
    stored: Size
    orientation: int = 1  # EXIF's, 1..8: how the stored pixels are to be turned; 1: not at all
    bits: int = 8  # of a channel
    white: int = 0  # the value that Pillow stretches to the largest of 8 or 16 bits; 0: it does not
    has_frames: bool = False  # more than the first, which is the one that is read
    lossy: str = ""  # the compression, if ids do not survive it, or may not

    @property
    def upright(self) -> Size:
        """The size as EXIF wants it shown."""
        return Size(*reversed(self.stored)) if self.orientation >= 5 else self.stored


def open_image(file: BinaryIO) -> Image.Image:
    """An image of which nothing is decoded yet.

    Raises:
        HeaderError: if it is no image, or one of a format that is not read.
    """
    try:
        with pillow_without_limit:
            return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise HeaderError(_reason(file)) from None
    except Exception as error:  # what Pillow's parsers run into on damaged bytes has no common type
        raise HeaderError(f"has a header that cannot be read ({error})") from error


def header_of(image: Image.Image, file: BinaryIO) -> Header:
    """The header of an image that `open_image` made of `file`, before it is decoded."""
    orientation = _orientation(image, file)
    size = Size(image.height, image.width)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        size = Size(image.tag_v2.get(257, size.height), image.tag_v2.get(256, size.width))
    is_jpeg = image.format in ("JPEG", "MPO")  # what cameras append to a photo is no frame
    has_frames = bool(getattr(image, "is_animated", False)) and not is_jpeg
    kind = f"{'JPEG' if is_jpeg else image.format} {image.mode}"
    bits = _bits(image, file)
    white = _white_of_ppm(image) if image.format == "PPM" else 2**bits - 1 if image.mode == "L" and bits < 8 else 0
    return Header(kind, size, orientation, bits, white, has_frames, _lossy_codec(image, file))


# ---- orientation


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    try:
        if image.format == "PNG":
            late = _late_metadata(file)
            image = Image.open(late, formats=("PNG",)) if late else image
            exif = Image.Image.getexif(image)  # PngImageFile's decodes the pixels first
        else:
            exif = image.getexif()
        value = exif.get(_ORIENTATION, 1)
    except Exception:
        return 1  # damaged EXIF: every viewer shows such a photo as stored
    return value if value in range(1, 9) else 1


def _late_metadata(file: BinaryIO) -> BinaryIO | None:
    """A PNG of no pixels with the metadata of `file`, if there are any behind its pixels, where Pillow looks last."""
    place = file.tell()
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
        file.seek(place)
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
        # A frame of an animation holds chunks behind 16 bytes of its own.
        file.seek(16 if kind == b"ANMF" else length + length % 2, io.SEEK_CUR)
    file.seek(before)
    return kind != b"VP8L"


# ---- depth


def _bits(image: Image.Image, file: BinaryIO) -> int:
    """Bits of a channel in the file, which Pillow may stretch or cut to 8. PPM: those of its white."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(258, (1,)))
    if image.format == "PNG":
        place = file.tell()
        file.seek(24)
        bits = file.read(1)[0]
        file.seek(place)
        return bits
    if image.format == "PPM":
        return 32 if image.mode == "F" else max(1, _white_of_ppm(image).bit_length())
    return 16 if image.mode.startswith("I;16") else 1 if image.mode == "1" else 8


def _white_of_ppm(image: Image.Image) -> int:
    tile = getattr(image, "tile", None)
    match tile[0][3] if tile else None:
        case (_, int() as white) if image.mode in ("L", "RGB", "I") and white > 0:
            return white
    return {"1": 1, "I": 65535}.get(image.mode, 255)


# ---- why not


def check_pixels(header: Header) -> None:
    """Refuse an image whose pixels have no range that would say what white is.

    Raises:
        HeaderError: if they are floats, signed, or whole numbers of 32 bits.
    """
    if header.kind.endswith(" F"):
        raise HeaderError(_not_read(f"{header.bits}-bit float"))
    if header.kind.endswith(" I") and not header.kind.startswith("PPM"):
        raise HeaderError(_not_read(f"{header.bits}-bit {'integer' if header.bits > 16 else 'signed integer'}"))


def _not_read(pixels: str) -> str:
    return f"has {pixels} pixels, which are not read. Save it with 8 or 16 bits"


def _reason(file: BinaryIO) -> str:
    """Why Pillow finds nothing that is read in a file."""
    file.seek(0)
    start = file.read(32)
    if start.startswith(_TIFF_STARTS) and (reason := _reason_of_tiff(file)):
        return reason
    known = next((name for place, magic, name in _FOREIGN if start[place:].startswith(magic)), None)
    if known is None:
        file.seek(0)
        try:
            with pillow_without_limit:
                known = Image.open(file).format
        except Exception:
            known = None
    if known is None or known in FORMATS:
        return f"is not an image in a known format (begins with {start[:16]!r}). {READABLE} read"
    return f"is a {known} file, which is not read. Save it as PNG or JPEG: {READABLE} read"


def _reason_of_tiff(file: BinaryIO) -> str | None:
    """What a TIFF holds that Pillow does not read; None if it is damaged."""
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
    if formats & {3, 6}:
        return _not_read(f"{bits}-bit float")
    if bits > 16 or formats & {2, 5}:
        return _not_read(f"{bits}-bit {'signed ' if 2 in formats else ''}integer")
    if channels > 4:
        return f"has {channels} channels, of which up to 4 are read. Save the red, green and blue ones as a file"
    return f"is a TIFF of a kind that is not read ({channels} channels of {bits} bits, compression {tags.get(259, 1)})"
