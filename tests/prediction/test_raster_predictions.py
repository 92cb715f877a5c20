"""Rasters predicted by the command line: where they have no values there is no class, and huge ones fit into memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image
from rasterio.windows import Window as RasterWindow

import semseg
from helpers.command_line import TINY, TINY_NETWORK, run_here
from helpers.memory import in_child, needs_proc, peak_growth
from helpers.rasters import NATIVE_BANDS, NO_DATA, TURNED, draw_rasters, write_raster
from semseg.nets.registry import ENCODERS, Constructor
from semseg.prediction.predictor import PredictionResult

pytestmark = pytest.mark.reliability
WIDTH = 40_000
SQUARE = 700  # pixels: side of the parts of a huge raster that have values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `run` is a network of four bands at native resolution, whose labels ignore no id."""
    folder = draw_rasters(tmp_path_factory.mktemp("rasters"))
    run_here(folder, *NATIVE_BANDS, f"data.root={folder}", "data.label_cache=null", "run_dir=run")
    return folder


def predict(folder: Path, image: Path, run_dir: str, *words: str) -> str:
    fixed = ["mode=predict", "ckpt=run", f"input={image}", f"run_dir={run_dir}", "predict.save=[ids]", "trainer=cpu"]
    return run_here(folder, *fixed, *words)


def predict_from_python(folder: Path, image: Path) -> PredictionResult:
    with patch.dict(ENCODERS, {"tiny": Constructor("helpers.in_process", "TinyEncoder")}):
        return semseg.load(folder / "run", device="cpu").predict(image)


@pytest.mark.slow
def test_pixels_without_values_have_no_class_whether_an_image_is_read_whole_or_by_window(folder: Path) -> None:
    values = np.random.default_rng(0).integers(1, 3000, (4, 80, 90)).astype(np.uint16)
    values[:, 20:50, 30:60] = 0
    values[1, :10] = 0  # one band alone
    image = write_raster(folder / "a.tif", 100, 120, values, nodata=0)
    has_value = np.zeros((100, 120), bool)
    has_value[:80, :90] = values.any(axis=0)
    for run_dir, max_pixels in (("whole", 20_000), ("windows", 2000)):
        predict(folder, image, run_dir, f"data.max_pixels={max_pixels}")
        with rasterio.open(folder / run_dir / "a_ids.tif") as file:
            ids = file.read(1)
            assert file.nodata == 255 and file.dtypes == ("uint8",) and file.colormap(1)[0][3] == 255
        assert np.array_equal(ids != 255, has_value), run_dir
    assert np.array_equal(np.asarray(Image.open(folder / "whole" / "a_ids.png")), ids)
    assert np.array_equal(predict_from_python(folder, image).label_ids, ids)
    words = ["mode=predict", "ckpt=run", f"input={image}", "data.max_pixels=2000", "predict.save=[panel,coco]"]
    printed = run_here(folder, *words, "run_dir=nothing", code=1)
    assert "a.tif: panel, coco: for images of up to data.max_pixels, of larger ones only ids, color, overlay" in printed


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `run` is a network of colours at native resolution."""
    folder = tmp_path_factory.mktemp("colours")
    words = [word for word in TINY if not word.startswith(("data.short_edges", "data.max_long_edge", "eval.scales"))]
    run_here(folder, *words, *TINY_NETWORK, "data.resize=native", "data.crop=[32,32]", "run_dir=run")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alpha", "nodata", "mask"])
def test_pixels_without_values_of_a_raster_of_colours_have_no_class(colours: Path, kind: str) -> None:
    has_value = np.zeros((100, 120), bool)
    has_value[:50] = True
    pixels = np.random.default_rng(0).integers(1, 255, (3, 100, 120)).astype(np.uint8) * has_value
    alpha = has_value[None] * np.uint8(255)
    how = {"nodata": {"nodata": 0}, "alpha": {"alpha": "yes"}}.get(kind, {})
    how |= {"height": 100, "width": 120, "count": 3 + (kind == "alpha"), "dtype": "uint8", "photometric": "rgb"}
    image = colours / f"{kind}.tif"
    with rasterio.open(image, "w", driver="GTiff", crs="EPSG:32632", transform=TURNED, **how) as file:
        file.write(np.concatenate([pixels, alpha]) if kind == "alpha" else pixels)
        if kind == "mask":
            file.write_mask(alpha[0])
    limits = {"whole": 20_000} if kind == "alpha" else {"whole": 20_000, "windows": 5000}  # with alpha only whole
    for how_read, max_pixels in limits.items():
        run_dir = f"{kind}-{how_read}"
        predict(colours, image, run_dir, f"data.max_pixels={max_pixels}")
        with rasterio.open(colours / run_dir / f"{kind}_ids.tif") as file:
            assert np.array_equal(file.read(1) != file.nodata, has_value), run_dir
    assert np.array_equal(predict_from_python(colours, image).ids >= 0, has_value)


@pytest.mark.slow
def test_a_raster_of_colours_that_is_turned_upright_is_predicted(colours: Path) -> None:
    image = colours / "turned.tif"
    place = [(33550, 12, 3, (10.0, 10.0, 0.0), True), (33922, 12, 6, (0.0, 0.0, 0.0, 1.0, 5.0, 0.0), True)]
    orientation = (274, 3, 1, 6, True)
    tifffile.imwrite(
        image, np.ones((40, 70, 3), np.uint8), photometric="rgb", extratags=[orientation, *place, *NO_DATA]
    )
    predict(colours, image, "turned")
    assert Image.open(colours / "turned" / "turned_ids.png").size == (40, 70)


def predict_huge(folder: Path, height: int) -> int:
    """Predict a raster whose corners have values, and check the prediction: growth of memory in bytes."""
    values = np.random.default_rng(0).integers(1, 3000, (4, SQUARE, SQUARE)).astype(np.uint16)
    image = write_raster(folder / f"{height}.tif", height, WIDTH, nodata=0)
    with rasterio.open(image, "r+") as file:
        for top in (0, height - SQUARE):
            for left in (0, WIDTH - SQUARE):
                file.write(values, window=RasterWindow(left, top, SQUARE, SQUARE))
    run_dir = f"of-{height}"
    growth = peak_growth(partial(predict, folder, image, run_dir, "predict.window=1024", "data.max_pixels=1000000"))
    with rasterio.open(folder / run_dir / f"{height}_ids.tif") as file:
        assert file.shape == (height, WIDTH) and file.crs == "EPSG:32632"
        num_pixels = np.zeros(256, int)
        for top in range(0, height, 500):
            ids = file.read(1, window=RasterWindow(0, top, WIDTH, min(500, height - top)))
            num_pixels += np.bincount(ids.ravel(), minlength=256)
        corner = file.read(1, window=RasterWindow(WIDTH - SQUARE, height - SQUARE, SQUARE, SQUARE))
    assert num_pixels[:2].sum() == 4 * SQUARE**2 and num_pixels.sum() == num_pixels[[0, 1, 255]].sum()
    assert corner.max() < 2
    return growth


@pytest.mark.long
@needs_proc
def test_a_raster_of_40000_rows_takes_no_more_memory_than_one_of_3000(folder: Path) -> None:
    """Both have 40 000 columns; the pixels of the higher one are 12.8 GB."""
    low, high = (in_child(partial(predict_huge, folder, height)) for height in (3000, 40_000))
    print(f"growth of memory: {low / 1e6:.0f} MB for 3000 rows, {high / 1e6:.0f} MB for 40000 rows")
    assert high < 1.1 * low + 100e6 and high < 1.5e9
