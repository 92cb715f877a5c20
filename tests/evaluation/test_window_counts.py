"""Images and labels that are scored by window: the scores of the whole-image way, in memory that does not grow."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image

from helpers.command_line import run_here
from helpers.memory import in_child, peak_growth
from helpers.rasters import NATIVE_BANDS, NO_DATA, draw_rasters
from semseg.config.preprocessing import BandRange
from semseg.data import label_windows, open_pairs, rasters
from semseg.data.bands import BandFile, BandOptions
from semseg.data.foreground import find_classes, find_classes_in_strips
from semseg.data.geometry import Size
from semseg.data.label_map import LabelMap
from semseg.data.label_windows import LabelWindows, open_label, open_label_windows
from semseg.data.labels import read_class_indices
from semseg.data.open_pairs import is_read_by_window, open_pair
from semseg.data.records import Record
from semseg.data.windows import FinishedRows, WholeImage, Window, pick_pixels
from semseg.errors import DataError
from semseg.evaluation.own_scores import IMAGE_METRICS
from semseg.evaluation.window_counts import CountingSink

pytestmark = pytest.mark.reliability
BANDS = ("red", "green", "blue", "nir")
OPTIONS = BandOptions((BandFile("", BANDS),), BANDS, (BandRange(0, 3000),) * 4, (1500.0,) * 4, dtype="uint16")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_rasters(tmp_path_factory.mktemp("rasters"))


@pytest.fixture(scope="module")
def network(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained network, with whole images in its validation."""
    folder = tmp_path_factory.mktemp("network")
    run_here(folder, *NATIVE_BANDS, f"data.root={root}", "run_dir=run")
    return folder


@pytest.fixture
def by_window() -> Iterator[None]:
    """Every image and label of more than 1000 pixels is large."""
    with patch.object(open_pairs, "WHOLE_PIXELS", 1000), patch.object(label_windows, "WHOLE_PIXELS", 1000):
        yield


def read_scores(folder: Path) -> tuple[dict[str, Any], list[bytes]]:
    """metrics.json without the speed, and the files of images."""
    metrics = json.loads((folder / "metrics.json").read_text())
    names = ("confusion.npz", "per_image.npz", "class_maps.zip", "precision_recall.csv")
    files = [(folder / name).read_bytes() for name in names]
    return {key: value for key, value in metrics.items() if "second" not in key and key != "speed"}, files


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        (),
        pytest.param(
            ("eval.flip=true", "eval.window=32", "eval.stride=16", "data.num_workers=2"), marks=pytest.mark.long
        ),
    ],
)
def test_scores_by_window_are_those_of_whole_images(network: Path, words: tuple[str, ...], tmp_path: Path) -> None:
    given = ["mode=eval", f"ckpt={network / 'run'}", "trainer=cpu", *words]
    run_here(tmp_path, *given, "run_dir=whole")
    with (
        patch.object(open_pairs, "WHOLE_PIXELS", 1000),
        patch.object(label_windows, "WHOLE_PIXELS", 1000),
        patch.object(label_windows, "read_class_indices", side_effect=AssertionError("a label was read whole")),
    ):
        run_here(tmp_path, *given, "run_dir=windows")
    assert read_scores(tmp_path / "windows") == read_scores(tmp_path / "whole")
    assert np.load(tmp_path / "windows" / "confusion.npz")["matrix"].min() > 0
    page = (tmp_path / "windows" / "report.html").read_text()
    assert page.count("data:image/") == (tmp_path / "whole" / "report.html").read_text().count("data:image/") == 16


