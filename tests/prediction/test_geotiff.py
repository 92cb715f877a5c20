"""Predictions of GeoTIFF files keep their place on the earth, and of huge ones only windows are in memory."""

from __future__ import annotations

import errno
import resource
import signal
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import rasterio
import tifffile
from numpy.typing import NDArray
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.windows import Window as RasterWindow

from helpers.memory import in_child, peak_growth
from helpers.rasters import TURNED, write_raster
from semseg.config.preprocessing import BandRange
from semseg.data.band_windows import open_windows
from semseg.data.bands import BandFile, BandOptions, draw_bands, measure_stretches
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.data.header_cache import read_header_only
from semseg.data.label_map import LabelMap
from semseg.data.windows import FinishedRows
from semseg.errors import ConfigError, DataError
from semseg.prediction.geotiff import (
    GeoReference,
    GeoTiffSink,
    OverlaySink,
    SeveralSinks,
    is_georeferenced,
    may_have_mask,
    open_mask,
    read_georeference,
    write_geotiff,
)
from semseg.prediction.pictures import read_picture
from semseg.reports.draw import draw_overlay

pytestmark = pytest.mark.reliability
CLASSES = ClassTable.from_names(["water", "wood", "field"])
FOUR = ("red", "green", "blue", "nir")
OPTIONS = BandOptions((BandFile("", FOUR),), FOUR, (BandRange(0, 3000),) * 4, (1500.0,) * 4)


def rows_of(ids: NDArray[np.int16], step: int) -> list[FinishedRows]:
    nothing = np.zeros((0, 0), np.float32)
    return [FinishedRows(top, ids[top : top + step], nothing, None) for top in range(0, len(ids), step)]


def test_a_prediction_has_the_transform_crs_and_colours(tmp_path: Path) -> None:
    image = write_raster(tmp_path / "a.tif", 700, 600)
    reference = read_georeference(image)
    ids = np.random.default_rng(0).integers(0, 3, (700, 600)).astype(np.int16)
    with GeoTiffSink(tmp_path / "ids.tif", Size(700, 600), CLASSES, LabelMap(3, 1), reference=reference) as sink:
        for rows in rows_of(ids, 37):
            sink.write_rows(rows)
        assert not (tmp_path / "ids.tif").exists()  # whole or not at all
    with rasterio.open(tmp_path / "ids.tif") as file:
        assert file.crs == "EPSG:32632" and file.transform == TURNED and file.nodata == 255
        assert np.array_equal(file.read(1), ids + 1)
        assert file.colormap(1)[1] == (*CLASSES.palette[0], 255) and file.tags()["classes"] == "water, wood, field"
        assert file.block_shapes == [(512, 512)]


def test_control_points_are_copied(tmp_path: Path) -> None:
    points = [GroundControlPoint(row, column, 9 + column, 50 + row) for row, column in ((0, 0), (0, 9), (9, 0))]
    write_raster(tmp_path / "a.tif", 20, 30, crs=None, transform=None)
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.gcps = (points, rasterio.crs.CRS.from_epsg(4326))
    reference = read_georeference(tmp_path / "a.tif")
    assert reference is not None
    write_geotiff(tmp_path / "ids.tif", np.zeros((20, 30), np.int16), CLASSES, LabelMap(3), reference)
    with rasterio.open(tmp_path / "ids.tif") as file:
        found, crs = file.gcps
        assert [(point.row, point.x) for point in found] == [(0, 9), (0, 18), (9, 9)] and crs == "EPSG:4326"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_is_turned_upright_keeps_its_place(tmp_path: Path, orientation: int) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[3, 7] = 255
    east, north = TURNED * (7.5, 3.5)
    place = (34264, 12, 16, (TURNED.a, TURNED.b, 0, TURNED.c, TURNED.d, TURNED.e, 0, TURNED.f, *[0.0] * 7, 1.0), True)
    tags = [(274, 3, 1, orientation, True), place]
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", compression="deflate", extratags=tags)
    points = (GroundControlPoint(3.5, 7.5, east, north),)
    stored = GeoReference(None, TURNED, (points, None))
    ((row, column, _),) = np.argwhere(read_picture(tmp_path / "a.tif").max(2, keepdims=True))
    reference = read_georeference(tmp_path / "a.tif")
    assert reference is not None
    assert reference.transform * (column + 0.5, row + 0.5) == pytest.approx((east, north))
    ((point,), _) = stored.turn_upright(read_header_only(str(tmp_path / "a.tif"))).gcps
    assert (point.row, point.col, point.x, point.y) == pytest.approx((row + 0.5, column + 0.5, east, north))


