"""Lists and images spoiled at random: a record, pixels, or one sentence, and never anything else. Rows H1 and H3."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from helpers.memory import in_child, peak_growth
from helpers.records import odgt_records
from semseg.config.preprocessing import PIXEL_TYPES, BandRange
from semseg.data.band_images import read_bands
from semseg.data.band_windows import open_windows
from semseg.data.bands import BandFile, BandOptions
from semseg.data.images import decode_image, read_image
from semseg.data.label_map import LabelMap
from semseg.data.label_windows import open_label_windows
from semseg.data.labels import read_class_indices, read_label
from semseg.data.list_files import _parse_odgt_line as parse_line
from semseg.data.records import Record
from semseg.errors import DataError

pytestmark = pytest.mark.reliability

GOOD = json.dumps({"fpath_img": "images/ä.jpg", "fpath_segm": "labels/a.png", "width": 640, "height": 480}).encode()
PIECES = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\0", b"\xff", b"\xef\xbb\xbf", b"../", b"/", b"null", b"true",
    b"-1", b"0", b"1e999", b"NaN", b"Infinity", b"9" * 400, b'"\\ud800"', b"\r", b"\t", b" " * 50, b"width",
    b"fpath_img",
]  # fmt: skip


def spoiled(data: bytes, chance: random.Random, pieces: list[bytes]) -> bytes:
    """`data` with one to four places overwritten, removed, repeated, or filled with one of `pieces`."""
    spoilt = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(spoilt) + 1)
        end = min(len(spoilt), start + chance.choice([0, 1, 1, 2, 8, 40]))
        filling = chance.choice(
            [b"", chance.choice(pieces), bytes(spoilt[start:end]) * 2, chance.randbytes(end - start)]
        )
        spoilt[start:end] = filling
    return bytes(spoilt)


@pytest.mark.slow
def test_h1_a_hundred_thousand_spoiled_lines_give_a_record_or_one_sentence_with_the_line() -> None:
    chance, kinds = random.Random(0), Counter()
    for number in range(100_000):
        try:
            record = parse_line(spoiled(GOOD, chance, PIECES), "/data", f"list.odgt:{number}")
        except DataError as error:
            assert str(error).startswith(f"list.odgt:{number}: ") and "\n" not in str(error)
            kinds["error"] += 1
        else:
            assert isinstance(record, Record) and record.image.startswith("/data/") and min(record.size) >= 1
            kinds["record"] += 1
    assert min(kinds.values()) > 1000  # both happen


def test_h1_a_list_of_spoiled_lines_names_the_first_bad_one(tmp_path: Path) -> None:
    (tmp_path / "a.odgt").write_bytes(b"\n".join([GOOD, GOOD, GOOD[:-1], b"nothing"]))
    with pytest.raises(DataError, match=r"a\.odgt:3: "):
        odgt_records(tmp_path / "a.odgt", tmp_path)


def pictures() -> list[bytes]:
    """JPEG, progressive JPEG and PNG files of noise, grey, palette and 16-bit ones among them."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    grey = Image.fromarray(pixels[..., 0])
    options = [(Image.fromarray(pixels), "JPEG", {}), (Image.fromarray(pixels), "JPEG", {"progressive": True}),
               (Image.fromarray(pixels), "PNG", {}), (grey, "PNG", {}), (grey.convert("P"), "PNG", {}),
               (Image.fromarray(pixels[..., 0].astype(np.uint16) * 255), "PNG", {})]  # fmt: skip
    found = []
    for image, kind, how in options:
        stream = io.BytesIO()
        image.save(stream, kind, **how)
        found.append(stream.getvalue())
    return found


def record_outcome(
    kinds: Counter[str], kind: str, read: Callable[[], Any], is_right: Callable[[Any], bool] = lambda result: True
) -> None:
    """Count what a reader returns, which must be right, or its error for users, which is one line."""
    try:
        result = read()
    except DataError as error:
        assert "\n" not in str(error), str(error)
        kinds[f"{kind} refused"] += 1
    else:
        assert is_right(result)
        kinds[f"{kind} read"] += 1