@pytest.mark.slow
@pytest.mark.usefixtures("by_window")
def test_validation_while_training_reads_by_window_as_well(root: Path, network: Path, tmp_path: Path) -> None:
    run_here(tmp_path, *NATIVE_BANDS, f"data.root={root}", "run_dir=run")
    logs = [(folder / "run" / "logs" / "metrics.csv").read_bytes() for folder in (tmp_path, network)]
    assert logs[0] == logs[1]
    ends = [
        torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["semseg"]["threshold"]
        for folder in (tmp_path, network)
    ]
    assert ends[0] == ends[1] is not None


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("by_window")
def test_what_needs_whole_class_maps_gets_them(network: Path, tmp_path: Path) -> None:
    given = ["mode=eval", f"ckpt={network / 'run'}", "trainer=cpu"]
    output = run_here(tmp_path, *given, "run_dir=boundary", "eval.boundary_iou=true", "eval.visualize=true")
    assert "boundary IoU" in output and len(list((tmp_path / "boundary" / "panels").rglob("*.png"))) == 4
    with patch.dict(IMAGE_METRICS, {"size": lambda prediction, label: float(prediction.numel())}):
        run_here(tmp_path, *given, "run_dir=own")
    assert json.loads((tmp_path / "own" / "metrics.json").read_text())["own_scores"]["size"] > 7000
    output = run_here(tmp_path, *given, "run_dir=no", "eval.boundary_iou=true", "data.max_pixels=2000", code=1)
    assert "more than the limit data.max_pixels=2000" in output


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("by_window")
def test_damage_found_while_an_image_is_scored_counts_nothing_of_it(network: Path, root: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(root, tmp_path / "copy")
    damaged = tmp_path / "copy" / "masks" / "2.tif"
    with tifffile.TiffFile(damaged) as file:
        offset, length = file.pages[0].dataoffsets[-1], file.pages[0].databytecounts[-1]
    content = bytearray(damaged.read_bytes())
    content[offset : offset + length] = bytes(length)
    damaged.write_bytes(content)
    given = ["mode=eval", f"ckpt={network / 'run'}", "trainer=cpu", f"data.root={tmp_path / 'copy'}"]
    output = run_here(tmp_path, *given, "run_dir=stopped", code=1)
    assert "masks/2.tif: the TIFF file is broken" in output and "Traceback" not in output
    run_here(tmp_path, *given, "run_dir=skipped", "data.on_bad=skip", "data.max_bad=0.5")
    metrics = json.loads((tmp_path / "skipped" / "metrics.json").read_text())
    assert metrics["images"] == 3
    for name in ("images/2.tif", "masks/2.tif"):
        (tmp_path / "copy" / name).unlink()
    run_here(tmp_path, *given, "run_dir=without")
    confusions = [np.load(tmp_path / name / "confusion.npz") for name in ("skipped", "without")]
    assert all(np.array_equal(confusions[0][key], confusions[1][key]) for key in confusions[0].files)


# ---- labels


def write_label(path: Path, kind: str, ids: NDArray) -> None:
    if kind == "npy":
        np.save(path.with_suffix(".npy"), ids.astype(np.int64))
    elif kind == "palette":
        picture = Image.fromarray(ids.astype(np.uint8))
        picture.putpalette([value for number in range(256) for value in (number, 255 - number, 7)])
        picture.save(path, compression="tiff_lzw")
    else:
        layout = {"tile": (16, 32)} if kind.startswith("tiles") else {"rowsperstrip": 7}
        tifffile.imwrite(path, ids.astype(kind.split()[1]), compression="zstd", bigtiff="big" in kind, **layout)


@pytest.mark.parametrize("kind", ["npy", "palette", "tiles uint8", "tiles uint16", "strips uint8", "strips uint16 big"])
def test_a_label_by_window_is_the_label(tmp_path: Path, kind: str) -> None:
    ids = np.random.default_rng(1).integers(0, 4, (61, 83))
    write_label(tmp_path / "a.tif", kind, ids)
    (path,) = map(str, tmp_path.iterdir())
    label_map = LabelMap(3)
    whole = read_class_indices(path, label_map).to_array()
    windows = open_label_windows(path, label_map)
    assert windows is not None and windows.size == Size(61, 83)
    assert np.array_equal(windows.read(Window(0, 0, 61, 83)), whole)
    assert np.array_equal(windows.read(Window(11, 7, 30, 40)), whole[11:41, 7:47])
    strips = list(windows.read_strips(200))
    assert len(strips) == 31
    assert np.array_equal(np.concatenate([strip for _, strip in strips]), whole)
    found, expected = find_classes_in_strips(windows), find_classes(whole)
    assert all(
        np.array_equal(one, other) and one.dtype == other.dtype for one, other in zip(found, expected, strict=True)
    )
    with pytest.raises(DataError, match=r"label ids 3 .* are neither classes nor ignored"):
        LabelWindows(path, windows.file, LabelMap(2)).read(Window(0, 0, 61, 83))


def test_the_classes_of_a_label_are_the_same_in_any_strips(tmp_path: Path) -> None:
    ids = np.sort(np.random.default_rng(2).integers(0, 3, (90, 70)), axis=0)
    write_label(tmp_path / "a.tif", "tiles uint8", ids)
    windows = open_label_windows(str(tmp_path / "a.tif"), LabelMap(2))
    assert windows is not None
    expected = find_classes(LabelMap(2)(ids, "ids"))
    assert len(expected.positions) == 128
    for rows in (1, 7, 64):
        strips = [
            (Window(top, 0, min(rows, 90 - top), 70), windows.read(Window(top, 0, min(rows, 90 - top), 70)))
            for top in range(0, 90, rows)
        ]
        with patch.object(LabelWindows, "read_strips", return_value=strips):
            found = find_classes_in_strips(windows)
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_labels_without_random_access_are_read_whole_up_to_the_limit(tmp_path: Path, by_window: None) -> None:
    ids = np.ones((50, 60), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((50, 60, 4), np.uint16), photometric="minisblack",
                     planarconfig="contig", tile=(16, 16))  # fmt: skip
    Image.fromarray(ids).save(tmp_path / "a.png")
    record = Record(str(tmp_path / "a.tif"), str(tmp_path / "a.png"), Size(50, 60), "list")
    assert is_read_by_window(record, OPTIONS)
    with open_pair(record, LabelMap(2), bands=OPTIONS) as pair:
        assert not isinstance(pair.label, LabelWindows) and (pair.read_label(Window(3, 0, 5, 60)) == 0).all()
    with (
        pytest.raises(
            DataError, match=r"a\.png: a mask of 50 x 60 pixels, more than data\.max_pixels=2000, is read by"
        ),
        open_pair(record, LabelMap(2), bands=OPTIONS, max_pixels=2000),
    ):
        pass
    tifffile.imwrite(tmp_path / "a.tif.png", ids)  # TIFF by its content
    with open_label(str(tmp_path / "a.tif.png"), LabelMap(2), max_pixels=2000) as label:
        assert isinstance(label, LabelWindows)


def test_without_the_packages_pictures_and_labels_in_tiff_are_read_whole(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 3, (40, 50, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(16, 16))
    tifffile.imwrite(tmp_path / "m.tif", pixels[..., 0], tile=(16, 16))
    record = Record(str(tmp_path / "a.tif"), str(tmp_path / "m.tif"), Size(40, 50), "list")
    kinds = []
    for find in (None, lambda name: None):
        with patch.object(rasters, "find_spec", find) if find else nullcontext():
            with open_pair(record, LabelMap(3, first_id=0, ignore=[])) as pair:
                kinds.append(type(pair.image).__name__)
                image, label = pair.read(Window(3, 4, 20, 30))
            assert np.array_equal(image, pixels[3:23, 4:34]) and np.array_equal(label, pixels[3:23, 4:34, 0])
    assert kinds == ["BandWindows", "WholeImage"]


def test_pixels_are_picked_block_by_block() -> None:
    image = np.random.default_rng(0).integers(0, 99, (90, 70, 3), np.uint8)
    rows, columns = np.arange(1, 90, 4), np.arange(0, 70, 3)
    with patch("semseg.data.windows.BLOCK_SIDE", 32):
        found = pick_pixels(WholeImage(image), rows, columns)
    assert np.array_equal(found, image[np.ix_(rows, columns)])


# ---- memory


def score_constant(folder: Path, size: Size) -> Callable[[], None]:
    """What counts a raster of constants, in tiles, against its label."""
    (folder / str(size)).mkdir()
    paths = [folder / str(size) / f"{name}.tif" for name in ("image", "label")]
    num_tiles = -(-size.height // 512) * -(-size.width // 512)
    tile, how = np.ones((512, 512, 4), np.uint16), {"tile": (512, 512), "compression": "zstd"}
    of_bands = {"planarconfig": "contig", "photometric": "minisblack", "extratags": NO_DATA, **how}
    tifffile.imwrite(paths[0], (tile for _ in range(num_tiles)), shape=(*size, 4), dtype="uint16", **of_bands)
    ids = tile[..., 0].astype(np.uint8)
    tifffile.imwrite(paths[1], (ids for _ in range(num_tiles)), shape=tuple(size), dtype="uint8", **how)

    def work() -> None:
        with open_pair(Record(*map(str, paths), size, "list"), LabelMap(2), bands=OPTIONS) as pair:
            sink = CountingSink(pair, 2, torch.device("cpu"))
            for top in range(0, size.height, 100):
                predicted = np.full((min(100, size.height - top), size.width), 1, np.int16)
                sink.write_rows(FinishedRows(top, predicted, np.full(predicted.shape, 0.75, np.float32), None))
            counts = sink.finish()
        assert counts.matrix.tolist() == [[0, math.prod(size)], [0, 0]]
        assert counts.thresholds is not None and int(counts.thresholds[0, 750]) == math.prod(size)

    return work


def growth_of_scoring(folder: Path, size: Size) -> int:
    score_constant(folder, Size(600, 700))()  # what the libraries take at their first use does not count
    with patch.object(label_windows, "WHOLE_PIXELS", 1000):
        return peak_growth(score_constant(folder, size))


@pytest.mark.parametrize(
    ("height", "width", "limit"),
    [
        pytest.param(2500, 10_000, 300e6, marks=pytest.mark.long),
        pytest.param(8000, 40_000, 350e6, marks=pytest.mark.long),
    ],
)
def test_a_raster_is_scored_in_memory_that_its_height_does_not_change(
    tmp_path: Path, height: int, width: int, limit: float
) -> None:
    """The first has 200 MB of pixels, its label in int64 as many; the second 2.6 GB each."""
    growth = in_child(partial(growth_of_scoring, tmp_path, Size(height, width)))
    assert growth < limit, f"{growth / 1e6:.0f} MB"
