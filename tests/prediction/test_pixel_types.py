"""A network of 16-bit images takes values of the type of its training, and is averaged with one of other ranges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

import semseg
from helpers.command_line import TINY_ENCODERS, run_here
from helpers.rasters import NATIVE_BANDS, draw_rasters
from semseg.checkpoints.ensemble import join_networks
from semseg.checkpoints.format import read_checkpoint, write_ckpt
from semseg.config.preprocessing import PREPROCESSING, RGB, BandRange
from semseg.data.bands import BandFile, BandOptions
from semseg.errors import ArgumentError, CheckpointError, ConfigError, DataError
from semseg.modes.average import refuse_other_network
from semseg.nets.bands import check_bands
from semseg.nets.registry import ENCODERS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `a` and `b`, whose ranges were measured on other images, and their data."""
    folder = draw_rasters(tmp_path_factory.mktemp("types"))
    words = [word for word in NATIVE_BANDS if not word.startswith(("data.value_range", "data.val.", "data.steps"))]
    for fold, name in enumerate("ab"):
        run_here(folder, *words, "data.root=.", "data.value_range=auto", "data.folds=2", f"data.fold={fold}",
                 "data.steps_per_epoch=2", f"run_dir={name}")  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "tiny", TINY_ENCODERS["tiny"])


def test_files_and_arrays_of_another_type_are_refused(trained: Path) -> None:
    net = semseg.load(trained / "a", device="cpu")
    pixels = tifffile.imread(trained / "images" / "0.tif")
    assert net.predict(pixels).ids.shape == (70, 110)
    reflectance: Any = (pixels / 10000).astype(np.float32)
    with pytest.raises(ArgumentError, match="the picture: holds float32 values where uint16 ones are expected"):
        net.predict(reflectance)
    with pytest.raises(ArgumentError, match="holds float32 values where uint16"):
        net.predict(torch.from_numpy(reflectance).permute(2, 0, 1))
    np.save(trained / "reflectance.npy", reflectance)
    with pytest.raises(DataError, match=r"reflectance\.npy: holds float32 values where uint16"):
        net.predict(trained / "reflectance.npy")
    printed = run_here(trained, "mode=predict", "ckpt=a", "input=reflectance.npy", "run_dir=refused", code=1)
    assert "reflectance.npy: holds float32 values where uint16 ones are expected. Convert it" in printed


def test_a_data_set_of_another_type_is_not_scored(trained: Path) -> None:
    other = trained / "other"
    shutil.copytree(trained / "masks", other / "masks")
    (other / "images").mkdir()
    for path in sorted((trained / "images").iterdir()):
        pixels = (tifffile.imread(path) / 10000).astype(np.float32)
        tifffile.imwrite(other / "images" / path.name, pixels, photometric="minisblack", planarconfig="contig")
    images = [word for word in NATIVE_BANDS if not word.startswith("data.val.")] + ["data.root=.", "run_dir=mixed"]
    printed = run_here(trained, *images, "data.val.images=other/images", "data.val.masks=masks", code=1)
    assert "data.val: its images hold float32 values, those of data.train uint16 ones. Convert them" in printed
    assert "epoch 1" not in printed
    mix = "data.mix=[{images:other/images,masks:masks,share:0.5}]"
    printed = run_here(trained, *NATIVE_BANDS, "data.root=.", "run_dir=blend", mix, code=1)
    assert "data.mix[0]: its images hold float32 values, those of data.train uint16 ones" in printed
    val = ["data.root=.", "data.val.images=other/images", "data.val.masks=masks"]
    printed = run_here(trained, "mode=check", *images[:-2], *val, "run_dir=looked", code=1)
    assert "data.val: its images hold float32 values, those of data.train uint16 ones" in printed
    words = ["data.root=other", "data.val.images=images", "data.val.masks=masks", "data.folds=null", "data.fold=null"]
    printed = run_here(trained, "mode=eval", "ckpt=a", *words, "trainer=cpu", "run_dir=scored", code=1)
    assert "0.tif: holds float32 values where uint16 ones are expected. Convert it" in printed