def test_a_file_without_crs_or_without_anything(tmp_path: Path) -> None:
    write_raster(tmp_path / "a.tif", 20, 30, crs=None)
    reference = read_georeference(tmp_path / "a.tif")
    assert reference is not None and reference.crs is None and reference.transform == TURNED
    write_geotiff(tmp_path / "ids.tif", np.zeros((20, 30), np.int16), CLASSES, LabelMap(3), reference)
    with rasterio.open(tmp_path / "ids.tif") as file:
        assert file.crs is None and file.transform == TURNED
    Image.new("RGB", (30, 20)).save(tmp_path / "b.tif")
    assert not is_georeferenced(tmp_path / "b.tif") and read_georeference(tmp_path / "b.tif") is None
    (tmp_path / "c.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:100])
    assert read_georeference(tmp_path / "c.tif") is None
    assert not is_georeferenced(tmp_path / "no.tif")


@pytest.mark.parametrize(
    ("image", "world"), [("a.tif", "a.tfw"), ("a.TIFF", "a.tfw"), ("a.jpg", "a.jgw"), ("a.png", "a.WLD")]
)
def test_a_world_file_is_the_place_of_an_image(tmp_path: Path, image: str, world: str) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / image)
    path = tmp_path / image
    assert not is_georeferenced(path)
    # The rows of a world file: x and y of a step to the right, of a step down, and of the first pixel's centre.
    (tmp_path / world).write_text("0.2\n0.1\n0.1\n-0.2\n500000.15\n5299999.95\n")
    assert is_georeferenced(path)
    reference = read_georeference(path)
    assert reference is not None and reference.crs is None
    assert tuple(reference.transform)[:6] == pytest.approx((0.2, 0.1, 500000, 0.1, -0.2, 5300000))
    assert not may_have_mask(path)  # which only the tags of GeoTIFF announce
    (tmp_path / world).write_text("1\n0\n0\n1\n0.5\n0.5\n")
    assert read_georeference(path) is None
    (tmp_path / world).write_text("nothing")
    with pytest.raises(DataError, match=rf"{world}: a world file has six numbers"):
        read_georeference(path)


def test_ids_above_254_take_16_bits_and_pixels_without_values_have_none(tmp_path: Path) -> None:
    pixels = np.full((4, 600, 300), 7, np.uint16)
    image = write_raster(tmp_path / "a.tif", 700, 600, pixels, nodata=0)
    reader = open_windows(image, OPTIONS)
    assert reader is not None
    ids, label_map = np.ones((700, 600), np.int16), LabelMap(3, ids={0: 0, 1: 1, 300: 2})
    with (
        reader,
        GeoTiffSink(tmp_path / "i.tif", Size(700, 600), CLASSES, label_map, read_valid=reader.read_valid) as sink,
    ):
        for rows in rows_of(ids, 100):
            sink.write_rows(rows)
    with rasterio.open(tmp_path / "i.tif") as file:
        found = file.read(1)
        assert file.nodata == 65535 and (found[:600, :300] == 1).all()
        assert (found[600:] == 65535).all() and (found[:, 300:] == 65535).all()


@pytest.mark.parametrize("step", [7, *(pytest.param(step, marks=pytest.mark.long) for step in (1, 100, 600))])
def test_an_overlay_by_rows_is_that_of_the_whole_image(tmp_path: Path, step: int) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(500, 3000, (4, 12, 6)).repeat(50, 1).repeat(50, 2).astype(np.uint16)
    ids = rng.integers(-1, 3, (12, 6)).repeat(50, 0).repeat(50, 1).astype(np.int16)
    reader = open_windows(write_raster(tmp_path / "a.tif", 600, 300, pixels), OPTIONS)
    reference = read_georeference(tmp_path / "a.tif")
    assert reader is not None
    whole = reader.read(0, 0, 600, 300)
    stretches = measure_stretches(whole, FOUR)
    draw = partial(draw_bands, names=FOUR, stretches=stretches)
    sink = OverlaySink(tmp_path / "o.tif", Size(600, 300), CLASSES, reader, draw, reference=reference)
    drawn: list[NDArray] = []
    with patch.object(sink, "write_pixels", side_effect=drawn.append), sink:
        for rows in rows_of(ids, step):
            sink.write_rows(rows)
    expected = draw_overlay(draw_bands(whole, FOUR), ids, CLASSES)
    assert np.array_equal(np.concatenate(drawn), expected)
    sink = OverlaySink(tmp_path / "o.tif", Size(600, 300), CLASSES, reader, draw, reference=reference)
    with reader, sink:
        for rows in rows_of(ids, step):
            SeveralSinks([sink]).write_rows(rows)
    with rasterio.open(tmp_path / "o.tif") as file:
        assert file.crs == "EPSG:32632" and file.transform == TURNED and file.count == 3
        found = file.read().transpose(1, 2, 0).astype(int)
    assert np.abs(found - expected).mean() < 12  # JPEG


