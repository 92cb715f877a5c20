"""The table of generated colours: unchanged, distinct, and what the script writes.

Distances are CIEDE2000 differences: about 1 is just noticeable side by side, and colours of different names are usually
20 or more apart.
"""

from __future__ import annotations

import csv
import hashlib
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from semseg.data.classes import ClassTable, built_in_classes
from semseg.data.palette import generated_palette

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / "tools"
# Pairs of ADE20K's 150 classes (class indices) that touch along ten pixels or more in its eight sample label maps.
TOUCHING = Path(__file__).with_name("touching_classes.csv")

SCRIPT = runpy.run_path(str(TOOLS / "make_palette.py"))
EVERYWHERE, measure_distance, rate_pairs = (SCRIPT[name] for name in ("EVERYWHERE", "measure_distance", "rate_pairs"))


def distances(palette: object) -> NDArray[np.float64]:
    """The distance of each pair of colours (K, K), infinite for a colour and itself."""
    lab = SCRIPT["to_lab"](SCRIPT["to_linear"](np.array(palette)))
    return measure_distance(lab[:, None], lab[None]) + np.diag(np.full(len(lab), np.inf))


def read_touching_pairs() -> NDArray[np.int64]:
    """(N, 2) class indices."""
    with TOUCHING.open(newline="") as file:
        return np.array([(int(row["first"]), int(row["second"])) for row in csv.DictReader(file)])


def test_the_palette_does_not_change() -> None:
    palette = generated_palette(512)
    some = {index: palette[index] for index in (0, 1, 2, 18, 149, 255, 511)}
    assert some == {
        0: (196, 0, 255), 1: (216, 59, 0), 2: (0, 157, 137), 18: (118, 78, 59), 149: (157, 118, 78),
        255: (118, 98, 177), 511: (98, 118, 59),
    }  # fmt: skip
    digest = hashlib.sha256(bytes(channel for colour in palette for channel in colour)).hexdigest()
    assert digest == "b6b742d053f43e39d1da959f74b21577b2e651d5af7d289959608a5b16c5a922"
    assert ClassTable.from_names(["a", "b"]).palette == palette[:2]


@pytest.mark.long
def test_the_script_writes_the_tables_of_the_package(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(TOOLS / "make_palette.py"), str(tmp_path)], check=True, cwd=tmp_path)
    for name in ("palette.csv", "cocostuff_classes.csv"):
        assert (tmp_path / name).read_text() == (REPOSITORY / "semseg/data" / name).read_text(), name


@pytest.mark.parametrize(
    ("first", "second", "distance"),  # test data of Sharma, Wu and Dalal 2005
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
        ((50, -1, 2), (50, 0, 0), 2.3669),
        ((50, 2.5, 0), (58, 24, 15), 19.4535),
    ],
)
def test_distances_are_those_of_the_paper(first: tuple[float, ...], second: tuple[float, ...], distance: float) -> None:
    assert float(measure_distance(np.array(first), np.array(second))) == pytest.approx(distance, abs=5e-5)


@pytest.mark.parametrize(("num_classes", "smallest"), [(12, 22), (19, 16), (50, 11), (150, 8.5), (171, 8), (256, 7)])
def test_all_colours_of_so_many_classes_differ(num_classes: int, smallest: float) -> None:
    assert distances(generated_palette(num_classes)).min() > smallest


def test_classes_with_neighbouring_ids_differ_clearly() -> None:
    distance = distances(generated_palette(256))
    assert min(distance.diagonal(offset).min() for offset in range(1, 13)) > 14


def test_classes_that_touch_in_label_maps_differ() -> None:
    pairs = read_touching_pairs()
    distance = distances(generated_palette(150))
    assert len(pairs) == 133 and distance[pairs[:, 0], pairs[:, 1]].min() > 12.5
    # With the classes in any other order as well: data sets number theirs differently.
    random = np.random.default_rng(0)
    for _ in range(50):
        first, second = random.permutation(150)[pairs].T
        assert distance[first, second].min() > 8.5


@pytest.mark.shared
def test_the_table_of_touching_classes_is_that_of_the_label_maps(shared: Path) -> None:
    lengths = np.zeros((151, 151), np.int64)
    for path in (shared / "ade20k_samples" / "annotations").rglob("*.png"):
        label = np.asarray(Image.open(path)).astype(int)
        for first, second in ((label[:, 1:], label[:, :-1]), (label[1:], label[:-1])):
            np.add.at(lengths, (np.minimum(first, second), np.maximum(first, second)), 1)
    found = np.argwhere(np.triu(lengths[1:, 1:], 1) >= 10)
    assert found.tolist() == read_touching_pairs().tolist()


def test_classes_of_cocostuff_that_occur_in_one_scene_differ() -> None:
    classes = built_in_classes("cocostuff")
    names, distance = list(classes.names), distances(classes.palette)
    assert sorted(classes.palette) == sorted(generated_palette(171))
    assert distance[rate_pairs(names) > 0].min() > 10
    frequent = [names.index(name) for name in EVERYWHERE.split()]
    assert distance[np.ix_(frequent, frequent)].min() > 22
    assert {"person", "tree", "wall-concrete", "building-other", "light", "ceiling-other"} <= set(EVERYWHERE.split())


def test_published_palettes_stay_those_of_their_data_sets() -> None:
    first = {name: built_in_classes(name).palette[1] for name in ("ade20k", "camvid", "cityscapes", "voc2012")}
    assert first == {
        "ade20k": (180, 120, 120), "camvid": (128, 0, 0), "cityscapes": (244, 35, 232), "voc2012": (128, 0, 0),
    }  # fmt: skip


def test_generated_colours_do_not_change_with_their_number() -> None:
    assert generated_palette(20) == generated_palette(150)[:20]
    assert len(set(generated_palette(512))) == 512
    assert generated_palette(600)[512:] == generated_palette(88)
    assert np.array(generated_palette(512)).max(1).min() > 60  # none is nearly black


def dichromat(rgb: np.ndarray, opsin: int) -> np.ndarray:
    """Linear RGB without the red (0) or the green (1) cones, by the cones of Vienot, Brettel and Mollon 1999."""
    to_cones = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    lost = np.eye(3)
    lost[opsin] = [[0, 2.02344, -2.52581], [0.494207, 0, 1.24827]][opsin]
    return rgb @ (np.linalg.inv(to_cones) @ lost @ to_cones).T


@pytest.mark.parametrize("opsin", [0, 1], ids=["protanopia", "deuteranopia"])
def test_the_colours_of_few_classes_differ_for_colour_blind_people_too(opsin: int) -> None:
    linear = (np.array(generated_palette(19)) / 255) ** 2.2
    seen = np.clip(dichromat(linear, opsin), 0, 1) ** (1 / 2.2) * 255
    distance = np.abs(seen[:, None] - seen[None]).sum(-1) + 999 * np.eye(19)
    assert distance.min() > 30
