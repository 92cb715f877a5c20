"""Labels of turned photographs: the grid they were drawn on is found by evidence, or asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from helpers.in_process import configured
from semseg.config.schema import DataConfig, SplitConfig
from semseg.data.pairs import read_pair, read_reduced
from semseg.data.sources import DataSource
from semseg.errors import DataError

pytestmark = pytest.mark.reliability

INVERSE = {6: 8, 8: 6}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def scene(height: int, width: int) -> NDArray[np.uint8]:
    """Ids 1 and 2, without symmetry."""
    ids = np.ones((height, width), np.uint8)
    ids[: height // 3, : width // 4] = 2
    ids[height // 2 :, : width // 5] = 2
    return ids


def put(root: Path, name: str, orientation: int, *, upright: bool, square: bool = False, suffix: str = "jpg") -> None:
    """A photo that is white where its id is 2, turned by EXIF, and its mask on one of the grids."""
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    shown, exif = scene(40, 40 if square else 60), Image.Exif()
    exif[0x0112] = INVERSE.get(orientation, orientation)
    turned = Image.fromarray(shown)
    turned.getexif()[0x0112] = exif[0x0112]
    stored = np.asarray(ImageOps.exif_transpose(turned))  # turned back
    exif[0x0112] = orientation
    pixels = Image.fromarray((stored == 2).astype(np.uint8) * 255).convert("RGB")
    pixels.save(root / "images" / f"{name}.{suffix}", exif=exif)
    Image.fromarray(shown if upright else stored).save(root / "masks" / f"{name}.png")


@cache
def folder_config() -> DataConfig:
    return configured("data=folder", "data.num_classes=2", "data.val_fraction=0").data


def source(root: Path, **keys: Any) -> DataSource:
    return DataSource(replace(folder_config(), root=str(root), **keys))


def agreement(data: DataSource) -> list[float]:
    """For each pair, how much of its label shows in its image: by the exact and the fast way."""
    found = []
    for record in data.records("train"):
        pair = read_pair(record, data.label_map)
        assert pair.label is not None
        found.append(float(((pair.image[..., 0] > 128) == (pair.label == 1)).mean()))
        fast = read_reduced(record, lambda full: full, data.label_map)
        assert np.array_equal(fast.image, pair.image) and np.array_equal(fast.label.to_array(), pair.label)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("upright", [True, False])
def test_c27_all_labels_follow_those_whose_size_shows_their_grid(tmp_path: Path, upright: bool, suffix: str) -> None:
    for orientation in range(1, 9):
        put(tmp_path, f"{orientation}", orientation, upright=upright, suffix=suffix)
        put(tmp_path, f"square_{orientation}", orientation, upright=upright, suffix=suffix, square=True)
    assert min(agreement(source(tmp_path))) > 0.97


@pytest.mark.parametrize("upright", [True, False])
def test_c27_lists_follow_evidence_as_folders_do(tmp_path: Path, upright: bool) -> None:
    for orientation in (1, 3, 6):
        put(tmp_path, f"{orientation}", orientation, upright=upright)
    names = ("1", "3", "6")
    (tmp_path / "train.csv").write_text("image,mask\n" + "".join(f"images/{n}.jpg,masks/{n}.png\n" for n in names))
    rows = []
    for name in names:
        width, height = Image.open(tmp_path / f"masks/{name}.png").size
        row = {"fpath_img": f"images/{name}.jpg", "fpath_segm": f"masks/{name}.png", "width": width, "height": height}
        rows.append(json.dumps(row))
    (tmp_path / "train.odgt").write_text("\n".join(rows))
    for name in ("train.csv", "train.odgt"):
        assert min(agreement(source(tmp_path, train=SplitConfig(list=name)))) > 0.97, name


@pytest.mark.parametrize(
    ("orientation", "square"), [(2, False), (3, False), (4, False), (3, True), (6, True), (8, True)]
)
def test_c27_without_evidence_the_key_must_be_set(tmp_path: Path, orientation: int, square: bool) -> None:
    put(tmp_path, "plain", 1, upright=True)
    put(tmp_path, "turned", orientation, upright=True, square=square)
    with pytest.raises(DataError, match=r"turned\.jpg.*no other image shows it.*data\.label_orientation=stored or"):
        source(tmp_path).records("train")
    assert min(agreement(source(tmp_path, label_orientation="upright"))) > 0.97
    assert min(agreement(source(tmp_path, label_orientation="stored"))) < 0.97
    survey, problems = source(tmp_path).survey("train")
    assert len(survey) == 2 and not problems


def test_c27_evidence_that_contradicts_itself_is_refused_where_it_is_needed(tmp_path: Path) -> None:
    put(tmp_path, "a", 6, upright=True)
    put(tmp_path, "b", 8, upright=False)
    assert min(agreement(source(tmp_path))) > 0.97  # each size shows its own grid
    put(tmp_path, "c", 3, upright=True)
    with pytest.raises(DataError, match="1 labels fit the stored image, 1 the upright image"):
        source(tmp_path).records("train")


def test_c27_other_splits_are_evidence_too(tmp_path: Path) -> None:
    put(tmp_path / "a", "turned", 3, upright=True)
    put(tmp_path / "b", "shows", 6, upright=True)
    train, val = (SplitConfig(images=f"{folder}/images", masks=f"{folder}/masks") for folder in ("a", "b"))
    assert min(agreement(source(tmp_path, train=train, val=val))) > 0.97


def test_c27_a_mask_with_an_orientation_of_its_own_is_turned_as_its_photo_is(tmp_path: Path) -> None:
    for orientation in range(2, 9):
        put(tmp_path, f"{orientation}", orientation, upright=False)
        mask = tmp_path / "masks" / f"{orientation}.png"
        Image.open(mask).save(mask.with_suffix(".tif"), tiffinfo={274: orientation})
        mask.unlink()
    assert min(agreement(source(tmp_path))) > 0.97
