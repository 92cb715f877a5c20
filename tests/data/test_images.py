"""Files become pixels, or one sentence that names the file and what is wrong with it."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from semseg.data.geometry import Size
from semseg.data.images import apply_orientation, mirror, read_image
from semseg.data.label_cache import LabelRuns
from semseg.data.label_map import LabelMap
from semseg.data.labels import (
    RawLabel,
    pad_label,
    read_label,
    resize_and_subsample_label,
    resize_label,
    subsample_label,
)
from semseg.data.pairs import read_pair, read_reduced
from semseg.data.records import Record
from semseg.data.resize import resize_image
from semseg.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden/dataset"
RNG = np.random.default_rng(0)


def photo(height: int = 60, width: int = 80) -> np.ndarray:
    """A smooth image without symmetry, uint8 (H, W, 3)."""
    corners = np.array([[[250, 10, 20], [10, 240, 30]], [[30, 20, 230], [240, 240, 10]]], np.uint8)
    return cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR)


def jpeg_bytes(pixels: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, **options)  # pyright: ignore[reportArgumentType]
    return stream.getvalue()


def png_bytes(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def noise(height: int = 60, width: int = 80) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def spoil_checksum(png: bytes) -> bytes:
    place = png.index(b"IDAT") + 4 + struct.unpack(">I", png[png.index(b"IDAT") - 4 : png.index(b"IDAT")])[0]
    return png[:place] + bytes([png[place] ^ 0xFF]) + png[place + 1 :]


def bomb(height: int, width: int) -> bytes:
    """A small PNG whose header declares height x width pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# ---- images


def test_an_image_is_rgb_and_equals_pillows() -> None:
    path = GOLDEN / "images/scene_01.jpg"
    assert np.array_equal(read_image(path), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif"])
def test_every_format_keeps_red_green_and_blue_apart(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(photo()).save(tmp_path / f"a.{suffix}")
    pixels = read_image(tmp_path / f"a.{suffix}")
    assert pixels.shape == (60, 80, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - photo()).mean() < 5


@pytest.mark.reliability
def test_c6_unusual_pixels_become_rgb(tmp_path: Path) -> None:
    image, path = Image.fromarray(photo()), tmp_path / "a.png"
    for mode in ("L", "P", "1", "RGBA", "LA"):
        image.convert(mode).save(path)
        expected = np.asarray(image.convert(mode).convert("RGB"))
        assert np.array_equal(read_image(path), expected), mode
    image.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - photo()).mean() < 5


@pytest.mark.reliability
def test_c6_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.array([[0, 44419, 65535]], np.uint16))
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 173, 255]


