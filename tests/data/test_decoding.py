"""Every format, mode, depth and orientation gives Pillow's upright pixels, or a sentence with the true reason."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from semseg.data import images as images_module
from semseg.data.header_cache import read_header_only
from semseg.data.images import apply_orientation, decode_image, read_header, read_image
from semseg.data.labels import read_label
from semseg.errors import DataError
from semseg.prediction.predictor import convert_to_pixels

pytestmark = pytest.mark.reliability

FORMATS: dict[str, tuple[dict[str, Any], ...]] = {  # format -> options of saving
    "JPEG": ({"quality": 95}, {"quality": 95, "progressive": True}),
    "PNG": ({},),
    "WEBP": ({"quality": 90}, {"lossless": True}),
    "BMP": ({},),
    "TIFF": tuple(
        {"compression": name}
        for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4", "zstd")
    ),
    "GIF": ({},),
    "JPEG2000": ({}, {"irreversible": True}),
    "AVIF": ({},),
    "PPM": ({},),
}
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F")
TURNABLE = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")


def photo(height: int = 20, width: int = 30) -> NDArray[np.uint8]:
    """A smooth image without symmetry."""
    corners = np.array([[[250, 10, 20], [10, 240, 30]], [[30, 20, 230], [240, 240, 10]]], np.uint8)
    return np.asarray(cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def of_mode(mode: str) -> Image.Image:
    grey = photo()[..., 1]
    if mode in ("I;16", "I", "F"):
        deep = {"I;16": grey.astype(np.uint16) * 257, "I": grey.astype(np.int32) * 257, "F": grey.astype(np.float32)}
        return Image.fromarray(deep[mode])
    return Image.fromarray(photo()).convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(image: Image.Image, kind: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, kind, exif=exif, **options)


def cases() -> Iterator[tuple[str, bytes]]:
    for kind, all_options in FORMATS.items():
        for mode in MODES:
            for options in all_options:
                try:
                    yield f"{kind} {mode} {options}", saved(of_mode(mode), kind, **options)
                except (OSError, ValueError, KeyError):
                    continue  # the format does not hold this mode


def turned_cases() -> Iterator[tuple[str, bytes]]:
    for kind in TURNABLE:
        for mode in ("L", "RGB", "P", "RGBA", "1", "I;16", "CMYK"):
            for orientation in range(1, 9):
                try:
                    yield f"{kind} {mode} turned {orientation}", turned(of_mode(mode), kind, orientation)
                except (OSError, ValueError, KeyError):
                    continue


def unusual_cases() -> Iterator[tuple[str, bytes]]:
    for name, mode, transparency in (
        ("grey", "L", 5), ("rgb", "RGB", (1, 2, 3)), ("palette", "P", bytes(range(200))), ("1 bit", "1", 1),
    ):  # fmt: skip
        yield f"tRNS {name}", saved(of_mode(mode), "PNG", transparency=transparency)
    for bits in (1, 2, 4):
        few = Image.fromarray(photo()).quantize(2**bits)
        for kind in ("PNG", "BMP", "GIF", "TIFF"):
            yield f"{kind} palette of {bits} bits", saved(few, kind, **({"bits": bits} if kind == "PNG" else {}))
    for channels in (1, 3, 4):
        deep = np.dstack([photo(), photo()[..., :1]])[..., :channels].astype(np.uint16) * 257 + 3
        for suffix in (".png", ".tif"):
            yield f"16 bits {suffix} {channels}", cv2.imencode(suffix, deep.squeeze())[1].tobytes()
    for largest in (100, 255, 1000, 4095, 65535):
        for magic, size in (("P5", 1), ("P6", 3)):
            values = np.arange(6 * size) * largest // (6 * size - 1)
            body = values.astype(">u2" if largest > 255 else np.uint8).tobytes()
            yield f"{magic} up to {largest}", f"{magic} 3 2 {largest}\n".encode() + body


def pillows(data: bytes) -> NDArray[np.uint8] | None:
    """What Pillow gives, 16 bits of grey scaled to 8; None for pixels that have no range."""
    image = Image.open(io.BytesIO(data))
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F" or (upright.mode == "I" and image.format != "PPM"):
        return None
    if upright.mode.startswith("I"):
        return np.repeat((np.asarray(upright) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(upright.convert("RGB"))


@pytest.mark.slow
def test_c19_every_image_has_pillows_pixels_by_path_bytes_and_pil_object(tmp_path: Path) -> None:
    seen = 0
    for name, data in (*cases(), *turned_cases(), *unusual_cases()):
        expected, path = pillows(data), tmp_path / "a.png"
        path.write_bytes(data)
        if expected is None:
            for read in (read_image, convert_to_pixels, lambda path: convert_to_pixels(Image.open(path))):
                with pytest.raises(
                    DataError,
                    match=r"32-bit (float|integer) pixels, which|float32 values, which have|of int32 values, which are",
                ):
                    read(path)
            continue
        if name == "16 bits .tif 4":  # OpenCV does not mark the fourth band as alpha: it is not dropped
            with pytest.raises(DataError, match=r"holds 4 bands of uint16 values, and without data\.bands images have"):
                read_image(path)
            continue
        header, stored = read_header(path), read_image(path)
        tolerance = 1 if name.startswith("JPEG ") else 0  # another decoder rounds differently
        for found in (
            read_image(path, upright=True),
            decode_image(data, "a", upright=True),
            convert_to_pixels(path),
            convert_to_pixels(str(path)),
            convert_to_pixels(Image.open(io.BytesIO(data))),
            apply_orientation(stored, header.orientation),
        ):
            assert found.shape == expected.shape, name
            assert np.abs(found.astype(int) - expected).max() <= tolerance, name
        assert header.stored == stored.shape[:2], name
        assert header.upright == read_header_only(str(path)).upright == expected.shape[:2], name
        seen += 1
    assert seen > 250


def ids(largest: int = 150) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, largest + 1, (20, 30), dtype=np.uint8)


def test_c20_lossless_labels_of_every_format_keep_their_ids(tmp_path: Path) -> None:
    path, label = tmp_path / "a.png", ids()
    grey = Image.fromarray(label)
    palette = Image.fromarray(label)
    palette.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    deep = Image.fromarray(label.astype(np.uint16) * 300)
    tiffs = [{"compression": name} for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma")]
    kinds = [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("PPM", {}), *(("TIFF", one) for one in tiffs)]
    for kind, options in kinds:
        path.write_bytes(saved(grey, kind, **options))
        assert read_label(path).tolist() == label.tolist(), (kind, options)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("BMP", {}), ("GIF", {"optimize": False})):
        path.write_bytes(saved(palette, kind, **options))
        assert read_label(path).tolist() == label.tolist(), (kind, options)
    for kind in ("PNG", "TIFF", "PPM"):
        path.write_bytes(saved(deep, kind))
        assert read_label(path).tolist() == (label.astype(int) * 300).tolist(), kind
    path.write_bytes(saved(grey, "PNG", transparency=3))
    assert read_label(path).tolist() == label.tolist()
    for orientation in range(1, 9):  # an orientation of its own
        for kind, image in (("PNG", grey), ("PNG", palette), ("TIFF", grey), ("TIFF", deep)):
            path.write_bytes(turned(image, kind, orientation))
            expected = apply_orientation(label, orientation).astype(int) * (300 if image is deep else 1)
            assert read_label(path).tolist() == expected.tolist(), (kind, image.mode, orientation)


@pytest.mark.parametrize("largest", [1, 20, 150, 255, 300, 1000, 65535])
def test_c20_ids_of_a_pgm_are_those_in_the_file_whatever_its_white_is(tmp_path: Path, largest: int) -> None:
    label = np.arange(6).reshape(2, 3) * largest // 5
    body = label.astype(">u2" if largest > 255 else np.uint8).tobytes()
    (tmp_path / "a.pgm").write_bytes(f"P5 3 2 {largest}\n".encode() + body)
    assert read_label(tmp_path / "a.pgm").tolist() == label.tolist()


@pytest.mark.parametrize("photometric", [0, 1])  # 0: white is 0, which says nothing about ids
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_c20_ids_of_few_bits_in_a_tiff_are_not_stretched(tmp_path: Path, bits: int, photometric: int) -> None:
    label = np.arange(8).reshape(1, 8) % 2**bits
    row = np.packbits(np.unpackbits(label.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :].ravel()).tobytes()
    tags = [(256, 8), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, 1), (279, len(row))]
    place = 8 + len(row) + len(row) % 2
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", place) + row.ljust(place - 8, b"\0") + directory)
    assert read_label(tmp_path / "a.tif").tolist() == label.tolist()


def test_c20_a_tiff_in_which_0_is_white_is_the_same_picture_with_8_and_16_bits(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    levels = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    tifffile.imwrite(tmp_path / "8.tif", levels, photometric="miniswhite")
    tifffile.imwrite(tmp_path / "16.tif", levels * np.uint16(257), photometric="miniswhite")
    np.save(tmp_path / "8.npy", 255 - levels)
    expected = np.repeat(255 - levels[..., None], 3, axis=2)
    for name in ("8.tif", "16.tif", "8.npy"):
        pixels = read_image(tmp_path / name)
        assert (pixels == expected).all() and pixels.flags.writeable, name


def test_c21_lossy_labels_of_every_kind_are_refused_under_any_name(tmp_path: Path) -> None:
    grey, path = Image.fromarray(ids()), tmp_path / "a.png"
    alpha = Image.merge("RGBA", [grey] * 4)
    lossy = {
        "JPEG": [saved(grey, "JPEG"), saved(grey, "MPO", save_all=True, append_images=[grey]), jpeg_in_tiff(grey)],
        "lossy WebP": [
            saved(grey, "WEBP"),
            saved(alpha, "WEBP"),
            turned(grey, "WEBP", 3),
            saved(grey, "WEBP", save_all=True, append_images=[Image.fromarray(ids()[::-1])]),
        ],
        "JPEG 2000": [saved(grey, "JPEG2000"), saved(grey, "JPEG2000", irreversible=True)],
        "AVIF": [saved(grey, "AVIF"), saved(grey, "AVIF", quality=100)],
    }
    for codec, files in lossy.items():
        for data in files:
            path.write_bytes(data)
            with pytest.raises(DataError, match=rf"a\.png: .*compressed with {codec}, which may change ids"):
                read_label(path)


def jpeg_in_tiff(image: Image.Image) -> bytes:
    return saved(image, "TIFF", compression="jpeg")


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_c19_metadata_behind_the_pixels_of_a_png_count_without_decoding_them(tmp_path: Path) -> None:
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[0x0112] = 6
    whole = saved(Image.fromarray(photo()), "PNG")
    late = whole[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + whole[-12:]
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta><d tiff:Orientation="6"/></x:xmpmeta>'
    for data in (late, whole[:-12] + png_chunk(b"iTXt", xmp) + whole[-12:]):
        path.write_bytes(data)
        assert read_header_only(str(path)).upright == (30, 20)
        assert np.array_equal(read_image(path, upright=True), apply_orientation(photo(), 6))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (saved(of_mode("RGB"), "ICO"), "is a ICO file, which is not supported"),
        (saved(of_mode("RGB"), "TGA"), "is a TGA file, which is not supported"),
        (saved(of_mode("RGB"), "PCX"), "is a PCX file, which is not supported"),
        (saved(of_mode("RGB"), "DDS"), "is a DDS file, which is not supported"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC file, which is not supported"),
        (
            cv2.imencode(".hdr", photo().astype(np.float32))[1].tobytes(),
            "is a Radiance HDR file, which is not",
        ),
        (
            cv2.imencode(".tif", photo().astype(np.float32))[1].tobytes(),
            "holds 3 bands of float32 values, which have no white. To train on them, set data.value_range",
        ),
        (
            cv2.imencode(".tif", photo().astype(np.float64))[1].tobytes(),
            "holds 3 bands of float64 values, which are not supported: read are",
        ),
        (cv2.imencode(".tif", photo().astype(np.int32))[1].tobytes(), "holds 3 bands of int32 values, which are not"),
        (
            saved(of_mode("F"), "TIFF"),
            "holds 1 band of float32 values, which have no white. To train on them, set data.bands=",
        ),
        (saved(of_mode("I"), "TIFF"), "holds 1 band of int32 values, which are not supported: read are uint8, uint16"),
        (b"no image at all", "is not an image in a known format"),
    ],
)
def test_c22_what_is_not_read_is_refused_with_the_true_reason_and_nothing_else(
    tmp_path: Path, data: bytes, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.png: {reason}") as error:
        read_image(tmp_path / "a.png")
    assert "copy it again" not in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "zstd"])
def test_c22_a_damaged_tiff_is_reported_only_by_us(
    tmp_path: Path, compression: str, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise), "TIFF", compression=compression)
    for data in (whole[: len(whole) // 2], whole[:500] + bytes(3000) + whole[3500:]):
        (tmp_path / "a.tif").write_bytes(data)
        for read in (read_image, read_label):
            try:
                read(tmp_path / "a.tif")
            except DataError as error:
                assert str(error).startswith(f"{tmp_path / 'a.tif'}: ")
    assert capfd.readouterr() == ("", "")


# ---- the limit of pixels


def bilevel(height: int, width: int) -> bytes:
    """A black PNG of one bit a pixel."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj()
    row = bytes(1 + (width + 7) // 8)
    body = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_c23_max_pixels_is_the_only_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # stands for Pillow's 178,956,970
    monkeypatch.setattr(images_module, "_MAX_PIXELS_OPENCV", 1000)  # stands for OpenCV's 2^30
    path = tmp_path / "a.png"
    for kind in ("PNG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "AVIF", "JPEG2000", "JPEG"):
        path.write_bytes(saved(Image.new("L", (120, 100)), kind))
        assert read_image(path, max_pixels=12_000).shape == (100, 120, 3), kind
        assert read_header_only(str(path)).upright == (100, 120), kind
        with pytest.raises(DataError, match=r"100 x 120 pixels, more than the limit data\.max_pixels=11999"):
            read_image(path, max_pixels=11_999)
    assert Image.MAX_IMAGE_PIXELS == 1000  # whoever imports us keeps their own


def test_c23_a_side_longer_than_opencv_reads_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bilevel(2, 1_100_000))
    assert read_image(tmp_path / "a.png").shape == (2, 1_100_000, 3)


@pytest.mark.slow
def test_c23_an_image_beyond_pillows_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bilevel(13_000, 14_000))
    assert read_header_only(str(tmp_path / "a.png")).upright == (13_000, 14_000)
    assert read_image(tmp_path / "a.png", max_pixels=2**28).shape == (13_000, 14_000, 3)