def decode_spoiled(count: int, seed: int, folder: Path) -> tuple[Counter[str], int]:
    """What became of `count` spoiled files, read as images and as labels, and by how many bytes the memory grew."""
    chance, files, kinds = random.Random(seed), pictures(), Counter[str]()
    pieces = [
        b"\xff\xd9",
        b"\xff\xd8",
        b"\xff\xda",
        b"\xff\xc0",
        b"IDAT",
        b"IEND",
        b"\0" * 40,
        b"\xff" * 4,
        b"\x7f\xff\xff\xff",
    ]

    def work() -> None:
        for number in range(count):
            data = spoiled(files[number % len(files)], chance, pieces)
            (folder / "a").write_bytes(data)
            for kind, read in (
                ("image", lambda data=data: decode_image(data, "a")),
                ("label", lambda: read_label(folder / "a")),
            ):
                record_outcome(kinds, kind, read, lambda pixels: pixels.dtype in (np.uint8, np.uint16, np.int32))

    growth = peak_growth(work)
    return kinds, growth


@pytest.mark.slow
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_h3_spoiled_images_crash_nothing_and_take_no_memory(count: int, tmp_path: Path) -> None:
    kinds, growth = in_child(lambda: decode_spoiled(count, 0, tmp_path))
    assert sum(kinds.values()) == 2 * count  # the process lived to the end
    assert kinds["image refused"] > count / 10 and kinds["image read"] > count / 100
    assert growth < 2**30


def rasters(folder: Path) -> list[tuple[str, bytes]]:
    """TIFF and NumPy files of several bands and types, and a PNG of 16 bits with alpha."""
    pixels = np.random.default_rng(0).integers(0, 4000, (48, 64, 4))
    found = []
    for number, (kind, how) in enumerate([
        ("uint16", {"compression": "lzw", "tile": (16, 16)}), ("int16", {"compression": "deflate", "predictor": True}),
        ("float32", {"bigtiff": True}), ("uint16", {"planarconfig": "separate", "rowsperstrip": 8}),
    ]):  # fmt: skip
        path = folder / f"{number}.tif"
        values = pixels.astype(kind)
        is_planar = "planarconfig" in how
        options = {"planarconfig": "contig", **how, "extratags": [(42113, 2, 0, "7", True)]}
        tifffile.imwrite(path, values.transpose(2, 0, 1) if is_planar else values, photometric="minisblack", **options)
        found.append((".tif", path.read_bytes()))
    np.save(folder / "a.npy", pixels.astype(np.int16))
    cv2.imwrite(str(folder / "a.png"), pixels.astype(np.uint16))
    return [*found, (".npy", (folder / "a.npy").read_bytes()), (".png", (folder / "a.png").read_bytes())]


def read_spoiled_rasters(count: int, seed: int, folder: Path) -> tuple[Counter[str], int]:
    """What became of `count` spoiled rasters, read whole and by window, and by how many bytes the memory grew."""
    chance, files, kinds = random.Random(seed), rasters(folder), Counter[str]()
    names = ("red", "green", "blue", "nir")
    options = BandOptions((BandFile("", names),), names, (BandRange(0, 4000),) * 4)
    pieces = [
        b"\xff" * 4,
        b"\x7f\xff\xff\xff",
        b"\0" * 40,
        b"\1\0",
        b"II*\0",
        b"MM\0+",
        b"NUMPY",
        b"('",
        b"<f8",
        b"9" * 30,
    ]

    def read_windows(path: Path) -> np.ndarray | None:
        windows = open_windows(path, options)
        if windows is None:
            return None
        with windows:
            return windows.read(0, 0, min(40, windows.height), min(40, windows.width))

    def work() -> None:
        for number in range(count):
            suffix, whole = files[number % len(files)]
            path = folder / f"spoiled{suffix}"
            start = chance.choice([0, 0, 100, len(whole) - 700])  # headers are at both ends
            start = min(max(0, start), len(whole))
            end = min(len(whole), start + 700)
            path.write_bytes(whole[:start] + spoiled(whole[start:end], chance, pieces) + whole[end:])
            for kind, read in (
                ("whole", lambda path=path: read_bands(path, options, max_pixels=2**20).pixels),
                ("plain", lambda path=path: read_image(path, max_pixels=2**20)),
                ("window", lambda path=path: read_windows(path)),
            ):
                record_outcome(kinds, kind, read, lambda pixels: pixels is None or pixels.dtype.name in PIXEL_TYPES)

    growth = peak_growth(work)
    return kinds, growth