@pytest.mark.reliability
@pytest.mark.parametrize("shape", [(1, 1), (40, 1), (1, 40), (10000, 10)])
def test_c6_extreme_shapes_are_read(tmp_path: Path, shape: tuple[int, int]) -> None:
    Image.fromarray(noise(*shape)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (*shape, 3)


@pytest.mark.reliability
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_c1_a_truncated_jpeg_is_found(tmp_path: Path, share: float, options: dict) -> None:
    thumbnail = jpeg_bytes(noise(20, 20))
    whole = jpeg_bytes(noise(200, 300), exif=b"Exif\0\0" + thumbnail, **options)  # holds an end marker of its own
    path = tmp_path / "a.jpg"
    path.write_bytes(whole)
    read_image(path)
    path.write_bytes(whole[: max(len(thumbnail) + 60, int(len(whole) * share))])
    with pytest.raises(DataError, match=r"a\.jpg: (the JPEG is truncated|is not an image)"):
        read_image(path)


def test_bytes_after_the_end_of_a_jpeg_do_not_matter(tmp_path: Path) -> None:
    for tail in (b"\0" * 20, b"\n", b"a film that the phone has appended" * 100):
        (tmp_path / "a.jpg").write_bytes(jpeg_bytes(photo()) + tail)
        assert read_image(tmp_path / "a.jpg").shape == (60, 80, 3)


@pytest.mark.reliability
def test_c2_c3_each_kind_of_bad_file_has_its_own_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = png_bytes(noise())
    contents = {
        "empty": (b"", "is empty"),
        "html": (b"<!DOCTYPE html><html>not found</html>", "is not an image in a known format"),
        "truncated": (whole[: len(whole) // 2], "is broken"),
        "checksum": (spoil_checksum(whole), "is broken"),
    }
    for name, (data, message) in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name}: .*{message}"):
            read_image(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder: this is a folder"):
        read_image(tmp_path / "folder")
    with pytest.raises(DataError, match="none: there is no such file"):
        read_image(tmp_path / "none")


@pytest.mark.reliability
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("shape", [(30000, 30000), (12000, 12000)])
def test_c4_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, shape: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(bomb(*shape))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_image, read_label):
        with pytest.raises(DataError, match=r"a\.png: the header declares"):
            read(tmp_path / "a.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


@pytest.mark.reliability
def test_c4_the_limit_of_pixels_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes(noise(10, 10)))
    with pytest.raises(DataError, match=r"10 x 10 pixels, more than the limit data\.max_pixels=99"):
        read_image(tmp_path / "a.png", max_pixels=99)


# ---- EXIF


@pytest.mark.reliability
@pytest.mark.parametrize("orientation", range(1, 9))
def test_c5_image_and_label_keep_one_geometry_under_every_orientation(tmp_path: Path, orientation: int) -> None:
    stored, path = photo(), tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.write_bytes(jpeg_bytes(stored, exif=exif, subsampling=0))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert np.array_equal(read_image(path, upright=True), upright)
    assert np.array_equal(apply_orientation(read_image(path), orientation), upright)

    for pixels in (stored, upright):  # a label drawn on either grid: where green is strong
        label = (pixels[..., 1] > 128).astype(np.uint8) + 1
        (tmp_path / "a.png").write_bytes(png_bytes(label))
        record = Record(str(path), str(tmp_path / "a.png"), Size(*label.shape), "list:1")
        pair = read_pair(record, LabelMap(2))
        assert pair.label is not None
        if orientation >= 5 or pixels is stored:  # 2 to 4 keep the size, so the stored grid is taken
            agreement = (pair.label == (pair.image[..., 1] > 128)).mean()
            assert agreement > 0.98
    alone = read_pair(Record(str(path), None, Size(*upright.shape[:2]), "input"), LabelMap(2))
    assert np.array_equal(alone.image, upright)
    assert alone.label is None


# ---- labels


@pytest.mark.reliability
def test_c7_ids_are_read_as_they_are_stored(tmp_path: Path) -> None:
    ids = RNG.integers(0, 151, (7, 9), dtype=np.uint8)
    path = tmp_path / "a.png"
    grey, palette = Image.fromarray(ids), Image.fromarray(ids)
    palette.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    for image in (grey, palette, Image.merge("RGB", [grey] * 3), Image.merge("RGBA", [grey] * 4)):
        image.save(path)
        assert np.array_equal(read_label(path), ids), image.mode
    for suffix in ("bmp", "tif"):
        grey.save(tmp_path / f"a.{suffix}")
        assert np.array_equal(read_label(tmp_path / f"a.{suffix}"), ids)
    cv2.imwrite(str(path), ids.astype(np.uint16) * 300)
    assert np.array_equal(read_label(path), ids.astype(int) * 300)


@pytest.mark.reliability
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_c7_ids_of_few_bits_are_not_stretched(tmp_path: Path, bits: int) -> None:
    ids = RNG.integers(0, 2**bits, (5, 8), dtype=np.uint8)
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), ids)
    packed = Image.fromarray(ids)
    packed.putpalette(bytes(range(256)) * 3)
    packed.save(path, bits=bits)
    assert np.array_equal(read_label(path), ids)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    bit_rows = np.unpackbits(ids[..., None], axis=-1)[..., 8 - bits :].reshape(5, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bit_rows)
    header = struct.pack(">IIBBBBB", 8, 5, bits, 0, 0, 0, 0)  # grey, not palette
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert np.array_equal(read_label(path), ids)


@pytest.mark.reliability
def test_c8_labels_without_ids_say_how_to_convert(tmp_path: Path) -> None:
    ids = np.tile(np.array([[1, 120]], np.uint8), (8, 8))
    colours = np.array([[[128, 64, 128], [0, 128, 192]]], np.uint8)
    deep = np.full((2, 2, 3), 300, np.uint16)
    (tmp_path / "a.jpg").write_bytes(jpeg_bytes(ids))
    (tmp_path / "b.png").write_bytes(png_bytes(colours))
    cv2.imwrite(str(tmp_path / "c.png"), deep)
    Image.fromarray(ids).convert("LA").save(tmp_path / "d.png")
    messages = {"a.jpg": "JPEG", "b.png": r"2 colours, such as \(0, 128, 192\)", "c.png": "'RGB'", "d.png": "'LA'"}
    for name, message in messages.items():
        with pytest.raises(DataError, match=f"{name}: .*{message}.*single-channel PNG"):
            read_label(tmp_path / name)