# ---- depth and frames


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(("largest", "shown"), [(1023, 3), (4095, 15), (16383, 63)])
def test_c24_an_image_that_uses_a_fraction_of_its_16_bits_is_reported(
    tmp_path: Path, suffix: str, largest: int, shown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "_warned_kinds", set())
    cv2.imwrite(str(tmp_path / f"a{suffix}"), np.array([[0, largest]], np.uint16))
    with pytest.warns(
        UserWarning, match=rf"a{suffix}: its 16-bit values reach {largest} of 65535, which is {shown} of"
    ):
        read_image(tmp_path / f"a{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / f"a{suffix}")  # once in a process


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_c24_16_bits_are_not_reduced_to_8_in_silence(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "_warned_kinds", set())
    cv2.imwrite(str(tmp_path / f"a{suffix}"), np.array([[0, 65535]], np.uint16))
    with pytest.warns(UserWarning, match=rf"a{suffix}: its 16-bit values are read as 8 bits.*data\.value_range"):
        read_image(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP", "AVIF"])
def test_c25_of_several_frames_the_first_is_read_with_a_warning(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.new("RGB", (30, 20), (level, level, level)) for level in (20, 120, 220)]
    options = {"lossless": True} if kind == "WEBP" else {}
    (tmp_path / "a").write_bytes(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    readers = [read_image] if kind == "AVIF" else [read_image, read_label]
    for read in readers:
        monkeypatch.setattr(images_module, "_warned_kinds", set())
        with pytest.warns(UserWarning, match="a: contains several frames or pages"):
            pixels = read(tmp_path / "a")
        if not (kind == "GIF" and read is read_label):  # whose ids are places in its palette
            assert np.abs(pixels.astype(int) - 20).max() <= (2 if kind == "AVIF" else 0)


def test_overviews_and_masks_of_a_tiff_are_no_frames(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(photo(), photometric="rgb")
        file.write(photo()[::2, ::2].copy(), photometric="rgb", subfiletype=1)
        file.write(np.ones((20, 30), np.bool_), subfiletype=4)
    assert np.array_equal(read_image(tmp_path / "a.tif"), photo()) and not recwarn


def test_a_photo_with_a_second_picture_behind_it_is_a_jpeg(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "a.jpg").write_bytes(
        saved(Image.fromarray(photo()), "MPO", save_all=True, append_images=[Image.fromarray(photo()[::-1])])
    )
    assert read_image(tmp_path / "a.jpg").shape == (20, 30, 3)
    assert read_header(tmp_path / "a.jpg").kind == "JPEG RGB"
    assert not recwarn
