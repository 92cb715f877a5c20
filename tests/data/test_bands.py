"""Images with other bands and more bits than 8-bit RGB: what files hold, and what becomes of their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image

from semseg.config.preprocessing import PIXEL_TYPES, PREPROCESSING, BandRange, Preprocessing
from semseg.data.band_images import read_bands
from semseg.data.band_statistics import measure_bands
from semseg.data.band_windows import open_windows
from semseg.data.bands import BandFile, BandOptions, draw_bands
from semseg.data.geometry import Size
from semseg.data.header_cache import read_header_only
from semseg.data.images import read_image
from semseg.data.label_map import IGNORED, LabelMap
from semseg.data.labels import read_label
from semseg.data.lzw import decode_lzw
from semseg.data.pairs import read_pair, read_reduced
from semseg.data.rasters import LZW, require_tifffile
from semseg.data.records import Record
from semseg.data.resize import resize_image
from semseg.errors import DataError
from semseg.nets.bands import band_convention
from semseg.nets.normalise import normalise

pytestmark = pytest.mark.reliability
FOUR = ("red", "green", "blue", "nir")
COMPRESSIONS = (None, "lzw", "deflate", "zstd")


def options(*names: str | None, high: float | None = 200.0, low: float = 0.0, **others: Any) -> BandOptions:
    """One file with these bands, all of one range."""
    used = tuple(name for name in names if name is not None)
    ranges = None if high is None else (BandRange(low, high),) * len(used)
    return BandOptions((BandFile("", names),), used, ranges, **{"fill": (7.0,) * len(used), **others})


def numbers(kind: str, bands: int, height: int = 40, width: int = 53) -> NDArray:
    return np.random.default_rng(bands).integers(0, 200, (height, width, bands)).astype(kind)


def write_tiff(path: Path, pixels: NDArray, *, is_planar: bool = False, **how: Any) -> Path:
    """A TIFF with unspecified bands."""
    if pixels.shape[2] == 1:
        tifffile.imwrite(path, pixels[..., 0], photometric="minisblack", **how)
    elif is_planar:
        tifffile.imwrite(path, pixels.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate", **how)
    else:
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig", **how)
    return path


def band_names(count: int) -> list[str]:
    return [f"b{number}" for number in range(count)]


# ---- reading


@pytest.mark.slow
@pytest.mark.parametrize("kind", PIXEL_TYPES)
@pytest.mark.parametrize("is_planar", [False, True])
def test_every_tiff_has_its_own_numbers_whole_and_by_window(tmp_path: Path, kind: str, is_planar: bool) -> None:
    path, rng = tmp_path / "a.tif", np.random.default_rng(0)
    for count in (1, 3, 8):
        pixels = numbers(kind, count)
        for number, compression in enumerate(COMPRESSIONS):
            layouts: list[dict[str, Any]] = [{"tile": (16, 32)}, {"rowsperstrip": 7} if compression else {}]
            how = {"byteorder": "<>"[number % 2], "bigtiff": number > 1, "compression": compression}
            for layout in layouts:
                write_tiff(path, pixels, is_planar=is_planar, **how, **layout)
                chosen = options(*band_names(count))
                found = read_bands(path, chosen)
                assert found.pixels.dtype == kind and np.array_equal(found.pixels, pixels)
                assert read_header_only(str(path)).stored == (40, 53)
                windows = open_windows(path, chosen)
                assert windows is not None and (windows.height, windows.width, windows.num_bands) == (40, 53, count)
                with windows:
                    top, left = rng.integers(0, 20, 2)
                    assert np.array_equal(windows.read(top, left, 17, 31), pixels[top : top + 17, left : left + 31])
                    assert np.array_equal(windows.read(0, 0, 40, 53), pixels)


def test_lzw_is_decoded_by_libtiff_which_a_damaged_stream_does_not_crash() -> None:
    assert require_tifffile("a.tif").TIFF.DECOMPRESSORS[LZW] is decode_lzw
    content = np.random.default_rng(0).integers(0, 9, 5000).astype(np.uint8).tobytes()
    stream = imagecodecs.lzw_encode(content)
    assert decode_lzw(stream, out=5000).tobytes() == content
    assert decode_lzw(stream, out=300).tobytes() == content[:300]
    for damaged in (stream[:-100], b"", stream[:50] + b"\xff" * 20 + stream[70:], b"\xff" * 900):
        with pytest.raises(ValueError, match="its LZW stream is damaged"):
            decode_lzw(damaged, out=5000)


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_png_has_its_bands_in_the_order_red_green_blue_alpha(tmp_path: Path, kind: str, count: int) -> None:
    pixels = numbers(kind, count)
    cv2.imwrite(str(tmp_path / "a.png"), pixels[..., [2, 1, 0, 3][:count]] if count > 1 else pixels)
    found = read_bands(tmp_path / "a.png", options(*band_names(count))).pixels
    assert found.dtype == kind and np.array_equal(found, pixels)


@pytest.mark.parametrize("kind", ["u1", "<u2", ">u2", "<i2", "<f4", ">f4"])
def test_arrays_are_read_in_every_order_of_their_numbers(tmp_path: Path, kind: str) -> None:
    pixels = numbers(kind, 4)
    for array in (pixels, np.asfortranarray(pixels)):
        np.save(tmp_path / "a.npy", array)
        assert np.array_equal(read_bands(tmp_path / "a.npy", options(*FOUR)).pixels, pixels)
        windows = open_windows(tmp_path / "a.npy", options(*FOUR))
        assert windows is not None and np.array_equal(windows.read(3, 4, 20, 30), pixels[3:23, 4:34])


def test_bands_in_files_of_their_own_are_put_together_in_the_order_of_the_names(tmp_path: Path) -> None:
    pixels = numbers("uint16", 3)
    for band, suffix in enumerate(("_B8", "_B4", "_B3")):
        write_tiff(tmp_path / f"a{suffix}.tif", pixels[..., band : band + 1])
    files = (BandFile("_B4", ("red",)), BandFile("_B3", ("green",)), BandFile("_B8", ("nir",)))
    chosen = BandOptions(files, ("nir", "red", "green"), (BandRange(0, 200),) * 3, (0.0,) * 3)
    assert np.array_equal(read_bands(tmp_path / "a_B4.tif", chosen).pixels, pixels)
    windows = open_windows(tmp_path / "a_B4.tif", chosen)
    assert windows is not None and np.array_equal(windows.read(1, 2, 9, 8), pixels[1:10, 2:10])
    cv2.imwrite(str(tmp_path / "a_B8.png"), pixels[..., 0])
    (tmp_path / "a_B8.tif").rename(tmp_path / "kept.tif")
    with patch("semseg.data.band_images.list_folder", side_effect=AssertionError):  # slow in a large folder
        assert np.array_equal(read_bands(tmp_path / "a_B4.tif", chosen).pixels, pixels)
    (tmp_path / "a_B8.png").unlink()
    (tmp_path / "kept.tif").rename(tmp_path / "a_b8.tif")
    with pytest.raises(
        DataError, match=r"a_B8\.tif: there is no such file, which holds nir .*There is a_b8\.tif, which"
    ):
        read_bands(tmp_path / "a_B4.tif", chosen)
    write_tiff(tmp_path / "a_B8.tif", pixels[:20, :, :1])
    with pytest.raises(DataError, match=r"a_B8\.tif: is 20 x 53, .*a_B4\.tif is 40 x 53"):
        read_bands(tmp_path / "a_B4.tif", chosen)
    write_tiff(tmp_path / "a_B8.tif", pixels[..., :1].astype(np.float32))
    with pytest.raises(DataError, match=r"a_B8\.tif: holds float32 values, .*a_B4\.tif uint16 ones"):
        read_bands(tmp_path / "a_B4.tif", chosen)


def test_a_band_without_a_name_is_left_out(tmp_path: Path) -> None:
    pixels = numbers("uint16", 4)
    write_tiff(tmp_path / "a.tif", pixels)
    found = read_bands(tmp_path / "a.tif", options("red", "green", None, "nir")).pixels
    assert np.array_equal(found, pixels[..., [0, 1, 3]])


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_a_fourth_band_is_alpha_only_if_the_file_says_so(tmp_path: Path, kind: str) -> None:
    pixels = numbers(kind, 4)
    pixels[..., 3] = 5
    pixels[5:9, :, 3] = 0
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    found = read_bands(tmp_path / "a.tif", options("red", "green", "blue"))
    assert found.is_valid is not None and np.array_equal(found.is_valid, pixels[..., 3] > 0)
    assert (found.pixels[5:9] == 7).all() and np.array_equal(found.pixels[20:], pixels[20:, :, :3])
    assert np.array_equal(read_bands(tmp_path / "a.tif", options(*FOUR)).pixels, pixels)
    assert read_image(tmp_path / "a.tif").shape == (40, 53, 3)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unspecified"])
    for read in (read_image, lambda path: read_bands(path, options("red", "green", "blue"))):
        with pytest.raises(DataError, match=f"a.tif: holds 4 bands of {kind} values, (but|and without) data.bands"):
            read(tmp_path / "a.tif")


def test_grey_of_16_bits_is_red_green_and_blue_alike(tmp_path: Path) -> None:
    pixels = numbers("uint16", 1)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    assert np.array_equal(read_bands(tmp_path / "a.png", options("red", "green", "blue")).pixels, pixels.repeat(3, 2))


# ---- what is refused


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            np.zeros((4, 5, 4)),
            "holds 4 bands of float64 values, which are not supported: read are uint8, .* as float32",
        ),
        (np.zeros((4, 5, 4), np.int64), "holds 4 bands of int64 values, which are not supported"),
        (np.zeros((4, 5, 4), bool), "holds 4 bands of bool values, which are not supported: .* Save it as uint8"),
        (np.zeros(5, np.uint8), r"holds an array of shape \(5,\); an image is \(height, width\) or"),
        (np.zeros((4, 5, 0), np.uint8), r"holds an array of shape \(4, 5, 0\)"),
        (
            np.zeros((4, 5, 6), np.uint16),
            r"holds 6 bands of uint16 values, but data\.bands names 4: \[red,green,blue,nir",
        ),
        (np.array([{}]), "is a NumPy file of '|O' values"),
        (np.zeros((4, 5), "c8"), "is a NumPy file of '<c8' values"),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_what_they_hold(
    tmp_path: Path, pixels: NDArray, message: str
) -> None:
    np.save(tmp_path / "a.npy", pixels, allow_pickle=True)
    with pytest.raises(DataError, match=rf"a\.npy: {message}") as error:
        read_bands(tmp_path / "a.npy", options(*FOUR))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "size"), [("a.npy", 500), ("a.tif", 1500), ("a.png", 300)])
def test_truncated_files_are_refused(tmp_path: Path, name: str, size: int) -> None:
    path, pixels = tmp_path / name, np.random.default_rng(0).integers(0, 60000, (40, 53, 4)).astype(np.uint16)
    if name == "a.npy":
        np.save(path, pixels)
    elif name == "a.png":
        cv2.imwrite(str(path), pixels)
    else:
        write_tiff(path, pixels, compression="lzw")
    whole = path.read_bytes()
    path.write_bytes(whole[:-size])
    with pytest.raises(DataError, match=rf"a\{path.suffix}: .*(truncated|broken|damaged|not an image)"):
        read_bands(path, options(*FOUR, high=60000.0))


def test_pages_of_a_microscope_are_no_bands(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((7, 20, 30), np.uint16))
    for read in (read_image, lambda path: read_bands(path, options("grey"))):
        with pytest.raises(DataError, match=r"a\.tif: holds 7 pages of 1 band of uint16 values"):
            read(tmp_path / "a.tif")


def test_values_without_a_range_are_refused(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", numbers("uint16", 4))
    with pytest.raises(
        DataError, match=r"holds uint16 values, whose range is not known\. To train on them, set data\.value_range="
    ):
        read_bands(tmp_path / "a.tif", options(*FOUR, high=None))
    with pytest.raises(DataError, match="holds uint16 values where uint8 ones are expected"):
        read_bands(tmp_path / "a.tif", options(*FOUR, dtype="uint8"))
    write_tiff(tmp_path / "b.tif", numbers("uint8", 4))
    with pytest.raises(DataError, match="holds 8-bit values, which do not reach the range"):
        read_bands(tmp_path / "b.tif", options(*FOUR, high=3000.0))
    assert read_bands(tmp_path / "b.tif", options(*FOUR, high=None)).pixels.dtype == np.uint8


def test_without_bands_a_raster_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    for count, kind, message in (
        (5, "uint16", r"5 bands of uint16 values, and without data\.bands images have red, green and blue"),
        (
            1,
            "float32",
            r"float32 values, which have no white\. To train on them, set data\.bands=\[grey\] data\.value_range",
        ),
        (
            3,
            "int16",
            r"3 bands of int16 values, which have no white\. To train on them, set data\.value_range=\[low,high\]",
        ),
    ):
        write_tiff(tmp_path / "a.tif", numbers(kind, count))
        with pytest.raises(DataError, match=rf"a\.tif: holds .*{message}"):
            read_image(tmp_path / "a.tif")


# ---- values that are none


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_nan_is_filled_and_not_scored(tmp_path: Path, suffix: str) -> None:
    pixels = numbers("float32", 4)
    pixels[2, 3, 1], pixels[4, 5], pixels[6, 7] = np.nan, np.inf, -np.inf
    path = tmp_path / f"a{suffix}"
    np.save(path, pixels) if suffix == ".npy" else write_tiff(path, pixels)
    Image.fromarray(np.ones((40, 53), np.uint8)).save(tmp_path / "m.png")
    record = Record(str(path), str(tmp_path / "m.png"), Size(40, 53), "list")
    expected = np.where(np.isfinite(pixels), pixels, np.float32(7))
    image, label = read_pair(record, LabelMap(2), bands=options(*FOUR))
    assert np.array_equal(image, expected) and label is not None
    assert label[4, 5] == label[6, 7] == IGNORED and (label >= 0).sum() == 40 * 53 - 2  # of 2, 3 one band is missing
    reduced = read_reduced(record, lambda size: size, LabelMap(2), bands=options(*FOUR))
    assert np.array_equal(reduced.image, expected) and np.array_equal(reduced.label.to_array(), label)
    windows = open_windows(path, options(*FOUR))
    assert windows is not None and np.array_equal(windows.read(0, 0, 10, 10), expected[:10, :10])
    valid = windows.read_valid(0, 0, 10, 10)
    assert valid is not None and not valid[4, 5] and valid.sum() == 98
    assert windows.read_valid(20, 20, 5, 5) is None


@pytest.mark.parametrize(
    ("kind", "nodata"), [("uint16", "0"), ("int16", "-9999"), ("float32", "-9999"), ("float32", "nan")]
)
def test_nodata_of_gdal_is_filled_and_not_scored(tmp_path: Path, kind: str, nodata: str) -> None:
    pixels = numbers(kind, 2) + np.ones((), kind)
    pixels[:4] = float(nodata)
    write_tiff(tmp_path / "a.tif", pixels, extratags=[(42113, 2, 0, nodata, True)])
    found = read_bands(tmp_path / "a.tif", options("vv", "vh"))
    assert found.is_valid is not None and not found.is_valid[:4].any() and found.is_valid[4:].all()
    assert (found.pixels[:4] == 7).all() and np.array_equal(found.pixels[4:], pixels[4:])


@pytest.mark.parametrize(("photometric", "count"), [("minisblack", 1), ("miniswhite", 1), ("rgb", 3)])
def test_nodata_of_a_picture_is_found_however_it_is_read(tmp_path: Path, photometric: str, count: int) -> None:
    pixels = np.full((8, 8, count), 90, np.uint8)
    pixels[:4] = 10
    tifffile.imwrite(
        tmp_path / "a.tif", pixels.squeeze(), photometric=photometric, extratags=[(42113, 2, 0, "10", True)]
    )
    chosen = options(*band_names(count))
    whole = read_bands(tmp_path / "a.tif", chosen)
    assert whole.is_valid is not None and np.array_equal(whole.is_valid, pixels[..., 0] != 10)
    windows = open_windows(tmp_path / "a.tif", chosen)
    if windows is None:  # of 0 as white: the file is read whole
        return
    with windows:
        part = windows.read_image(0, 0, 8, 8)
    assert part.is_valid is not None and np.array_equal(part.is_valid, whole.is_valid)
    assert np.array_equal(part.pixels, whole.pixels)


def test_nodata_that_the_type_cannot_hold_is_no_pixel(tmp_path: Path) -> None:
    pixels = numbers("uint16", 2)
    write_tiff(tmp_path / "a.tif", pixels, extratags=[(42113, 2, 0, "-9999", True)])
    assert np.array_equal(read_bands(tmp_path / "a.tif", options("vv", "vh")).pixels, pixels)


def test_labels_may_be_arrays(tmp_path: Path) -> None:
    ids = np.arange(12).reshape(3, 4)
    for kind, found in (("uint8", "uint8"), ("int64", "int32"), ("uint16", "uint16")):
        np.save(tmp_path / "a.npy", ids.astype(kind))
        label = read_label(tmp_path / "a.npy")
        assert np.array_equal(label, ids) and label.dtype == found
    for wrong in (ids.astype(float), ids[..., None].repeat(3, 2), ids.astype(np.int64) << 40):
        np.save(tmp_path / "a.npy", wrong)
        with pytest.raises(DataError, match=r"a\.npy: holds"):
            read_label(tmp_path / "a.npy")


# ---- arithmetic


@pytest.mark.parametrize("kind", PIXEL_TYPES)
@pytest.mark.parametrize("bands", [1, 4, 7])
def test_resizing_keeps_type_bands_and_constants(kind: str, bands: int) -> None:
    image = np.full((31, 45, bands), 77, kind)
    for size in (Size(10, 15), Size(62, 90)):
        for antialias in (True, False):
            resized = resize_image(image, size, antialias=antialias)
            assert resized.shape == (*size, bands) and resized.dtype == kind and np.allclose(resized, 77, 1e-6)


def plain(names: Sequence[str], base: str, **others: Any) -> Preprocessing:
    return band_convention(PREPROCESSING[base], options(*names, **others))


@pytest.mark.parametrize("kind", PIXEL_TYPES)
def test_values_are_normalised_by_the_range_of_each_band(kind: str) -> None:
    convention = plain(FOUR, "rgb_mean_std", high=200.0, low=100.0, mean=(None, None, None, 120.0),
                       std=(None, None, None, 10.0))  # fmt: skip
    image = torch.from_numpy(np.array([90, 100, 150, 200], kind)).view(1, 1, 1, 4).repeat(1, 4, 1, 1)
    before = image.clone()
    found = normalise(image, convention)
    fractions = torch.tensor([0, 0, 0.5, 1])
    assert torch.equal(image, before)  # a batch that was saved after a bad step holds the values of the files
    assert torch.allclose(found[0, 0, 0], (fractions - 0.485) / 0.229, atol=1e-5)
    assert torch.allclose(found[0, 3, 0], (fractions - 0.2) / 0.1, atol=1e-5)


def test_a_network_for_bgr_sees_the_same_with_a_range_of_8_bits() -> None:
    image = torch.randint(0, 256, (1, 3, 4, 5), dtype=torch.uint8)
    for base in ("bgr_mean", "rgb_mean_std"):
        convention = plain(("red", "green", "blue"), base, high=255.0)
        assert torch.allclose(normalise(image, convention), normalise(image, PREPROCESSING[base]), atol=1e-4)
        assert Preprocessing.from_plain(convention.as_plain()) == convention
        swapped = plain(("blue", "red", "green"), base, high=None)
        expected = normalise(image, PREPROCESSING[base])
        rgb = expected.flip(1) if base == "bgr_mean" else expected
        assert torch.allclose(normalise(image[:, [2, 0, 1]], swapped), rgb[:, [2, 0, 1]], atol=1e-4)


def test_the_range_is_measured_on_values_that_are_some(tmp_path: Path) -> None:
    records = []
    for number in range(3):
        pixels = np.tile(np.arange(1000, 2000, dtype=np.uint16)[:, None, None], (1, 8, 4))
        pixels[:, 0] = 0
        pixels[..., 3] += 5000
        write_tiff(tmp_path / f"{number}.tif", pixels, extratags=[(42113, 2, 0, "0", True)])
        records.append(Record(str(tmp_path / f"{number}.tif"), None, Size(1000, 8), "folder"))
    measured = measure_bands(records, options(*FOUR, high=None, dtype="uint16"))
    assert measured.ranges[0] == measured.ranges[2] == (1004, 1994)
    assert measured.ranges[3][1] == 6994 and abs(measured.means[0] - 1499.5) < 1
    with pytest.raises(DataError, match=r"no\.tif: there is no such file"):
        measure_bands([records[0]._replace(image=str(tmp_path / "no.tif"))], options(*FOUR, high=None, dtype="uint16"))


def test_pictures_of_bands_are_stretched_and_those_of_8_bits_are_not() -> None:
    ramp = np.linspace(1000, 3000, 101).astype(np.uint16)[:, None, None].repeat(4, 2)
    drawn = draw_bands(ramp, FOUR)
    assert drawn.dtype == np.uint8 and drawn.shape == (101, 1, 3)
    assert drawn[50, 0].tolist() == [128] * 3 and drawn[0, 0, 0] == 0 and drawn[100, 0, 0] == 255
    plain_image = numbers("uint8", 4)
    assert np.array_equal(draw_bands(plain_image, FOUR, ["nir", "red", "green"]), plain_image[..., [3, 0, 1]])
    assert draw_bands(np.zeros((2, 3, 1), np.float32), ["height"]).tolist() == np.zeros((2, 3, 3)).tolist()