@pytest.mark.parametrize("given", [[], ["data.value_range=auto"]])
def test_a_data_set_without_ranges_is_read_with_those_of_the_network(trained: Path, given: list[str]) -> None:
    bands = "data.bands=[red,green,blue,nir]"
    words = ["mode=eval", "ckpt=a", bands, "data.value_range=null", *given, "trainer.accelerator=cpu"]
    run_here(trained, *words, f"run_dir=plain{len(given)}")
    run_here(trained, "mode=eval", "ckpt=a", "trainer.accelerator=cpu", f"run_dir=as_trained{len(given)}")
    scores = [
        json.loads((trained / f"{name}{len(given)}" / "metrics.json").read_text()) for name in ("plain", "as_trained")
    ]
    assert scores[0]["mean_iou"] == scores[1]["mean_iou"]


def test_a_range_is_refused_for_a_network_of_8_bit_images() -> None:
    options = BandOptions((BandFile("", RGB),), RGB, (BandRange(0, 3000),) * 3)
    with pytest.raises(ConfigError, match=r"data\.value_range=\[0,3000\]: the network was trained on 8-bit images"):
        check_bands(PREPROCESSING["rgb_mean_std"], options)


def test_networks_of_other_measured_ranges_are_averaged_each_with_its_own(trained: Path) -> None:
    first, second = (read_checkpoint(trained / name / "checkpoints" / "last.ckpt") for name in "ab")
    assert first.convention.dtype == second.convention.dtype == "uint16"
    assert first.convention.ranges != second.convention.ranges
    picture = trained / "images" / "0.tif"
    means = [semseg.load(trained / name, device="cpu").predict(picture, probabilities=True) for name in "ab"]
    both = semseg.load([trained / "a", trained / "b"], device="cpu").predict(picture, probabilities=True)
    assert both.probabilities is not None
    assert np.allclose(both.probabilities, np.mean([one.probabilities for one in means], axis=0), atol=1e-3)  # float16
    run_here(trained, "mode=eval", "ckpt=[a,b]", "trainer=cpu", "run_dir=mean")
    with pytest.raises(CheckpointError, match=r"data\.value_range is \[\[.*\]\] and \[\[.*\]\], which auto measures"):
        refuse_other_network(first, second)


def test_networks_that_read_images_in_other_ways_are_not_averaged(trained: Path) -> None:
    first = read_checkpoint(trained / "a" / "checkpoints" / "last.ckpt")
    other = first._replace(source="b")
    untyped = first._replace(convention=first.convention._replace(dtype=""))  # of an earlier version
    assert join_networks([untyped, other]).convention.dtype == "uint16"
    write_ckpt(trained / "untyped.ckpt", untyped)
    write_ckpt(trained / "int16.ckpt", first._replace(convention=first.convention._replace(dtype="int16")))
    words = ["mode=average", "ckpt=[untyped.ckpt,a,int16.ckpt]", "trainer=cpu", "run_dir=refused_average"]
    assert "they were trained on uint16 and int16 values" in run_here(trained, *words, code=1)
    for changes, message in (
        ({"dtype": "int16"}, "they were trained on uint16 and int16 values"),
        ({"ranges": (), "dtype": ""}, r"only one of them has a data\.value_range, \[\["),
        ({"bands": ("red", "green", "blue", "swir")}, r"the bands \[red,green,blue,nir\] and \[red,green,blue,swir\]"),
        ({"mean": (0.1,) * 4}, "the mean of their normalisation is "),
        ({"ranges": (BandRange(0, 1),) * 4}, r"and \[0,1\], which auto"),
    ):
        with pytest.raises(CheckpointError, match=message):
            refuse_other_network(first, other._replace(convention=first.convention._replace(**changes)))