@pytest.mark.reliability
def test_c2_a_damaged_label_is_found(tmp_path: Path) -> None:
    whole = png_bytes(RNG.integers(0, 151, (300, 400), dtype=np.uint8))
    for data, message in (
        (whole[: len(whole) // 2], "truncated"),
        (whole[:-8], "truncated"),
        (spoil_checksum(whole), "wrong checksum"),
        (b"", "is empty"),
        (b"GIF?", "is not an image"),
    ):
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(DataError, match=rf"a\.png: .*{message}"):
            read_label(tmp_path / "a.png")


# ---- pairs


def pair_of(
    folder: Path, image: tuple[int, int], label: tuple[int, int], listed: tuple[int, int], value: int
) -> Record:
    (folder / "a.png").write_bytes(png_bytes(noise(*image)))
    (folder / "b.png").write_bytes(png_bytes(np.full(label, value, np.uint8)))
    return Record(str(folder / "a.png"), str(folder / "b.png"), Size(*listed), "train.odgt:12")


@pytest.mark.reliability
def test_c10_sizes_that_differ_are_both_named(tmp_path: Path) -> None:
    record = pair_of(tmp_path, image=(6, 8), label=(6, 9), listed=(6, 8), value=1)
    with pytest.raises(DataError, match=r"^train\.odgt:12: .*a\.png is 6 x 8, .*b\.png is 6 x 9"):
        read_pair(record, LabelMap(3))


@pytest.mark.reliability
def test_c14_a_list_that_is_wrong_about_the_size_is_named(tmp_path: Path) -> None:
    record = pair_of(tmp_path, image=(6, 8), label=(6, 8), listed=(8, 6), value=1)
    with pytest.raises(DataError, match=r"^train\.odgt:12: .*the list says 8 x 6 .* the file is 6 x 8"):
        read_pair(record, LabelMap(3))


@pytest.mark.reliability
def test_c9_an_unknown_id_is_reported_with_line_and_file(tmp_path: Path) -> None:
    record = pair_of(tmp_path, image=(6, 8), label=(6, 8), listed=(6, 8), value=7)
    with pytest.raises(DataError, match=r"^train\.odgt:12: .*b\.png: label ids 7 \(48 pixels\)"):
        read_pair(record, LabelMap(3))


@pytest.mark.reliability
def test_c3_a_missing_file_is_reported_with_the_line_of_the_list() -> None:
    with pytest.raises(DataError, match=r"^train\.odgt:3: /no/a\.jpg: there is no such file"):
        read_pair(Record("/no/a.jpg", "/no/a.png", Size(1, 1), "train.odgt:3"), LabelMap(3))


def test_two_classes_too_many_are_ignored_if_configured(tmp_path: Path) -> None:
    record = pair_of(tmp_path, image=(6, 8), label=(6, 8), listed=(6, 8), value=0)
    pair = read_pair(record, LabelMap(3))
    assert pair.label is not None
    assert (pair.label == -1).all()


# ---- resizing


@pytest.mark.parametrize("size", [Size(100, 133), Size(300, 400), Size(450, 600), Size(900, 1200)])
def test_antialiased_resize_is_within_one_grey_level_of_pillow(size: Size) -> None:
    image = read_image(GOLDEN / "images/scene_01.jpg")
    ours = resize_image(image, size, antialias=True).astype(int)
    pillow = np.asarray(Image.fromarray(image).resize((size.width, size.height), Image.Resampling.BILINEAR)).astype(int)
    assert ours.shape == (*size, 3)
    assert np.abs(ours - pillow).max() <= 1
    assert np.abs(ours - pillow).mean() < 0.01


def test_nearest_resize_of_labels_equals_pillow() -> None:
    label = RNG.integers(-1, 150, (123, 211)).astype(np.int16)
    for size in (Size(77, 131), Size(300, 514), Size(123, 211), Size(1, 1)):
        ours = resize_label(label, size)
        pillow = np.asarray(
            Image.fromarray(label.astype(np.int32)).resize((size.width, size.height), Image.Resampling.NEAREST)
        )
        assert ours.dtype == np.int16
        assert np.array_equal(ours, pillow)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(16, 24), (17, 23), (3, 9), (1, 1)])
