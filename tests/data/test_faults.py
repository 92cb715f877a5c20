"""Every format of images and masks with every fault: one line with the file, however the pair is read.

All pairs are read whole, at a reduced size, and by window. Row C of the list of what must hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import rasterio
import tifffile
from numpy.typing import NDArray
from PIL import Image
from rasterio.transform import from_origin

from helpers.in_process import configured
from semseg.data import label_windows, open_pairs
from semseg.data.open_pairs import open_pair
from semseg.data.pairs import read_pair, read_reduced
from semseg.data.records import Record
from semseg.data.sources import DataSource
from semseg.data.windows import Window
from semseg.errors import DataError, SemsegError

pytestmark = pytest.mark.reliability
HEIGHT, WIDTH = 40, 52
WORDS = [
    "data=folder", "data.num_classes=2", "data.first_id=0", "data.ignore=[]", "data.bands=[red,green,blue,nir]",
    "data.value_range=[0,3000]", "data.val_fraction=0", "data.label_cache=null",
]  # fmt: skip
SUFFIXES = {"PNG": ".png", "TIFF": ".tif", "GeoTIFF": ".tif", "GeoTIFF without CRS": ".tif", "NumPy": ".npy"}
FORMATS, OTHER_FORMATS = ("PNG", "TIFF"), ("NumPy", "GeoTIFF", "GeoTIFF without CRS")
Spoil = Callable[[str, Path], object]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def numbers(kind: str = "uint16", bands: int = 4, height: int = HEIGHT, width: int = WIDTH) -> NDArray:
    return np.random.default_rng(0).integers(1, 250, (height, width, bands)).astype(kind)


def write_image(kind: str, path: Path, pixels: NDArray) -> None:
    if kind == "PNG":
        cv2.imwrite(str(path), pixels[..., [2, 1, 0, 3][: pixels.shape[2]]] if pixels.shape[2] > 1 else pixels)
    elif kind == "NumPy":
        np.save(path, pixels)
    elif kind == "TIFF" and pixels.shape[2] > 1:
        how = {"photometric": "minisblack", "planarconfig": "contig", "tile": (16, 16), "compression": "lzw"}
        tifffile.imwrite(path, pixels, **how)
    elif kind == "TIFF":
        tifffile.imwrite(path, pixels[..., 0])
    else:
        place = {"crs": None if kind.endswith("CRS") else "EPSG:32632", "transform": from_origin(4e5, 5e6, 10, 10)}
        shape = {"height": pixels.shape[0], "width": pixels.shape[1], "count": pixels.shape[2]}
        with rasterio.open(path, "w", driver="GTiff", dtype=pixels.dtype.name, **shape, **place) as file:
            file.write(pixels.transpose(2, 0, 1))


def write_mask(kind: str, path: Path, ids: NDArray) -> None:
    if kind == "NumPy":
        np.save(path, ids)
    elif kind == "PNG":
        Image.fromarray(ids).save(path)
    else:
        tifffile.imwrite(path, ids, tile=(16, 16), compression="lzw")


def cut(path: Path, length: int) -> None:
    """Keep so many bytes; of a negative number, all but those; 0: half of them."""
    content = path.read_bytes()
    path.write_bytes(content[: length or len(content) // 2])


def replace_by_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def move_and_link(kind: str, path: Path) -> None:
    """Links are followed wherever they lead: the data sets of mode=import consist of them."""
    outside = path.rename(path.parents[2] / path.name)
    path.symlink_to(outside)


class Fault(NamedTuple):
    """What is done to a file, and what the error says; None: it is read."""

    spoil: Spoil
    message: str | dict[str, str | None] | None  # or by format, "" for all others


def image_of(**how: object) -> Spoil:
    return lambda kind, path: write_image(kind, path, numbers(**how))  # pyright: ignore[reportArgumentType]


TRUNCATED = {
    "PNG": "the PNG file is broken (truncated",
    "NumPy": "is truncated: its header declares",
    "": "truncated",
}
HEADERS = {"PNG": "has a header that cannot be read", "NumPy": "damaged header", "": "truncated or damaged header"}
NOT_IN_PNG = ("float32", "float64", "int32", "complex")
IMAGE_FAULTS = {
    "whole": Fault(lambda kind, path: None, None),
    "empty": Fault(lambda kind, path: path.write_bytes(b""), "is an empty file. Download or copy it again."),
    "cut in the header": Fault(lambda kind, path: cut(path, 20), HEADERS),
    "cut in the middle": Fault(lambda kind, path: cut(path, 0), TRUNCATED),
    "without its last byte": Fault(lambda kind, path: cut(path, -1), TRUNCATED),
    "text": Fault(lambda kind, path: path.write_text("hello " * 9), "is not an image in a known format (begins with"),
    "a JPEG by another name": Fault(
        lambda kind, path: Image.new("RGB", (WIDTH, HEIGHT)).save(path, "JPEG"),
        "holds 3 bands of uint8 values, but data.bands names 4: [red,green,blue,nir]. Name every band of a file",
    ),
    "3 bands": Fault(image_of(bands=3), "holds 3 bands of uint16 values, but data.bands names 4"),
    "1 band": Fault(image_of(bands=1), "holds 1 band of uint16 values, but data.bands names 4"),
    "5 bands": Fault(image_of(bands=5), {"PNG": None, "": "holds 5 bands of uint16 values, but data.bands names 4"}),
    "8 bits": Fault(image_of(kind="uint8"), "holds uint8 values where uint16 ones are expected. Convert it"),
    "float32": Fault(image_of(kind="float32"), "holds float32 values where uint16 ones are expected. Convert it"),
    "float64": Fault(image_of(kind="float64"), "4 bands of float64 values, which are not supported"),
    "int32": Fault(image_of(kind="int32"), "4 bands of int32 values, which are not supported"),
    "complex": Fault(
        image_of(kind="complex64"),
        {"NumPy": "values, which are no numbers of pixels. Save it as uint8", "": "values, which are not supported"},
    ),
    "another height": Fault(image_of(height=30), "is 30 x 52, "),
    "on its side": Fault(image_of(height=WIDTH, width=HEIGHT), "is 52 x 40, "),
    "a folder": Fault(lambda kind, path: (path.unlink(), path.mkdir()), "1 of 2 masks in "),
    "a link to nothing": Fault(lambda kind, path: replace_by_link(path, "/nowhere"), "Not used: 1 broken link"),
    "a link to itself": Fault(lambda kind, path: replace_by_link(path, path.name), "Not used: 1 broken link"),
    "a link out of the folder": Fault(move_and_link, None),
    "a suffix in capitals": Fault(lambda kind, path: path.rename(path.with_suffix(path.suffix.upper())), None),
    "a name in capitals": Fault(
        lambda kind, path: path.rename(path.with_name(f"B{path.suffix}")),
        "1 of them differ in upper and lower case only, such as B and b: rename one of each.",
    ),
}


def ids_of(kind: str = "uint8", value: float = 0, height: int = HEIGHT) -> Spoil:
    return lambda file, path: write_mask(file, path, np.full((height, WIDTH), value, kind))


NO_IDS = {"NumPy": "a label is (height, width) of integers", "": "has no ids. Labels are single-channel PNG files"}
MASK_FAULTS = {
    "whole": Fault(lambda kind, path: None, None),
    "empty": Fault(lambda kind, path: path.write_bytes(b""), "the file is empty. Download or copy it again."),
    "cut in the header": Fault(lambda kind, path: cut(path, 20), HEADERS),
    "cut in the middle": Fault(lambda kind, path: cut(path, 0), {**TRUNCATED, "": "broken"}),
    "without its last byte": Fault(lambda kind, path: cut(path, -1), {**TRUNCATED, "": "broken"}),
    "text": Fault(lambda kind, path: path.write_text("hello " * 9), "is not an image in a known format (begins with"),
    "a JPEG by another name": Fault(
        lambda kind, path: Image.new("L", (WIDTH, HEIGHT)).save(path, "JPEG"), "must not be compressed with JPEG"
    ),
    "another height": Fault(ids_of(height=30), "is 30 x 52 (height x width). They must be drawn on the same pixels."),
    "an unknown id": Fault(ids_of(value=7), "label ids 7 (2080 pixels) are neither classes nor ignored"),
    "16 bits": Fault(ids_of("uint16"), None),
    "32 bits": Fault(ids_of("int32"), None),
    "below 0": Fault(ids_of("int16", -1), "label ids -1 (2080 pixels) are neither classes nor ignored"),
    "float32": Fault(ids_of("float32"), NO_IDS),
    "NaN": Fault(ids_of("float32", np.nan), NO_IDS),
    "three bands": Fault(
        lambda kind, path: write_mask(
            kind, path, np.arange(3, dtype=np.uint8) + np.zeros((HEIGHT, WIDTH, 1), np.uint8)
        ),
        {"NumPy": "holds 3 bands of uint8 values; a label is", "": "the label has 1 colours, such as (0, 1, 2)"},
    ),
    "a link to nothing": Fault(
        lambda kind, path: replace_by_link(path, "/nowhere"), "Not used: 1 broken link (masks/b"
    ),
    "a name in capitals": Fault(
        lambda kind, path: path.rename(path.with_name(f"B{path.suffix}")),
        "1 of them differ in upper and lower case only, such as b and B: rename one of each.",
    ),
}
MASKS_NOT_IN_PNG = ("32 bits", "below 0", "float32", "NaN")


def read_in_windows(record: Record, source: DataSource) -> None:
    with open_pair(record, source.label_map, bands=source.bands_of("train")) as pair:
        for top in range(0, pair.size.height, 8):
            pair.read(Window(top, 0, 8, pair.size.width))


def read_all(folder: Path, *words: str) -> list[str]:
    """What becomes of two pairs, read in every way: the errors; none if both are read."""
    errors = []
    try:
        source = DataSource(configured(*WORDS, f"data.root={folder}", *words).data)
        records = source.records("train")
    except SemsegError as error:
        return [str(error)]
    bands = source.bands_of("train")
    for read in (
        lambda record: read_pair(record, source.label_map, bands=bands),
        lambda record: read_reduced(record, lambda size: size, source.label_map, bands=bands),
        lambda record: read_in_windows(record, source),
    ):
        for record in records:
            try:
                read(record)
            except DataError as error:
                errors.append(str(error))
    assert len(errors) in (0, 3), errors  # every way of reading agrees
    return errors


def make_folder(folder: Path, image_kind: str, mask_kind: str) -> Path:
    for name in ("images", "masks"):
        (folder / "data" / name).mkdir(parents=True)
    for stem in ("a", "b"):
        write_image(image_kind, folder / "data" / "images" / f"{stem}{SUFFIXES[image_kind]}", numbers())
        ids = np.zeros((HEIGHT, WIDTH), np.uint8)
        write_mask(mask_kind, folder / "data" / "masks" / f"{stem}{SUFFIXES[mask_kind]}", ids)
    return folder / "data"


def check_errors(errors: list[str], message: str | None, file: str) -> None:
    assert bool(errors) == (message is not None), errors
    for error in errors:
        assert message is not None and message in error and file in error and "\n" not in error and len(error) < 700


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGE_FAULTS)
@pytest.mark.parametrize("kinds", [FORMATS, pytest.param(OTHER_FORMATS, marks=pytest.mark.long)])
def test_an_image_with_a_fault_is_read_or_named_in_one_line_in_every_format(
    name: str, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    fault = IMAGE_FAULTS[name]
    for kind in kinds:
        if kind == "PNG" and name in NOT_IN_PNG:
            continue
        root = make_folder(tmp_path / kind, kind, "PNG")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fault.spoil(kind, root / "images" / f"b{SUFFIXES[kind]}")
        message = fault.message
        if isinstance(message, dict):
            message = message.get(kind, message[""])
        check_errors(read_all(root), message, "images")


@pytest.mark.slow
@pytest.mark.parametrize("name", MASK_FAULTS)
@pytest.mark.parametrize("limit", [2**25, pytest.param(100, marks=pytest.mark.long)])
def test_a_mask_with_a_fault_is_read_or_named_in_one_line_in_every_format(
    name: str, limit: int, tmp_path: Path
) -> None:
    fault = MASK_FAULTS[name]
    for kind in FORMATS if limit > 100 else (*FORMATS, "NumPy"):
        if kind == "PNG" and name in MASKS_NOT_IN_PNG:
            continue
        root = make_folder(tmp_path / kind, "TIFF", kind)
        fault.spoil(kind, root / "masks" / f"b{SUFFIXES[kind]}")
        message = fault.message
        if isinstance(message, dict):
            message = message.get(kind, message[""])
        # Masks of more than `limit` pixels are read by window if they can be.
        with patch.object(label_windows, "WHOLE_PIXELS", limit), patch.object(open_pairs, "WHOLE_PIXELS", limit):
            errors = read_all(root)
        if message is not None and limit == 100:
            message = message.partition("(2080")[0]  # those of the window that is read
        check_errors(errors, message, "masks")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["empty", "cut in the header", "text", "a link to nothing", "a link to itself", "a folder"]
)
def test_a_file_whose_header_cannot_be_read_is_left_out_on_request(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path, "TIFF", "PNG")
    IMAGE_FAULTS[name].spoil("TIFF", root / "images" / "b.tif")
    source = DataSource(configured(*WORDS, f"data.root={root}", "data.on_bad=skip").data)
    assert [Path(record.image).name for record in source.records("train")] == ["a.tif"]
    output = capsys.readouterr().out
    assert output.count("left out: ") == 1 and "/b." in output
    for number in range(3):
        (root / "images" / f"{number}.tif").write_bytes(b"")
    with pytest.raises(DataError, match=r"^4 of 5 images could not be read, more than data\.max_bad=0\.01 allows"):
        DataSource(configured(*WORDS, f"data.root={root}", "data.on_bad=skip").data).records("train")