@pytest.mark.slow
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_h3_spoiled_rasters_crash_nothing_and_take_no_memory(count: int, tmp_path: Path) -> None:
    kinds, growth = in_child(lambda: read_spoiled_rasters(count, 0, tmp_path))
    assert sum(kinds.values()) == 3 * count  # the process lived to the end
    assert (
        kinds["whole refused"] > count / 10 and kinds["whole read"] > count / 100 and kinds["window read"] > count / 100
    )
    assert growth < 2**30


def label_files(folder: Path) -> list[tuple[str, bytes]]:
    """Masks in TIFF and NumPy files: tiles, strips, a palette, 8 to 64 bits."""
    ids = np.random.default_rng(0).integers(0, 4, (48, 64))
    found = []
    for number, (kind, how) in enumerate([
        ("uint8", {"compression": "lzw", "tile": (16, 16)}), ("uint16", {"compression": "zstd", "rowsperstrip": 5}),
        ("uint8", {"bigtiff": True}),
    ]):  # fmt: skip
        tifffile.imwrite(folder / f"{number}.tif", ids.astype(kind), **how)
        found.append((".tif", (folder / f"{number}.tif").read_bytes()))
    picture = Image.fromarray(ids.astype(np.uint8))
    picture.putpalette(bytes(range(256)) * 3)
    picture.save(folder / "palette.tif", compression="tiff_deflate")
    found.append((".tif", (folder / "palette.tif").read_bytes()))
    for kind in ("uint8", "int64"):
        np.save(folder / "a.npy", ids.astype(kind))
        found.append((".npy", (folder / "a.npy").read_bytes()))
    return found


def read_spoiled_labels(count: int, seed: int, folder: Path) -> tuple[Counter[str], int]:
    """What became of `count` spoiled masks, read whole and by window, and by how many bytes the memory grew."""
    chance, files, kinds = random.Random(seed), label_files(folder), Counter[str]()
    label_map = LabelMap(4, first_id=0, ignore=[])
    pieces = [b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 40, b"\1\0", b"II*\0", b"NUMPY", b"<i8", b"9" * 30]

    def read_windows(path: Path) -> None:
        label = open_label_windows(str(path), label_map)
        if label is not None:
            with closing(label):
                if label.size.height * label.size.width < 2**20:
                    assert all(ids.min() >= 0 and ids.max() < 4 for _, ids in label.read_strips(500))

    def work() -> None:
        for number in range(count):
            suffix, whole = files[number % len(files)]
            path = folder / f"spoiled{suffix}"
            path.write_bytes(spoiled(whole, chance, pieces))
            for kind, read in (
                ("whole", lambda path=path: read_class_indices(str(path), label_map, max_pixels=2**20)),
                ("window", lambda path=path: read_windows(path)),
            ):
                record_outcome(kinds, kind, read)

    growth = peak_growth(work)
    return kinds, growth


@pytest.mark.slow
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_h3_spoiled_masks_crash_nothing_and_take_no_memory(count: int, tmp_path: Path) -> None:
    kinds, growth = in_child(lambda: read_spoiled_labels(count, 0, tmp_path))
    assert sum(kinds.values()) == 2 * count and min(kinds.values()) > count / 50 and len(kinds) == 4
    assert growth < 2**30