def test_a_strided_label_equals_a_padded_one_resized(shape: tuple[int, int], stride: int) -> None:
    label = RNG.integers(0, 150, shape).astype(np.int16)
    padding = [(0, -length % stride) for length in shape]
    padded = np.pad(label, padding, constant_values=-1)
    target = Size(padded.shape[0] // stride, padded.shape[1] // stride)
    assert np.array_equal(subsample_label(label, stride), resize_label(padded, target))


@pytest.mark.slow
@pytest.mark.parametrize("flip", [False, True])
def test_a_label_is_flipped_resized_and_strided_in_one_step(flip: bool) -> None:
    chance = np.random.default_rng(1)
    for _ in range(300):
        height, width, out_height, out_width = chance.integers(1, 700, 4).tolist()
        stride, size = int(chance.choice([1, 2, 4, 8, 32])), Size(out_height, out_width)
        label = chance.integers(0, 150, (height, width)).astype(np.int16)
        expected = subsample_label(resize_label(mirror(label) if flip else label, size), stride)
        raw = RawLabel(label.astype(np.uint8), LabelMap(150, first_id=0, ignore=[]), "a.png")
        for kind in (raw, LabelRuns.from_label(label)):
            found = pad_label(resize_and_subsample_label(kind, size, stride, flip=flip), size, stride)
            assert np.array_equal(found, expected), (height, width, size, stride)


def test_large_jpegs_are_decoded_at_a_fraction_of_their_size(tmp_path: Path) -> None:
    pixels = photo(600, 801)
    (tmp_path / "a.jpg").write_bytes(jpeg_bytes(pixels))
    (tmp_path / "a.png").write_bytes(png_bytes(np.ones((600, 801), np.uint8)))
    (tmp_path / "b.png").write_bytes(png_bytes(pixels))
    shapes = {}
    for name, edge in (("a.jpg", 301), ("a.jpg", 300), ("a.jpg", 75), ("b.png", 75)):
        record = Record(str(tmp_path / name), str(tmp_path / "a.png"), Size(600, 801), "list:1")
        thumbnail = read_reduced(
            record, lambda full, edge=edge: Size(edge, full.width * edge // full.height), LabelMap(3)
        )
        shapes[name, edge] = thumbnail.image.shape[:2]
        resized = cv2.resize(pixels, thumbnail.image.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(thumbnail.image.astype(int) - resized).mean() < 2
    assert list(shapes.values()) == [(600, 801), (300, 401), (75, 101), (600, 801)]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_fast_way_knows_orientations_and_sizes(tmp_path: Path, orientation: int) -> None:
    stored, path = photo(400, 600), tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.write_bytes(jpeg_bytes(stored, exif=exif))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    grids = (stored, upright) if orientation >= 5 else (stored,)
    for pixels in grids:
        (tmp_path / "a.png").write_bytes(png_bytes((pixels[..., 1] > 128).astype(np.uint8)))
        size = Size(*pixels.shape[:2])
        record = Record(str(path), str(tmp_path / "a.png"), size, "list:1")
        found = read_reduced(record, lambda full: Size(full.height // 4, full.width // 4), LabelMap(1))
        assert found.image.shape[:2] == (size.height // 4, size.width // 4)
        assert ((found.image[..., 1] > 128) == (found.label.to_array() == 0)[2::4, 2::4]).mean() > 0.95
    with pytest.raises(DataError, match=r"list:1: .*the list says 7 x 9"):
        read_reduced(record._replace(size=Size(7, 9)), lambda full: full, LabelMap(1))
    (tmp_path / "a.png").write_bytes(png_bytes(np.ones((9, 9), np.uint8)))
    with pytest.raises(DataError, match="list:1: image and label differ in size"):
        read_reduced(record, lambda full: full, LabelMap(1))


def test_a_flip_mirrors_columns() -> None:
    assert mirror(np.array([[1, 2, 3]], np.int16)).tolist() == [[3, 2, 1]]
    image = noise(3, 5)
    assert np.array_equal(mirror(image), image[:, ::-1])