def test_colours_are_class_indices_with_a_palette_in_which_pixels_that_are_not_sure_have_none(tmp_path: Path) -> None:
    ids = np.array([[0, 1, 2, -1]], np.int16)
    with GeoTiffSink(tmp_path / "c.tif", Size(1, 4), CLASSES, LabelMap(3, 0, [3])) as sink:
        sink.write_rows(rows_of(ids, 1)[0])
    with rasterio.open(tmp_path / "c.tif") as file:
        assert file.read(1).tolist() == [[0, 1, 2, 3]]
        assert file.colormap(1)[2] == (*CLASSES.palette[2], 255)


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError), GeoTiffSink(tmp_path / "i.tif", Size(9, 9), CLASSES, LabelMap(3)) as sink:
        sink.write_rows(rows_of(np.zeros((5, 9), np.int16), 5)[0])
        raise DataError("broken")
    assert list(tmp_path.iterdir()) == []


def write_up_to(limit: int, folder: Path) -> tuple[str, list[str]]:
    """The error of a class map of noise whose file may have so many bytes, and what is left in the folder."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    rng, kind = np.random.default_rng(0), "none"
    try:
        with GeoTiffSink(folder / "ids.tif", Size(900, 700), CLASSES, LabelMap(3)) as sink:
            for _ in range(9):
                sink.write_rows(rows_of(rng.integers(0, 3, (100, 700)).astype(np.int16), 100)[0])
    except OSError as error:
        kind = errno.errorcode.get(error.errno or 0, repr(error))
    return kind, [path.name for path in folder.iterdir()]


@pytest.mark.slow
def test_a_disk_that_is_full_before_the_end_leaves_no_damaged_file(tmp_path: Path) -> None:
    kind, left = in_child(partial(write_up_to, 10**7, tmp_path))
    assert (kind, left) == ("none", ["ids.tif"])
    whole = (tmp_path / "ids.tif").stat().st_size
    (tmp_path / "ids.tif").unlink()
    for limit in (5000, whole - 500, whole - 1):  # GDAL is silent about the last of them
        kind, left = in_child(partial(write_up_to, limit, tmp_path))
        assert kind in ("EIO", "ENOSPC") and left == [], limit


def test_without_rasterio_the_extra_is_named(tmp_path: Path) -> None:
    with patch("semseg.prediction.geotiff.find_spec", return_value=None), pytest.raises(ConfigError, match=r"\[geo\]"):
        GeoTiffSink(tmp_path / "i.tif", Size(9, 9), CLASSES, LabelMap(3))


def read_and_write_huge(folder: Path, height: int) -> int:
    """Go over a raster of 40 000 columns by windows and write a class map of the same size: growth in bytes."""
    side = 40_000
    image = write_raster(folder / "huge.tif", height, side, np.full((4, 600, 700), 9, np.uint16), nodata=0)

    def work() -> None:
        reader = open_windows(image, OPTIONS)
        assert reader is not None and (reader.height, reader.width) == (height, side)
        reference = read_georeference(image)
        with (
            reader,
            GeoTiffSink(folder / "ids.tif", Size(height, side), CLASSES, LabelMap(3), reference=reference) as sink,
        ):
            for top in range(0, height - 1024, 4000):  # every tenth row of windows
                for left in range(0, side, 1024):
                    reader.read(top, left, 1024, min(1024, side - left))
            for top in range(0, height, 400):
                sink.write_rows(rows_of(np.full((400, side), top % 3, np.int16), 400)[0]._replace(top=top))

    work_growth = peak_growth(work)
    with rasterio.open(folder / "ids.tif") as file:
        assert file.shape == (height, side) and file.crs == "EPSG:32632"
        assert file.read(1, window=RasterWindow(0, height - 400, 4, 1)).tolist() == [[(height - 400) % 3 + 1] * 4]
    return work_growth


@pytest.mark.parametrize(
    "height", [pytest.param(1600, marks=pytest.mark.slow), pytest.param(40_000, marks=pytest.mark.long)]
)
def test_rasters_of_40000_columns_are_read_and_written_in_400_megabytes(tmp_path: Path, height: int) -> None:
    growth = in_child(partial(read_and_write_huge, tmp_path, height))
    assert growth < 400e6, f"{growth / 1e6:.0f} MB"


def test_a_raster_whose_mask_cannot_be_read_is_named(tmp_path: Path) -> None:
    image = write_raster(tmp_path / "a.tif", 600, 700, np.ones((4, 600, 700), np.uint16), nodata=0, compress="deflate")
    content = image.read_bytes()
    image.write_bytes(content[:-2000])
    with open_mask(image) as read_valid:
        assert read_valid is not None
        with pytest.raises(DataError, match=r"a\.tif: its mask cannot be read"):
            read_valid(0, 0, 600, 700)
    image.write_bytes(content[:100])
    with pytest.raises(DataError, match=r"a\.tif: its mask cannot be read"), open_mask(image):
        pass
