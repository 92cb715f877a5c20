"""Rasters of more than data.max_pixels: what is read of them by window before and during training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import tifffile
from PIL import Image

from helpers.command_line import run_here
from helpers.rasters import NATIVE_BANDS, draw_rasters
from semseg.config.preprocessing import BandRange
from semseg.data import images, scan
from semseg.data.band_statistics import measure_bands
from semseg.data.bands import BandFile, BandOptions
from semseg.data.foreground import build_foreground_index
from semseg.data.geometry import Size
from semseg.data.label_map import LabelMap
from semseg.data.records import Record
from semseg.data.scan import find_first_pixel, scan_pairs

pytestmark = pytest.mark.reliability
BANDS = ("red", "green", "blue", "nir")
OPTIONS = BandOptions((BandFile("", BANDS),), BANDS, (BandRange(0, 3000),) * 4, (1500.0,) * 4, dtype="uint16")
LIMIT = 2000  # pixels; every raster has more


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_rasters(tmp_path_factory.mktemp("rasters"))


@pytest.fixture
def nothing_is_read_whole() -> Iterator[None]:
    """Reading a whole file into memory is an error."""

    def refuse(path: str | Path) -> bytes:
        raise AssertionError(f"{path} was read whole")

    with patch.object(images, "read_file", refuse), patch.object(scan, "read_label", refuse):
        yield


def records_of(root: Path) -> list[Record]:
    found = []
    for path in sorted((root / "images").iterdir()):
        with tifffile.TiffFile(path) as file:
            size = Size(*file.pages[0].shape[:2])
        found.append(Record(str(path), str(root / "masks" / path.name), size, "list"))
    return found


def test_the_check_finds_the_ids_of_rasters_beyond_the_limit_by_window(
    root: Path, tmp_path: Path, nothing_is_read_whole: None
) -> None:
    records = records_of(root)
    facts = list(scan_pairs(records, root, max_pixels=LIMIT, bands=OPTIONS, is_native=True, cache_dir=tmp_path))
    for record, found in zip(records, facts, strict=True):
        ids = tifffile.imread(record.label or "")
        assert not found.problem and found.ids == {0: int((ids == 0).sum()), 1: int((ids == 1).sum())}
        assert Size(found.height, found.width) == record.size and found.mask_kind == "TIFF L"
        row, column = np.argwhere(ids == 1)[0].tolist()
        assert find_first_pixel(record.label or "", 1, None, LIMIT) == (row, column)
    again = list(scan_pairs(records, root, max_pixels=LIMIT, bands=OPTIONS, is_native=True, cache_dir=tmp_path))
    assert again == facts


def test_the_check_names_what_is_wrong_with_a_large_raster(root: Path, tmp_path: Path) -> None:
    first, second, third, fourth = records_of(root)
    Image.fromarray(np.zeros(first.size, np.uint8)).save(tmp_path / "mask.png")
    content = Path(third.image).read_bytes()
    (tmp_path / "cut.tif").write_bytes(content[: len(content) // 2])
    records = [
        first._replace(label=str(tmp_path / "mask.png")),
        second._replace(label=first.label),
        third._replace(image=str(tmp_path / "cut.tif")),
        fourth._replace(size=Size(91, 91)),
    ]
    problems = [
        facts.problem
        for facts in scan_pairs(
            records, tmp_path, max_pixels=LIMIT, bands=OPTIONS, is_native=True, cache_dir=tmp_path / "cache"
        )
    ]
    for problem, part in zip(
        problems,
        ["mask.png: a mask of 70 x 110 pixels", "1.tif is 83 x 103, its mask", "cut.tif: the TIFF file is broken",
         "3.tif: the list says 91 x 91"],
        strict=True,
    ):  # fmt: skip
        assert part in problem and "\n" not in problem
    (at_a_short_edge,) = scan_pairs([first], root, max_pixels=LIMIT, bands=OPTIONS, cache_dir=tmp_path / "cache")
    assert "more than the limit data.max_pixels=2000" in at_a_short_edge.problem


def test_the_values_of_rasters_beyond_the_limit_are_measured_in_windows(
    root: Path, nothing_is_read_whole: None
) -> None:
    records = records_of(root)
    measured = measure_bands(records, OPTIONS, max_pixels=LIMIT)
    for low, high in measured.ranges:
        assert 300 <= low < 700 and 900 < high <= 2800
    assert measured.num_images == 4


def test_the_index_of_large_labels_is_made_by_window(root: Path, tmp_path: Path, nothing_is_read_whole: None) -> None:
    records, label_map = records_of(root), LabelMap(2, first_id=0, ignore=[])
    by_window = build_foreground_index(records, root, label_map, max_pixels=LIMIT, cache_dir=tmp_path / "windows")
    with patch.object(images, "read_file", lambda path: Path(path).read_bytes()):
        whole = build_foreground_index(records, root, label_map, cache_dir=tmp_path / "whole")
    for name in ("classes", "counts", "positions", "label_starts"):
        assert np.array_equal(getattr(by_window, name), getattr(whole, name))
    assert len(by_window.positions) == 4 * 2 * 64


@pytest.mark.slow
@pytest.mark.long
def test_rasters_beyond_the_limit_are_checked_and_trained_on(root: Path, tmp_path: Path) -> None:
    words = [*NATIVE_BANDS, f"data.root={root}", "data.label_cache=null"]
    output = run_here(tmp_path, *words, "run_dir=whole")
    output = run_here(tmp_path, *words, "run_dir=run", f"data.max_pixels={LIMIT}")
    assert "best mean IoU" in output
    logs = [(tmp_path / name / "logs" / "metrics.csv").read_bytes() for name in ("whole", "run")]
    assert logs[0] == logs[1]
    check = [word for word in words if not word.startswith(("optim", "trainer.max_epochs"))]
    output = run_here(tmp_path, "mode=check", *check, "run_dir=check", f"data.max_pixels={LIMIT}")
    assert "READY" in output and "NOT READY" not in output
